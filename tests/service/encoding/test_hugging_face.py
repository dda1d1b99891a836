"""`/hf/{task}` as the real `huggingface_hub.InferenceClient` sends and parses it, over a socket."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import AsyncInferenceClient
from numpy.testing import assert_allclose
from safetensors.torch import save_file
from transformers import pipeline

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill"]


@pytest.fixture
async def make_hub_client(base_url: str) -> AsyncIterator[Any]:
    """make_hub_client(task): a client whose model is that route's address."""
    async with AsyncExitStack() as stack:

        def make(task: str) -> AsyncInferenceClient:
            client = AsyncInferenceClient(model=f"{base_url}/hf/{task}")
            stack.push_async_callback(client.close)
            return client

        yield make


async def test_text_classification(make_classifier: Any, tokenizer: Any, make_hub_client: Any) -> None:
    model = make_classifier(["joy", "anger", "fear"])
    client = make_hub_client("text-classification")
    for function in (None, "sigmoid", "softmax", "none"):
        reference = pipeline(
            "text-classification", model=model, tokenizer=tokenizer, function_to_apply=function or "softmax"
        )
        expected = reference(TEXTS[0], top_k=2)
        found = await client.text_classification(TEXTS[0], top_k=2, function_to_apply=function)
        assert [entry.label for entry in found] == [entry["label"] for entry in expected]
        assert [entry.score for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("task", "more"),
    [("text-classification", {}), ("zero-shot-classification", {"parameters": {"candidate_labels": ["cat", "dog"]}}),
     ("feature-extraction", {})],
)  # fmt: skip
async def test_the_address_may_ask_for_texts_to_be_cut(
    make_classifier: Any, make_embedder: Any, client: httpx.AsyncClient, task: str, more: dict[str, Any]
) -> None:
    make_classifier(["contradiction", "neutral", "entailment"])
    make_embedder()
    body = {"inputs": "the cat sat on the mat " * 20, **more}
    assert (await client.post(f"/hf/{task}", json=body)).status_code == 400
    response = await client.post(f"/hf/{task}?truncate=true", json=body)
    assert response.status_code == 200
    assert int(response.headers["x-truncated-tokens"]) > 0


@pytest.mark.parametrize("multi_label", [False, True])
async def test_zero_shot_classification(
    make_classifier: Any, tokenizer: Any, make_hub_client: Any, multi_label: bool
) -> None:
    model = make_classifier(["contradiction", "neutral", "entailment"])
    labels, template = ["cat", "dog", "film"], "this is {}"
    reference = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    expected = reference(TEXTS[0], labels, hypothesis_template=template, multi_label=multi_label)
    found = await make_hub_client("zero-shot-classification").zero_shot_classification(
        TEXTS[0], labels, hypothesis_template=template, multi_label=multi_label
    )
    assert [entry.label for entry in found] == expected["labels"]
    assert [entry.score for entry in found] == pytest.approx(expected["scores"], abs=1e-5)


async def test_the_bare_address_of_the_service_gives_features(make_embedder: Any, base_url: str) -> None:
    """As text-embeddings-inference has it; what LangChain's HuggingFaceEndpointEmbeddings asks goes the same way."""
    reference = make_embedder()
    async with AsyncInferenceClient(model=base_url) as client:
        assert_allclose(await client.feature_extraction(TEXTS[0]), reference.encode(TEXTS[:1]), atol=1e-5)
        found = await client.feature_extraction(TEXTS, normalize=True, truncate=True)  # type: ignore[arg-type]
        assert_allclose(found, reference.encode(TEXTS), atol=1e-5)


async def test_feature_extraction_and_sentence_similarity(make_embedder: Any, make_hub_client: Any) -> None:
    reference = make_embedder(prompts={"query": "query : "})
    client = make_hub_client("feature-extraction")
    found = await client.feature_extraction(
        TEXTS[0], normalize=True, prompt_name="query", truncate=True, truncation_direction="right", dimensions=8
    )
    expected = reference.encode(TEXTS[:1], prompt_name="query", truncate_dim=8, normalize_embeddings=True)
    assert found == pytest.approx(expected, abs=1e-5)
    long = "the cat " * 100
    reference.tokenizer.truncation_side = "left"
    expected = reference.encode([long + TEXTS[0]])
    found = await client.feature_extraction(long + TEXTS[0], truncate=True, truncation_direction="left")
    assert found == pytest.approx(expected, abs=1e-5)
    vectors = reference.encode(TEXTS)
    scores = await make_hub_client("sentence-similarity").sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    assert scores == pytest.approx(reference.similarity(vectors[:1], vectors[1:])[0].tolist(), abs=1e-5)


async def test_question_answering(make_model: Any, engine: Any, make_hub_client: Any, post: Any) -> None:
    engine.load(make_model("BertForQuestionAnswering", "reader")[0])
    question, context = "what sat", TEXTS[0]
    own = await post("/v1/answer", question=question, context=context, top_k=3)
    client = make_hub_client("question-answering")
    best = await client.question_answering(question=question, context=context)
    assert (best.answer, best.score) == (own["data"][0]["answer"], own["data"][0]["score"])
    assert context[best.start : best.end] == best.answer
    several = await client.question_answering(question=question, context=context, top_k=3, max_question_len=64)
    assert [entry.answer for entry in several] == [entry["answer"] for entry in own["data"][0]["answers"]]


async def test_the_address_may_say_which_checkpoint_and_which_head(
    make_classifier: Any, make_model: Any, engine: Any, make_hub_client: Any, client: httpx.AsyncClient
) -> None:
    """With several loaded, only the first could be reached, and of an encoder's small heads none."""
    make_classifier(["joy", "anger"], "first")
    make_classifier(["spam", "ham"], "second")
    folder, _ = make_model("BertModel", "encoder")
    (folder / "heads" / "mood").mkdir(parents=True)
    (folder / "heads" / "mood" / "config.json").write_text(
        json.dumps({"kind": "classification", "input": "cls", "labels": ["up", "down"]})
    )
    save_file({"weight": torch.ones(2, 32), "bias": torch.ones(2)}, folder / "heads" / "mood" / "model.safetensors")
    engine.load(folder)
    for address, labels in (
        ("text-classification", {"joy", "anger"}),
        ("text-classification?model=second", {"spam", "ham"}),
        ("text-classification?model=encoder&head=mood", {"up", "down"}),
    ):
        found = await make_hub_client(address).text_classification(TEXTS[0])
        assert {entry.label for entry in found} == labels
        answer = await client.post("/predict" + address.removeprefix("text-classification"), json={"inputs": "a"})
        assert {entry["label"] for entry in answer.json()} == labels
    assert (await client.get("/info?model=second")).json()["model_id"] == "second"


async def test_without_a_classifier_the_heads_there_are_are_told(
    make_model: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    """The advice was to give `labels`, which this shape does not have."""
    engine.load(make_model("BertModel", "encoder")[0])
    error = (await client.post("/hf/text-classification", json={"inputs": "a"})).json()["error"]
    assert error["param"] == "model"


@pytest.mark.parametrize(
    ("task", "body", "param"),
    [
        ("text-classification", {"inputs": "cat " * 100}, "inputs"),
        ("text-classification", {"inputs": ["good", "cat " * 100]}, "inputs.1"),
        ("text-classification", {"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
        ("zero-shot-classification", {"inputs": "a", "parameters": {}}, "parameters.candidate_labels"),
        (
            "zero-shot-classification",
            {"inputs": "a", "parameters": {"candidate_labels": ["a", "a"]}},
            "parameters.candidate_labels.1",
        ),
        ("text-classification?head=nope", {"inputs": "a"}, "head"),
        ("text-classification?model=nope", {"inputs": "a"}, "model"),
        (
            "summarization",
            {"inputs": "a", "parameters": {"generate_parameters": {"num_beams": 0}}},
            "parameters.generate_parameters.num_beams",
        ),
        (
            "summarization",
            {"inputs": "a", "parameters": {"generate_parameters": {"max_length": "9"}}},
            "parameters.generate_parameters.max_length",
        ),
        ("question-answering", {"inputs": {"question": "", "context": "a"}}, "inputs.question"),
        (
            "question-answering",
            {"inputs": {"question": "a", "context": "a"}, "parameters": {"top_k": 0}},
            "parameters.top_k",
        ),
        ("summarization", {"inputs": ""}, "inputs"),
        ("translation", {"inputs": "a"}, "model"),
    ],
)
async def test_faults_are_named_as_they_were_sent(
    task: str, body: dict[str, Any], param: str, make_classifier: Any, client: httpx.AsyncClient
) -> None:
    make_classifier(["contradiction", "neutral", "entailment"])
    response = await client.post(f"/hf/{task}", json=body)
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["error"]["param"] == param
