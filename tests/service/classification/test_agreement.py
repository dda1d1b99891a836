"""Scores, labels and their order are those of transformers' pipelines on the same weights."""

from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast, pipeline

TEXTS = ["the cat sat on the mat", "a very good film", "not this", "bad dog ran to the far hill and sat"]
TOPICS = ["sports", "politics", "food"]


async def classify(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def check(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (["ham", "spam"], None),
        (["joy", "anger", "fear", "love"], "single_label_classification"),
        (["joy", "anger", "fear", "love"], "multi_label_classification"),
        (["price", "weight"], "regression"),
        (["relevant"], None),
        (["grade"], "regression"),
    ],
)
async def test_own_labels_score_as_in_the_text_classification_pipeline(
    labels: list[str], problem_type: str | None, make_classifier: Any, tokenizer: PreTrainedTokenizerFast, engine: Any,
    client: httpx.AsyncClient,
) -> None:  # fmt: skip
    """text-embeddings-inference and KServe do not look at `problem_type`: many labels get a softmax whatever it is."""
    folder, model = make_classifier(labels, problem_type=problem_type)
    engine.load(folder)
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer)(TEXTS, top_k=None)
    answer = await classify(client, input=TEXTS)
    assert answer["method"] == "classifier"
    for index, (entry, wanted) in enumerate(zip(answer["data"], expected, strict=True)):
        assert entry["index"] == index
        check(entry["labels"], wanted)
        assert (entry["label"], entry["score"]) == (entry["labels"][0]["label"], entry["labels"][0]["score"])


async def test_pairs_score_as_in_the_pipeline(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient
) -> None:
    """To text-embeddings-inference `["a", "b"]` is one pair; here it is two texts, and a pair is a list of its own."""
    folder, model = make_classifier(["same", "other"])
    engine.load(folder)
    reference = pipeline("text-classification", model=model, tokenizer=tokenizer)
    answer = await classify(client, input=[["the cat", "a dog"], ["good film", "bad film"]])
    pairs = [{"text": "the cat", "text_pair": "a dog"}, {"text": "good film", "text_pair": "bad film"}]
    for entry, wanted in zip(answer["data"], reference(pairs, top_k=None), strict=True):
        check(entry["labels"], wanted)
    texts = await classify(client, input=["the cat", "a dog"])
    for entry, wanted in zip(texts["data"], reference(["the cat", "a dog"], top_k=None), strict=True):
        check(entry["labels"], wanted)


async def test_raw_scores_are_the_logits(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient
) -> None:
    """infinity takes `raw_scores` and gives probabilities all the same."""
    folder, model = make_classifier(["joy", "anger", "fear"])
    engine.load(folder)
    reference = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")
    answer = await classify(client, input=TEXTS[0], raw_scores=True)
    check(answer["data"][0]["labels"], reference(TEXTS[0], top_k=None))
    plain = await classify(client, input=TEXTS[0])
    assert answer["data"][0]["confidence"] == plain["data"][0]["confidence"]


async def test_top_k_cuts_the_list_and_not_the_uncertainty(
    make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_classifier(["a", "b", "c", "d"])[0])
    whole, cut = [(await classify(client, input=TEXTS[0], **more))["data"][0] for more in ({}, {"top_k": 2})]
    assert cut["labels"] == whole["labels"][:2]
    assert {key: cut[key] for key in ("margin", "entropy")} == {key: whole[key] for key in ("margin", "entropy")}


NLI_LABELS = [
    ["contradiction", "neutral", "entailment"],
    ["entailment", "neutral", "contradiction"],
    ["ENTAILS", "not"],
]


@pytest.mark.parametrize("nli", NLI_LABELS)
@pytest.mark.parametrize(("labels", "multi_label"), [(TOPICS, False), (TOPICS, True), (TOPICS[:1], False)])
async def test_zero_shot_scores_as_in_the_pipeline(
    labels: list[str], multi_label: bool, nli: list[str], make_classifier: Any, tokenizer: PreTrainedTokenizerFast,
    engine: Any, client: httpx.AsyncClient,
) -> None:  # fmt: skip
    folder, model = make_classifier(nli)
    engine.load(folder)
    template = "this text is {} ."
    expected = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)(
        TEXTS, labels, hypothesis_template=template, multi_label=multi_label
    )
    answer = await classify(client, input=TEXTS, labels=labels, multi_label=multi_label, hypothesis_template=template)
    assert answer["method"] == "nli"
    for entry, wanted in zip(answer["data"], expected, strict=True):
        rows = [
            {"label": label, "score": score} for label, score in zip(wanted["labels"], wanted["scores"], strict=True)
        ]
        check(entry["labels"], rows)


async def test_all_pairs_of_a_zero_shot_request_are_one_engine_call(
    make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_classifier(NLI_LABELS[0])[0])
    await classify(client, input=TEXTS, labels=TOPICS)
    [request] = engine.encoded
    assert len(request.inputs) == len(TEXTS) * len(TOPICS)


async def test_a_long_premise_is_cut_and_the_hypothesis_kept(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, model = make_classifier(NLI_LABELS[0])
    engine.load(folder)
    long = "the cat sat on the mat and " * 20
    refused = await client.post("/v1/classify", json={"input": long, "labels": TOPICS})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["param"] == "input"
    expected = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)(long, TOPICS)
    answer = await classify(client, input=long, labels=TOPICS, truncate=True)
    [entry] = answer["data"]
    check(
        entry["labels"], [{"label": a, "score": b} for a, b in zip(expected["labels"], expected["scores"], strict=True)]
    )
    assert (entry["truncated"], entry["kept_tokens"]) == (True, 64)
    assert answer["usage"]["truncated_tokens"] > 0


async def test_logits_far_apart_overflow_nowhere(make_classifier: Any, engine: Any, client: httpx.AsyncClient) -> None:
    """text-embeddings-inference takes off the logit of the largest size, not the largest: [-95, 1] gives it NaN."""
    folder, _ = make_classifier(["a", "b", "c"], scale=60.0)
    engine.load(folder)
    for entry in (await classify(client, input=TEXTS))["data"]:
        raw = [row["score"] for row in (await classify(client, input=TEXTS, raw_scores=True))["data"][0]["labels"]]
        assert max(raw) - min(raw) > 100
        assert sum(row["score"] for row in entry["labels"]) == pytest.approx(1.0)


async def test_a_poisoned_text_fails_alone(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, model = make_classifier(["a", "b"])
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("poison")] = float("nan")
    model.save_pretrained(folder)
    engine.load(folder)
    answer = await classify(client, input=[TEXTS[0], "poison", TEXTS[1]])
    good = await classify(client, input=[TEXTS[0], TEXTS[1]])
    assert "not finite" in answer["data"][1]["error"]["message"]
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    for ours, wanted in zip((answer["data"][0], answer["data"][2]), good["data"], strict=True):
        check(ours["labels"], wanted["labels"])
    alone = await client.post("/v1/classify", json={"input": "poison"})
    assert alone.status_code == 500
    assert alone.json()["error"]["param"] == "input"
