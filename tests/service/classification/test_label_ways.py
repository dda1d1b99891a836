"""Labels through a causal LM, an embedding checkpoint, a task head; and which of the ways is taken."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

TEXTS = ["the cat sat on the mat", "a very good film and a bad dog"]
LABELS = ["food", "very bad politics", "sports"]
LLAMA = {"num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 1}


async def classify(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def scores(entry: dict[str, Any]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in entry["labels"]}


def softmax(logits: Any) -> Any:
    powers = np.exp(np.asarray(logits) - np.max(logits))
    return powers / powers.sum()


def mean_logprob(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, label: str) -> float:
    """Of the label's tokens after the text and the template, without the closing special token."""
    own = len(tokenizer(label, add_special_tokens=False).input_ids)
    ids = tokenizer(f"{text}\nThis example is {label}").input_ids[:-1]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(np.mean([float(logprobs[n - 1, ids[n]]) for n in range(len(ids) - own, len(ids))]))


@pytest.mark.parametrize("multi_label", [False, True])
async def test_a_causal_lm_scores_labels_by_their_calibrated_likelihood(
    multi_label: bool, make_model: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, model = make_model("LlamaForCausalLM", **LLAMA)
    engine.load(folder)
    answer = await classify(client, input=TEXTS, labels=LABELS, multi_label=multi_label)
    assert answer["method"] == "likelihood"
    for text, entry in zip(TEXTS, answer["data"], strict=True):
        logits = np.array(
            [mean_logprob(model, tokenizer, text, x) - mean_logprob(model, tokenizer, "N/A", x) for x in LABELS]
        )
        expected = 1 / (1 + np.exp(-logits)) if multi_label else softmax(logits)
        assert [scores(entry)[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-4)


async def test_labels_of_one_text_share_the_blocks_of_its_prompt(
    make_model: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_model("LlamaForCausalLM", **LLAMA)[0])
    await classify(client, input=TEXTS[1], labels=LABELS)
    for of_text in (engine.generated[:3], engine.generated[3:]):
        shared = {tuple(request.prompt_ids[: request.sampling.prompt_logprobs_start]) for request in of_text}
        assert len(shared) == 1
    assert sorted(engine.num_cached)[:2] == [0, 0]
    assert all(cached > 0 for cached in sorted(engine.num_cached)[2:])


async def test_a_long_text_before_labels_is_cut_at_its_end(
    make_model: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_model("LlamaForCausalLM", **LLAMA)[0])
    long = "the cat sat on the mat and " * 20
    refused = await client.post("/v1/classify", json={"input": long, "labels": LABELS})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    del engine.generated[:]
    answer = await classify(client, input=long, labels=LABELS, truncate=True)
    lengths = [len(request.prompt_ids) for request in engine.generated[3:]]
    assert max(lengths) == 64
    assert answer["data"][0]["truncated"]
    starts = {tuple(request.prompt_ids[: request.sampling.prompt_logprobs_start]) for request in engine.generated[3:]}
    assert len(starts) == 1


async def test_an_lm_that_gives_nan_for_a_text_fails_that_text_alone(
    make_model: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, model = make_model("LlamaForCausalLM", **LLAMA)
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("poison")] = float("nan")
    model.save_pretrained(folder)
    engine.load(folder)
    answer = await classify(client, input=[TEXTS[0], "poison"], labels=LABELS)
    assert answer["data"][0]["label"] in LABELS
    assert answer["data"][1]["error"]["code"] == "generation_failed"


async def test_an_embedder_scores_labels_by_their_cosine(
    make_model: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_model("BertModel")[0])
    answer = await classify(client, input=TEXTS, labels=LABELS)
    assert answer["method"] == "similarity"
    hypotheses = [f"This example is {label}." for label in LABELS]
    vectors = (await client.post("/v1/embeddings", json={"input": [*TEXTS, *hypotheses]})).json()["data"]
    rows = np.array([entry["embedding"] for entry in vectors])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for row, entry in zip(rows, answer["data"], strict=False):
        expected = softmax(20 * (rows[len(TEXTS) :] @ row))
        assert [scores(entry)[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-4)
    several = await classify(client, input=TEXTS, labels=LABELS, multi_label=True)
    assert several["activation"] == "sigmoid"


def add_head(folder: Path, name: str, input: str, labels: list[str], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weight, bias = torch.randn(len(labels), 32, generator=generator), torch.randn(len(labels), generator=generator)
    place = folder / "heads" / name
    place.mkdir(parents=True)
    config = {"kind": "classification", "input": input, "labels": labels, "max_length": 64, **more}
    (place / "config.json").write_text(json.dumps(config))
    save_file({"weight": weight, "bias": bias}, place / "model.safetensors")
    return weight, bias


@pytest.mark.parametrize("reads", ["cls", "embedding"])
async def test_a_task_head_is_a_linear_map_of_the_shared_body(
    reads: str, make_model: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, model = make_model("BertModel")
    weight, bias = add_head(folder, "intent", reads, ["ask", "buy", "go"], temperature=2.0)
    engine.load(folder)
    answer = await classify(client, input=TEXTS, head="intent")
    assert answer["method"] == "head"
    for text, entry in zip(TEXTS, answer["data"], strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        state = states[0] if reads == "cls" else states.mean(dim=0)
        logits = (weight @ state + bias).numpy()
        assert [scores(entry)[x] for x in ("ask", "buy", "go")] == pytest.approx(softmax(logits).tolist(), abs=1e-4)
        assert entry["confidence"] == pytest.approx(float(softmax(logits / 2).max()), abs=1e-4)
        assert entry["calibrated"] is True


@pytest.mark.parametrize(
    ("path", "text"), [("/predict", "inputs"), ("/classify", "input"), ("/hf/text-classification", "inputs")]
)
async def test_where_a_body_has_no_place_for_a_head_the_advice_is_the_address(
    make_model: Any, engine: Any, client: httpx.AsyncClient, path: str, text: str
) -> None:
    """It was to name a head, or to give `labels`; these bodies refuse both as fields that are not there."""
    folder, _ = make_model("BertModel", "encoder")
    add_head(folder, "intent", "cls", ["ask", "buy", "go"])
    add_head(folder, "mood", "cls", ["up", "down"])
    engine.load(folder)
    error = (await client.post(path, json={text: "good"})).json()["error"]
    assert error["param"] == "head"
    assert error["message"].startswith("which head of encoder? it has: intent, mood")
    assert "labels" not in error["message"]
    advised = error["message"].rpartition(": ")[2]
    assert (await client.post(advised, json={text: "good"})).status_code == 200
    assert "`labels`" in (await client.post("/v1/classify", json={"input": "good"})).json()["error"]["message"]


async def test_models_tell_their_heads_and_the_labels_of_each(
    make_model: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, _ = make_model("BertModel", "encoder")
    add_head(folder, "mood", "cls", ["up", "down"])
    engine.load(folder)
    card = (await client.get("/v1/models/encoder")).json()
    assert (card["labels"], card["heads"]) == ([], {"mood": ["up", "down"]})


async def test_head_and_embedding_of_a_text_do_not_disturb_each_other(
    make_model: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, _ = make_model("BertModel")
    engine.load(folder)
    before = (await client.post("/v1/embeddings", json={"input": TEXTS})).json()["data"]
    add_head(folder, "intent", "cls", ["ask", "buy"])
    engine.load(folder, "with-head")
    await classify(client, input=TEXTS, head="intent", model="with-head")
    after = (await client.post("/v1/embeddings", json={"input": TEXTS, "model": "with-head"})).json()["data"]
    assert after == before


@pytest.mark.parametrize(
    ("small_bytes", "with_a_language_model"), [(0, ("lm", "likelihood")), (1 << 20, ("embedder", "similarity"))]
)
async def test_the_way_is_the_best_that_is_loaded(
    make_model: Any,
    make_classifier: Any,
    engine: Any,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    small_bytes: int,
    with_a_language_model: tuple[str, str],
) -> None:
    """A language model too small to follow an instruction comes after an embedding checkpoint."""
    monkeypatch.setattr("model.description.SMALL_BYTES", small_bytes)
    engine.load(make_model("BertModel", "embedder")[0])
    first = await classify(client, input="x", labels=LABELS)
    engine.load(make_model("LlamaForCausalLM", "lm", **LLAMA)[0])
    second = await classify(client, input="x", labels=LABELS)
    engine.load(make_classifier(["contradiction", "entailment"], "nli")[0])
    third = await classify(client, input="x", labels=LABELS)
    ways = [(answer["model"], answer["method"]) for answer in (first, second, third)]
    assert ways == [("embedder", "similarity"), with_a_language_model, ("nli", "nli")]
    named = await classify(client, input="x", labels=LABELS, model="embedder")
    assert named["method"] == "similarity"


async def test_a_model_that_cannot_is_told_apart_with_advice(
    make_model: Any, make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_model("BertForTokenClassification", "tagger", num_labels=3)[0])
    engine.load(make_model("BertModel", "embedder")[0])
    engine.load(make_classifier(["ham", "spam"], "filter")[0])
    tagger = await client.post("/v1/classify", json={"input": "x", "model": "tagger"})
    assert tagger.status_code == 400
    error = tagger.json()["error"]
    assert (error["code"], error["param"]) == ("task_not_supported", "model")
    assert "token_classify" in error["message"]
    assert "filter" in error["message"]
    embedder = await client.post("/v1/classify", json={"input": "x", "model": "embedder"})
    assert embedder.json()["error"]["param"] == "labels"
    labelled = await client.post("/v1/classify", json={"input": "x", "model": "filter", "labels": LABELS})
    assert labelled.json()["error"]["param"] == "labels"
    assert "ham, spam" in labelled.json()["error"]["message"]


async def test_abstention_withholds_the_label_and_keeps_the_scores(
    make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_classifier(["a", "b", "c"])[0])
    [sure] = (await classify(client, input=TEXTS[0], abstain_below=0.0))["data"]
    [unsure] = (await classify(client, input=TEXTS[0], abstain_below=1.0))["data"]
    assert (sure["label"], sure["abstained"]) == (sure["labels"][0]["label"], False)
    assert (unsure["label"], unsure["abstained"]) == (None, True)
    assert unsure["labels"] == sure["labels"]


async def test_a_calibration_in_the_folder_tempers_the_confidence_alone(
    make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    folder, _ = make_classifier(["a", "b", "c"])
    engine.load(folder, "plain")
    (folder / "calibration.json").write_text(json.dumps({"version": 1, "temperature": {"classifier": 4.0}}))
    engine.load(folder, "calibrated")
    [plain] = (await classify(client, input=TEXTS[0], model="plain", raw_scores=True))["data"]
    [tempered] = (await classify(client, input=TEXTS[0], model="calibrated", raw_scores=True))["data"]
    logits = [row["score"] for row in plain["labels"]]
    assert (plain["calibrated"], tempered["calibrated"]) == (False, True)
    assert plain["confidence"] == pytest.approx(softmax(logits)[0])
    assert tempered["confidence"] == pytest.approx(softmax(np.array(logits) / 4)[0])
    assert tempered["labels"] == plain["labels"]
