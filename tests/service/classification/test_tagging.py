"""`/v1/tag` and `/hf/token-classification`: the parts, labels and scores of transformers' pipeline."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from huggingface_hub import AsyncInferenceClient
from transformers import PreTrainedTokenizerFast, pipeline

from model.training.heads import Head, HeadConfig, save_head
from service.app import create_app
from service.settings import Settings

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
TEXTS = ["the catzz sat on the mat and ran", "A very badly filmed dog ran to 12 hills!", "good ñ politics"]


@pytest.fixture
def app(engine: Any) -> FastAPI:
    return create_app(Settings(), engine)


@pytest.fixture
def tagger(make_model: Any, engine: Any) -> Any:
    names = dict(enumerate(LABELS))
    folder, model = make_model(
        "BertForTokenClassification", "tagger", id2label=names, label2id={name: id for id, name in names.items()}
    )
    engine.load(folder)
    return model


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("ignored", [["O"], [], ["PER", "B-PER"]])
async def test_parts_are_those_of_the_pipeline(
    tagger: Any, tokenizer: PreTrainedTokenizerFast, client: httpx.AsyncClient, aggregation: str, ignored: list[str]
) -> None:
    """A checkpoint that classifies tokens was loaded, listed with its task, and could be asked for nothing."""
    reference = pipeline("token-classification", model=tagger, tokenizer=tokenizer, aggregation_strategy=aggregation)
    expected = reference(TEXTS, ignore_labels=ignored)
    body = {"input": TEXTS, "aggregation": aggregation, "ignore_labels": ignored}
    answer = (await client.post("/v1/tag", json=body)).json()
    assert sum(map(len, expected)) > 0
    for item, parts, text in zip(answer["data"], expected, TEXTS, strict=True):
        name = "entity" if aggregation == "none" else "entity_group"
        assert [(part["label"], part["start"], part["end"]) for part in item["parts"]] == [
            (part[name], part["start"], part["end"]) for part in parts
        ]
        assert [part["score"] for part in item["parts"]] == pytest.approx([part["score"] for part in parts], abs=1e-5)
        assert [part["text"] for part in item["parts"]] == [text[part["start"] : part["end"]] for part in parts]
        assert [part["word"] for part in item["parts"]] == [part["word"] for part in parts]


async def test_a_head_on_an_embedders_body_answers_as_a_checkpoint_of_its_own(
    tagger: Any, tokenizer: PreTrainedTokenizerFast, engine: Any, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """The shipped encoder has its names so; its temperature divides the logits."""
    config = HeadConfig("token", "tokens", tuple(LABELS), 64)
    head, folder = Head(config, 32), tmp_path / "embedder"
    head.load_state_dict({"weight": tagger.classifier.weight.half(), "bias": tagger.classifier.bias.half()})
    tagger.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    save_head(head, folder / "heads" / "parts", temperature=2.0)
    engine.load(folder)
    with torch.no_grad():
        tagger.classifier.weight.copy_(head.weight / 2)
        tagger.classifier.bias.copy_(head.bias / 2)
    expected = pipeline("token-classification", model=tagger, tokenizer=tokenizer)(TEXTS, ignore_labels=[])
    body = {"model": "embedder", "input": TEXTS, "aggregation": "none", "ignore_labels": []}
    answer = (await client.post("/v1/tag", json=body)).json()
    for item, parts in zip(answer["data"], expected, strict=True):
        assert [part["label"] for part in item["parts"]] == [part["entity"] for part in parts]
        assert [part["score"] for part in item["parts"]] == pytest.approx([part["score"] for part in parts], abs=1e-5)


async def test_inference_client_reads_the_parts(tagger: Any, tokenizer: PreTrainedTokenizerFast, base_url: str) -> None:
    expected = pipeline("token-classification", model=tagger, tokenizer=tokenizer)(TEXTS[0], ignore_labels=["MISC"])
    grouped = pipeline("token-classification", model=tagger, tokenizer=tokenizer, aggregation_strategy="simple")(
        TEXTS[0]
    )
    async with AsyncInferenceClient(model=f"{base_url}/hf/token-classification") as hub:
        found = await hub.token_classification(TEXTS[0], ignore_labels=["MISC"])
        together = await hub.token_classification(TEXTS[0], aggregation_strategy="simple")
    assert [(part.entity, part.start, part.end) for part in found] == [
        (part["entity"], part["start"], part["end"]) for part in expected
    ]
    assert [(part.entity_group, part.word) for part in together] == [
        (part["entity_group"], part["word"]) for part in grouped
    ]


async def test_a_texts_fault_is_its_own_and_what_is_cut_is_told(
    tagger: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.poison = set(engine.models["tagger"].tokenizer.encode("poison", add_special_tokens=False))
    texts = [TEXTS[0], "the cat " * 60, "poison"]
    first, long, poisoned = (await client.post("/v1/tag", json={"input": texts})).json()["data"]
    assert "parts" in first
    assert (long["error"]["code"], poisoned["error"]["code"]) == ("context_length_exceeded", "generation_failed")
    [cut] = (await client.post("/v1/tag", json={"input": texts[1], "truncate": True})).json()["data"]
    assert (cut["truncated"], cut["kept_tokens"]) == (True, 64)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/tag", {}, "input"),
        ("/v1/tag", {"input": ["a", ""]}, "input.1"),
        ("/v1/tag", {"input": "the cat " * 60}, "input"),
        ("/v1/tag", {"input": "a", "aggregation": "some"}, "aggregation"),
        ("/v1/tag", {"input": "a", "ignore_labels": "O"}, "ignore_labels"),
        ("/v1/tag", {"input": "a", "model": "own"}, "model"),
        ("/v1/tag", {"input": "a", "top_k": 1}, "top_k"),
        ("/hf/token-classification", {"inputs": ""}, "inputs"),
        ("/hf/token-classification", {"inputs": "the cat " * 60}, "inputs"),
        ("/hf/token-classification", {"inputs": "a", "parameters": {"stride": 4}}, "parameters.stride"),
    ],
)
async def test_a_wrong_field_is_named(
    tagger: Any, make_classifier: Any, engine: Any, client: httpx.AsyncClient, path: str, body: Any, param: str
) -> None:
    engine.load(make_classifier(["a", "b"], "own")[0])
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
