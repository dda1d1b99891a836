"""Texts that go through a chat template are scored and embedded as by sentence-transformers, however they are cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer import modules

from model.errors import CheckpointError

FLAT = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}cat sat{% endif %}"
)
STRUCTURED = FLAT.replace("message['content']", "message.content[0].text")
DOCUMENTS = ["sat on the mat", "very bad film and the dog ran to the far hill", "not", "good good dog"]
LONG = "the cat sat on the mat and ran to the far hill " * 8
CLOSE = {"abs": 2e-5}


@pytest.fixture
def make_decoder(make_model: Any) -> Callable[..., modules.Transformer]:
    """make_decoder(class name, template, settings): a decoder with a chat template as the first module."""

    def make(kind: str, template: str, **settings: Any) -> modules.Transformer:
        folder, _ = make_model(kind, f"base-{kind}", num_key_value_heads=2)
        (folder / "chat_template.jinja").write_text(template)
        return modules.Transformer(str(folder), **settings)

    return make


@pytest.fixture
def make_judge(make_decoder: Any, tmp_path: Path) -> Callable[..., CrossEncoder]:
    """make_judge(template, ...): a reranker by the logits of two answers, and its folder "judge"."""

    def make(template: str = FLAT, **settings: Any) -> CrossEncoder:
        kwargs = {"chat_template": {"add_generation_prompt": True}}
        transformer = make_decoder(
            "LlamaForCausalLM", template, transformer_task="text-generation", processing_kwargs=kwargs
        )
        model = CrossEncoder(
            modules=[transformer, LogitScore(true_token_id=6, false_token_id=7)], device="cpu", **settings
        )
        model.save_pretrained(str(tmp_path / "judge"), create_model_card=False)
        return model

    return make


@pytest.mark.parametrize("template", [FLAT, STRUCTURED], ids=["flat", "structured"])
async def test_a_decoder_reads_pairs_through_its_template(
    template: str, make_judge: Any, engine: Any, post: Any, tmp_path: Path
) -> None:
    """The template and the default prompt were left out: scores were of other texts than those trained on."""
    reference = make_judge(template, prompts={"task": "represent this film"}, default_prompt_name="task")
    engine.load(tmp_path / "judge")
    expected = reference.predict([("the cat", document) for document in DOCUMENTS]).tolist()
    answer = await post("/v1/rerank", query="the cat", documents=DOCUMENTS)
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    assert [found[index] for index in range(len(DOCUMENTS))] == pytest.approx(expected, **CLOSE)


async def test_what_the_template_writes_last_is_kept_when_a_document_is_cut(
    make_judge: Any, engine: Any, post: Any, tmp_path: Path
) -> None:
    reference = make_judge()
    engine.load(tmp_path / "judge")
    answer = await post("/v1/rerank", query="the cat", documents=[LONG], truncate=True)
    expected = reference.predict([("the cat", LONG)]).tolist()
    assert [entry["relevance_score"] for entry in answer["results"]] == pytest.approx(expected, **CLOSE)


async def test_an_embedder_reads_texts_through_its_template(
    make_decoder: Any, engine: Any, post: Any, tmp_path: Path
) -> None:
    transformer = make_decoder("LlamaModel", FLAT)
    prompts = {"query": "represent this film"}
    parts = [transformer, modules.Pooling(32, pooling_mode="lasttoken")]
    reference = SentenceTransformer(modules=parts, device="cpu", prompts=prompts)
    reference.save(str(tmp_path / "embedder"), create_model_card=False)
    engine.load(tmp_path / "embedder")
    for settings, texts in (({}, DOCUMENTS), ({"prompt_name": "query"}, [*DOCUMENTS, LONG])):
        answer = await post("/v1/embeddings", input=texts, truncate=True, **settings)
        found = torch.tensor([entry["embedding"] for entry in answer["data"]])
        expected = torch.from_numpy(reference.encode(texts, **settings))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


async def test_the_default_prompt_of_a_cross_encoder_goes_before_the_query(
    make_reranker: Any, engine: Any, post: Any, tmp_path: Path
) -> None:
    base = CrossEncoder(str(make_reranker()), device="cpu", prompts={"ask": "query : "}, default_prompt_name="ask")
    base.save_pretrained(str(tmp_path / "prompted"), create_model_card=False)
    engine.load(tmp_path / "prompted")
    expected = base.predict([("the cat", document) for document in DOCUMENTS]).tolist()
    answer = await post("/v1/rerank", model="prompted", query="the cat", documents=DOCUMENTS)
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    assert [found[index] for index in range(len(DOCUMENTS))] == pytest.approx(expected, **CLOSE)
    alike = await post("/v1/similarity", model="prompted", source="the cat", targets=DOCUMENTS)
    assert [entry["score"] for entry in alike["data"]] == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize(
    ("template", "changes", "why"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", {}, "'query' and 'document'"),
        (FLAT + "{{ task }}", {}, "'task'"),
        (FLAT, {"query_length": 32}, "query_length"),
        (FLAT, {"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs"),
    ],
)
def test_what_the_template_or_its_settings_leave_open_is_refused(
    template: str, changes: dict[str, Any], why: str, make_judge: Any, engine: Any, tmp_path: Path
) -> None:
    make_judge(template)
    path = tmp_path / "judge" / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=why):
        engine.load(tmp_path / "judge")
