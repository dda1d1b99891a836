"""What a checkpoint declares, a task changes and a request overrides, as decoding parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from model.architectures.raw import RawConfig
from model.batch import BeamParams
from model.description import describe
from model.errors import CheckpointError
from model.generation_defaults import Choices, GenerationDefaults, read_generation_defaults, sequence_to_sequence_tasks

BART_CNN = {
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "early_stopping": True,
    "eos_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "length_penalty": 2.0,
    "max_length": 142,
    "min_length": 56,
    "no_repeat_ngram_size": 3,
    "num_beams": 6,
    "pad_token_id": 1,
}
T5_TASKS = {
    "summarization": {
        "early_stopping": True,
        "length_penalty": 2.0,
        "max_length": 200,
        "min_length": 30,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "prefix": "summarize: ",
    },
    "translation_en_to_de": {"early_stopping": True, "max_length": 300, "prefix": "translate English to German: "},
}
T5_CONFIG = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "task_specific_params": T5_TASKS}


def defaults(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> GenerationDefaults:
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_generation_defaults(folder, RawConfig(config), context_length=1024)


def test_a_declared_summarizer_is_decoded_as_declared(tmp_path: Path) -> None:
    """facebook/bart-large-cnn; its lengths count the start token."""
    found = defaults(tmp_path, {"max_length": 99}, BART_CNN)
    params = found.sampling("summarization")
    assert found.decoder_prompt == [2]
    assert (params.max_tokens, params.min_tokens) == (141, 55)
    assert params.beam == BeamParams(num_beams=6, length_penalty=2.0, early_stopping=True)
    assert (params.no_repeat_ngram_size, params.forced_bos_id, params.forced_eos_id) == (3, 0, 2)
    assert (params.stop_ids, params.temperature) == ((2,), 0.0)


def test_what_nobody_says_is_what_the_pipelines_assume(tmp_path: Path) -> None:
    params = defaults(tmp_path, T5_CONFIG).sampling()
    assert params.max_tokens == 256
    assert params.min_tokens == 0
    assert params.beam == BeamParams(num_beams=4)


def test_a_task_changes_parameters_and_prefix(tmp_path: Path) -> None:
    """t5-small; a task that it does not know changes nothing."""
    found = defaults(tmp_path, T5_CONFIG)
    params = found.sampling("summarization")
    assert (params.max_tokens, params.min_tokens, params.no_repeat_ngram_size) == (199, 29, 3)
    assert params.beam == BeamParams(num_beams=4, length_penalty=2.0, early_stopping=True)
    assert found.prefix_for("summarization") == "summarize: "
    assert found.prefix_for("translation_en_to_de") == "translate English to German: "
    assert found.sampling("translation_en_to_de").max_tokens == 299
    assert found.sampling("translation_fr_to_de") == found.sampling()
    assert found.prefix_for("translation_fr_to_de") == ""


def test_the_request_has_the_last_word(tmp_path: Path) -> None:
    found = defaults(tmp_path, {}, BART_CNN)
    choices = Choices(
        max_tokens=70,
        min_tokens=3,
        num_beams=2,
        length_penalty=0.5,
        early_stopping="never",
        no_repeat_ngram_size=0,
        forced_bos_id=9,
    )
    params = found.sampling("summarization", choices)
    assert (params.max_tokens, params.min_tokens, params.no_repeat_ngram_size) == (70, 3, 0)
    assert params.beam == BeamParams(num_beams=2, length_penalty=0.5, early_stopping="never")
    assert params.forced_bos_id == 9


def test_one_beam_is_greedy_and_a_temperature_samples(tmp_path: Path) -> None:
    found = defaults(tmp_path, {}, BART_CNN)
    assert found.sampling(choices=Choices(num_beams=1)).beam is None
    sampled = found.sampling(choices=Choices(temperature=0.7, seed=5))
    assert (sampled.beam, sampled.temperature, sampled.top_k, sampled.seed) == (None, 0.7, 0, 5)
    with pytest.raises(ValueError, match="temperature 0"):
        found.sampling(choices=Choices(temperature=0.7, num_beams=4))


def test_a_declared_sampler_samples(tmp_path: Path) -> None:
    generation = {"decoder_start_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.9, "top_p": 0.8}
    params = defaults(tmp_path, {}, generation).sampling()
    assert (params.temperature, params.top_p, params.top_k, params.beam) == (0.9, 0.8, 50, None)


def test_a_short_limit_is_not_refused_for_a_declared_minimum(tmp_path: Path) -> None:
    found = defaults(tmp_path, {}, BART_CNN)
    assert found.sampling(choices=Choices(max_tokens=20)).min_tokens == 20
    with pytest.raises(ValueError, match="min_tokens is 30"):
        found.sampling(choices=Choices(max_tokens=20, min_tokens=30))


@pytest.mark.parametrize("kind", ["bart", "marian", "mbart", "m2m_100", "pegasus", "t5"])
def test_ids_that_a_config_leaves_out_are_those_of_its_class(tmp_path: Path, kind: str) -> None:
    """BART's target began with its `bos_token_id` where nothing was said, and nothing ended it."""
    theirs = AutoConfig.for_model(kind)
    start = getattr(theirs, "decoder_start_token_id", None)
    found = defaults(tmp_path, {"model_type": kind, **({} if start is not None else {"decoder_start_token_id": 3})})
    assert found.decoder_start_id == (3 if start is None else start)
    assert found.eos_ids == (theirs.eos_token_id,)
    assert found.sampling().forced_eos_id == getattr(theirs, "forced_eos_token_id", None)


def test_marians_padding_is_never_generated_and_its_end_stays_allowed(tmp_path: Path) -> None:
    config = {
        "decoder_start_token_id": 58100,
        "eos_token_id": 0,
        "bad_words_ids": [[58100], [0], [7, 8]],
        "num_beams": 6,
        "max_length": 512,
        "renormalize_logits": True,
    }
    params = defaults(tmp_path, config).sampling()
    assert params.suppressed_ids == (58100,)
    assert params.banned_sequences == ((7, 8),)
    assert params.beam == BeamParams(num_beams=6, renormalize_logits=True)
    assert params.max_tokens == 511


def test_lengths_stay_within_the_positions_there_are(tmp_path: Path) -> None:
    config = T5_CONFIG | {"max_length": 5000}
    found = read_generation_defaults(tmp_path, RawConfig(config), context_length=100)
    assert found.sampling().max_tokens == 99
    assert read_generation_defaults(tmp_path, RawConfig(T5_CONFIG), 100).sampling().max_tokens == 99


def test_parameters_that_would_change_the_output_unseen_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'encoder_repetition_penalty': 1\.5"):
        defaults(tmp_path, {}, BART_CNN | {"encoder_repetition_penalty": 1.5})


def test_blenderbot_repeats_nothing_of_the_source_unless_its_files_say_otherwise(tmp_path: Path) -> None:
    assert defaults(tmp_path, {"model_type": "blenderbot"}).sampling().encoder_no_repeat_ngram_size == 3
    config = {"model_type": "blenderbot", "encoder_no_repeat_ngram_size": 0}
    assert defaults(tmp_path, config).sampling().encoder_no_repeat_ngram_size == 0


def test_a_checkpoint_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        defaults(tmp_path, {"eos_token_id": 1})


def test_description_says_tasks_and_defaults(save_seq2seq: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = save_seq2seq("t5")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_specific_params": T5_TASKS}))
    found = describe(folder)
    assert found.network == "encoder_decoder"
    assert found.tasks == ("generate", "summarize", "translate", "answer")
    assert found.sequence_to_sequence is not None
    assert found.sequence_to_sequence.prefix_for("summarization") == "summarize: "
    assert found.sequence_to_sequence.decoder_prompt == [0]
    marian = describe(save_seq2seq("marian", bad_words_ids=[[95]])[0])
    assert marian.tasks == ("generate", "translate")
    assert marian.sequence_to_sequence is not None
    assert marian.sequence_to_sequence.sampling().suppressed_ids == (95,)


@pytest.mark.parametrize(
    ("kind", "names", "tasks"),
    [
        ("mbart", ["translation_en_to_ro"], ("generate", "translate")),
        ("mbart", ["summarization"], ("generate", "summarize")),
        ("mbart", ["summarization", "translation_en_to_ro"], ("generate", "summarize", "translate")),
        ("m2m_100", ["summarization"], ("generate", "translate")),
        ("bart", ["summarization"], ("generate", "summarize")),
    ],
)
def test_an_mbart_that_was_made_to_summarize_does(kind: str, names: list[str], tasks: tuple[str, ...]) -> None:
    raw = RawConfig({"model_type": kind, "task_specific_params": {name: {} for name in names}})
    assert sequence_to_sequence_tasks(raw) == tasks
