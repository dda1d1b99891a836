"""What a folder is described as, by its JSON files alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.declared_rules import DeclaredRules
from model.description import describe, fingerprint
from model.errors import CheckpointError, UnsupportedArchitectureError

DATA = Path(__file__).parents[3].parent / "shared" / "data"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(config, **{"file.json": content})`: a folder with these files."""

    def write(config: dict[str, Any], files: dict[str, Any] | None = None) -> Path:
        for name, content in {"config.json": config, **(files or {})}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_a_causal_model_does_every_task_that_prompting_can(make: Make) -> None:
    found = describe(make(LLAMA))
    assert (found.network, found.head, found.architecture) == ("decoder", "language_model", "LlamaForCausalLM")
    assert found.tasks == ("generate", "classify", "sentiment", "summarize", "translate", "answer")
    assert (found.context_length, found.vocab_size) == (64, 50)
    assert found.labels == ()


@pytest.mark.parametrize(
    ("config", "files", "ends"),
    [
        ({}, {}, (2,)),
        ({"model_type": "starcoder2"}, {}, ()),
        ({"model_type": "glm4", "vocab_size": 151330}, {}, (151329,)),
        ({"eos_token_id": None}, {}, ()),
        ({}, {"generation_config.json": {"eos_token_id": None}}, ()),
        ({}, {"generation_config.json": {"eos_token_id": 5}}, (5,)),
    ],
)
def test_a_config_that_names_no_end_of_a_text_has_that_of_its_class(
    make: Make, config: dict[str, Any], files: dict[str, Any], ends: tuple[int, ...]
) -> None:
    """Unless it says that there is none, and as far as there are such tokens."""
    plain = {key: value for key, value in LLAMA.items() if key != "eos_token_id"}
    assert describe(make(plain | config, files)).eos_ids == ends


def test_rules_that_a_decoder_declares_are_kept_and_what_cannot_be_done_is_said(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """`bad_words_ids` and their like were dropped without a word."""
    declared = {
        "eos_token_id": 2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [7],
        "bad_words_ids": [[2], [5], [8, 9]],
        "min_new_tokens": 4,
        "forced_eos_token_id": [2],
        "num_beams": 1,
        "begin_suppress_tokens": [11],
    }
    found = describe(make(LLAMA, {"generation_config.json": declared})).declared_rules
    assert found == DeclaredRules(
        no_repeat_ngram_size=3,
        suppressed_ids=(5, 7),
        banned_sequences=((8, 9),),
        min_new_tokens=4,
        forced_eos_id=2,
    )
    assert "begin_suppress_tokens: [11]" in caplog.text
    assert "num_beams" not in caplog.text
    assert DeclaredRules(min_length=10).min_tokens(4) == 6
    with pytest.raises(CheckpointError, match="generation_config"):
        describe(make(LLAMA, {"generation_config.json": {"bad_words_ids": [5]}}))


def test_a_limit_that_is_not_reached_and_a_choice_of_positions_are_said(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert describe(make(LLAMA), max_model_len=100).context_length == 64
    assert "of the 100 tokens that are allowed for it can hold 64" in caplog.text
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = LLAMA | {"architectures": ["Phi3ForCausalLM"], "rope_scaling": rope, "original_max_position_embeddings": 32}
    for limit, which in ((None, "long"), (32, "short")):
        caplog.clear()
        describe(make(phi), max_model_len=limit)
        assert f"LongRoPE's {which} factors" in caplog.text


TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}


@pytest.mark.parametrize("dense", [[], [{"type": "pylate.models.Dense.Dense", "path": "1_Dense"}]])
def test_a_vector_per_token_is_refused(make: Make, dense: list[dict[str, str]]) -> None:
    """ColBERT's folders gave something that was no vector of the text."""
    folder = make(BERT | {"architectures": ["BertModel"]}, {"modules.json": [TRANSFORMER, *dense]})
    (folder / "1_Dense").mkdir()
    sizes = {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(UnsupportedArchitectureError, match="no Pooling"):
        describe(folder)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (BERT, "BertModel"),
        (BERT | {"model_type": "deberta-v2"}, "DebertaV2Model"),
        (BERT | {"model_type": "xlm-roberta"}, "XLMRobertaModel"),
        (LLAMA, "LlamaForCausalLM"),
        (LLAMA | {"model_type": "t5", "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 2}, "T5For"),
    ],
)
def test_a_config_without_a_class_means_that_of_its_type(make: Make, config: dict[str, Any], architecture: str) -> None:
    """microsoft/deberta-v3-base names none."""
    found = describe(make({**config, "architectures": None, "decoder_start_token_id": 0}))
    assert found.architecture.startswith(architecture)


def test_a_class_without_a_head_means_the_language_model_where_there_is_but_one(make: Make) -> None:
    """facebook/bart-base."""
    found = describe(make({"architectures": ["BartModel"], "model_type": "bart", "vocab_size": 50}))
    assert (found.head, found.network) == ("language_model", "encoder_decoder")


def test_a_second_layout_of_the_weights_is_not_counted(make: Make) -> None:
    folder = make(LLAMA)
    save_file({"a": np.zeros(10, np.float32)}, folder / "model.safetensors")
    alone = describe(folder).weight_bytes
    save_file({"a": np.zeros(10, np.float32)}, folder / "consolidated.safetensors")
    assert describe(folder).weight_bytes == alone


def test_code_of_a_checkpoints_own_is_not_run_and_that_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    describe(make(LLAMA))
    assert not caplog.records
    describe(make(LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherModel"}}))
    assert "modeling_other.OtherModel" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("chat_template.json", {"chat_template": "{{ messages }}"}),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "{{ messages }}"}]}),
    ],
)
def test_chat_needs_a_template_wherever_it_is_kept(make: Make, name: str, content: Any) -> None:
    assert "chat" in describe(make(LLAMA, {name: content})).tasks
    if name.endswith(".json"):
        assert "chat" not in describe(make(LLAMA, {name: {"other": 1}})).tasks


def test_generation_config_has_the_last_word_on_ids_and_keeps_its_other_defaults(make: Make) -> None:
    generation = {"eos_token_id": [7, 2], "pad_token_id": 3, "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    found = describe(make(LLAMA, {"generation_config.json": {**generation, "transformers_version": "5.0"}}))
    assert (found.eos_ids, found.bos_id, found.pad_id) == ((7, 2), 1, 3)
    assert found.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "do_sample": True}


def test_ids_of_a_nested_text_config_are_found(make: Make) -> None:
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"eos_token_id": 9}}
    found = describe(make(nested))
    assert found.eos_ids == (9,)
    assert found.context_length == 131072


@pytest.mark.parametrize(
    ("labels", "head", "tasks"),
    [
        (["ham", "spam"], "sequence_classification", {"classify"}),
        (["NEGATIVE", "POSITIVE"], "sequence_classification", {"classify", "sentiment"}),
        (["contradiction", "neutral", "entailment"], "sequence_classification", {"classify", "zero_shot"}),
        (["LABEL_0"], "cross_encoder", {"rerank", "similarity"}),
    ],
)
def test_the_labels_of_a_classifier_say_what_it_can_do(
    make: Make, labels: list[str], head: str, tasks: set[str]
) -> None:
    found = describe(make({**BERT, "id2label": {str(index): label for index, label in enumerate(labels)}}))
    assert (found.network, found.head) == ("encoder", head)
    assert tasks <= set(found.tasks)
    assert found.labels == tuple(labels)


def test_labels_are_in_the_order_of_their_numbers(make: Make) -> None:
    names = {str(index): f"name {index}" for index in (10, 9, 2, 1, 0, 3, 4, 5, 6, 7, 8)}
    assert describe(make({**BERT, "id2label": names})).labels == tuple(f"name {index}" for index in range(11))


def test_a_classifier_without_label_names_has_the_usual_two(make: Make) -> None:
    assert describe(make(BERT)).labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("architecture", "head", "task"),
    [
        ("BertModel", "embedding", "embed"),
        ("BertForTokenClassification", "token_classification", "token_classify"),
        ("BertForQuestionAnswering", "question_answering", "answer"),
    ],
)
def test_an_encoder_is_its_head(make: Make, architecture: str, head: str, task: str) -> None:
    found = describe(make({**BERT, "architectures": [architecture]}))
    assert found.head == head
    assert task in found.tasks


def test_a_sentence_transformers_folder_embeds_whatever_its_config_names(make: Make) -> None:
    modules = [TRANSFORMER, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    found = describe(make({**BERT, "architectures": ["BertForMaskedLM"]}, {"modules.json": json.dumps(modules)}))
    assert found.head == "embedding"
    assert {"embed", "similarity", "rerank"} <= set(found.tasks)


def test_a_limit_lowers_the_context(make: Make) -> None:
    assert describe(make(LLAMA), 32).context_length == 32
    assert describe(make(LLAMA), 4096).context_length == 64


def test_the_version_changes_with_config_tokenizer_or_weights_and_only_then(make: Make) -> None:
    folder = make(LLAMA, {"tokenizer.json": {"a": 1}})
    tensors = {f"layer {index}": np.zeros(50_000, np.float32) for index in range(3)}
    save_file(tensors, folder / "model.safetensors")
    first = fingerprint(folder)
    assert fingerprint(folder) == first == describe(folder).version
    (folder / "README.md").write_text("new words")
    assert fingerprint(folder) == first
    seen = {first}
    for name in tensors:
        tensors[name] = tensors[name] + np.float32(1e-6)
        save_file(tensors, folder / "model.safetensors")
        seen.add(fingerprint(folder))
    make(LLAMA, {"tokenizer.json": {"a": 2}})
    seen.add(fingerprint(folder))
    make({**LLAMA, "rope_theta": 1.0})
    seen.add(fingerprint(folder))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("generation_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": "two"}'),
        ("tokenizer_config.json", "nonsense"),
    ],
)
def test_a_broken_file_is_named(make: Make, file: str, content: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        describe(make(LLAMA, {file: content}))
    assert caught.value.file == file


def test_a_quantization_that_is_not_read_gets_advice_rather_than_a_missing_tensor(make: Make) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"quantized \(mxfp4\) cannot be read, only those of awq, "):
        describe(make({**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}))


def test_a_quantization_that_is_read_changes_nothing_of_a_description(make: Make) -> None:
    quantized = {**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    assert describe(make(quantized)).tasks == describe(make(LLAMA)).tasks


def test_a_description_does_not_change(make: Make) -> None:
    found = describe(make(LLAMA))
    with pytest.raises(FrozenInstanceError):
        found.version = "other"  # type: ignore[misc]


def test_describing_imports_no_torch() -> None:
    code = (
        "import sys, model.description, model.hub; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stories260k_is_a_llama_of_512_tokens() -> None:
    folder = DATA / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    found = describe(folder)
    assert (found.architecture, found.context_length, found.vocab_size) == ("LlamaForCausalLM", 512, 512)
    assert (found.eos_ids, found.bos_id, found.pad_id) == ((1, 2), 1, 0)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}"])
def test_broken_weights_do_not_stop_a_description(make: Make, content: bytes) -> None:
    folder = make(LLAMA)
    (folder / "model.safetensors").write_bytes(content)
    assert describe(folder).version == fingerprint(folder)
