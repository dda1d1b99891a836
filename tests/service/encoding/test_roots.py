"""Addresses without /v1: whose shape a request has, and that the handler of that shape answers it."""

from typing import Any

import httpx
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast, pipeline

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill", "not a dog"]
LONG = "the cat sat on the mat " * 20
LABELS = ["joy", "anger", "fear"]


@pytest.mark.parametrize("path", ["/", "/invocations"])
async def test_the_root_does_what_the_checkpoint_is_for(
    make_embedder: Any, make_classifier: Any, make_reranker: Any, post: Any, path: str
) -> None:
    make_embedder()
    make_classifier(LABELS)
    make_reranker()
    texts = {"query": "the cat", "texts": TEXTS}
    documents = {"query": "the cat", "documents": TEXTS}
    assert await post(path, inputs=TEXTS) == await post("/embed", inputs=TEXTS)
    assert await post(path, inputs=TEXTS[0], normalize=None) == await post("/embed", inputs=TEXTS[0])
    assert await post(f"{path}?model=classifier", inputs=TEXTS[0]) == await post("/predict", inputs=TEXTS[0])
    assert await post(f"{path}?model=reranker", **texts) == await post("/rerank?model=reranker", **texts)
    ranked = await post("/v1/rerank", model="reranker", **documents)
    assert (await post(path, model="reranker", **documents))["results"] == ranked["results"]


async def test_the_root_of_a_classifier_alone_predicts(make_classifier: Any, post: Any) -> None:
    make_classifier(LABELS)
    assert await post("/", inputs=[["good"], ["bad"]]) == await post("/predict", inputs=[["good"], ["bad"]])


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "inputs"), ({"inputs": 5}, "inputs"), ({"inputs": "a", "parameters": {}}, "parameters"),
     ({"query": "a"}, "texts"), ({"query": "a", "documents": ["a", 5]}, "documents.1")],
)  # fmt: skip
async def test_a_wrong_field_at_the_root_is_named(
    make_embedder: Any, refused: Any, body: dict[str, Any], param: str
) -> None:
    make_embedder()
    assert (await refused("/", **body))["param"] == param


async def test_what_needs_a_body_says_so_without_one(make_embedder: Any, client: httpx.AsyncClient) -> None:
    make_embedder()
    for path in ("/", "/rerank", "/tokenize"):
        for response in (await client.post(path), await client.post(path, json=[1])):
            assert response.status_code == 400
            assert "the body" in response.json()["error"]["message"]


async def test_embeddings_and_models_are_there_without_v1(
    make_embedder: Any, post: Any, client: httpx.AsyncClient
) -> None:
    make_embedder()
    assert await post("/embeddings", input=TEXTS) == await post("/v1/embeddings", input=TEXTS)
    assert (await client.get("/models")).json() == (await client.get("/v1/models")).json()


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
async def test_classify_gives_the_pipelines_probabilities_in_the_order_of_the_labels(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, post: Any, problem_type: str | None
) -> None:
    model = make_classifier(LABELS, problem_type=problem_type)
    rows = pipeline("text-classification", model=model, tokenizer=tokenizer)(TEXTS, top_k=None)
    answer = await post("/classify", model="classifier", input=TEXTS)
    for index, (entry, row) in enumerate(zip(answer["data"], rows, strict=True)):
        expected = {one["label"]: one["score"] for one in row}
        assert entry["probs"] == pytest.approx([expected[label] for label in LABELS], abs=1e-5)
        assert (entry["index"], entry["label"], entry["num_classes"]) == (index, row[0]["label"], 3)
    assert answer["object"] == "list"
    assert answer["id"].startswith("classify-")
    alone = (await post("/classify", input=TEXTS[0]))["data"]
    assert [entry["probs"] for entry in alone] == [pytest.approx(answer["data"][0]["probs"], abs=1e-5)]


async def test_classify_gives_logits_without_the_activation(make_classifier: Any, post: Any) -> None:
    make_classifier(LABELS)
    probabilities = (await post("/classify", input="good"))["data"][0]["probs"]
    logits = np.array((await post("/classify", input="good", use_activation=False))["data"][0]["probs"])
    assert np.exp(logits) / np.exp(logits).sum() == pytest.approx(probabilities, abs=1e-5)


async def test_a_text_that_cannot_be_classified_leaves_the_others_their_labels(
    make_classifier: Any, post: Any, refused: Any
) -> None:
    make_classifier(LABELS)
    answer = await post("/classify", input=["good", LONG])
    assert answer["data"][0]["label"] in LABELS
    assert answer["data"][1]["error"]["code"] == "context_length_exceeded"
    answer = await post("/classify", input=["good", LONG], truncate_prompt_tokens=16)
    assert (answer["data"][1]["truncated"], answer["data"][1]["kept_tokens"]) == (True, 16)
    assert (await refused("/classify", input="good", raw_scores=True))["param"] == "raw_scores"
    assert (await refused("/classify", input=[]))["param"] == "input"


async def test_tokenize_at_the_root_takes_both_servers_shapes(make_embedder: Any, post: Any) -> None:
    make_embedder()
    [rows] = await post("/tokenize", inputs="the catzz sat")
    answer = await post("/tokenize", model="embedder", prompt="the catzz sat", return_token_strs=True)
    assert answer["tokens"] == [row["id"] for row in rows]
    assert answer["token_strs"] == [row["text"] for row in rows]
    assert (answer["count"], answer["max_model_len"]) == (len(rows), 64)
    bare = await post("/tokenize", prompt="the catzz sat", add_special_tokens=False)
    assert bare["tokens"] == answer["tokens"][1:-1]
    assert bare["token_strs"] is None
    assert await post("/v1/tokenize", text="the catzz sat", return_token_strs=True) == answer
    back = await post("/detokenize", tokens=[rows[1]["id"], rows[-2]["id"]])
    assert back["prompt"] == back["text"] == "the sat"


async def test_what_tokenize_at_the_root_does_not_take_is_named(make_embedder: Any, refused: Any) -> None:
    make_embedder()
    for body, param in (
        ({}, "text"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "text": "a"}, "prompt"),
        ({"inputs": "a", "prompt": "a"}, "prompt"),
        ({"prompt": "a", "chat_template": "x"}, "chat_template"),
    ):
        assert (await refused("/tokenize", **body))["param"] == param, body
