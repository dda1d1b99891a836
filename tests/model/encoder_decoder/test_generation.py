"""Text of encoder-decoders through scheduler and runner is what `transformers`' `generate` gives, id by id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from model.generation_defaults import Choices

SaveSeq2Seq = Callable[..., tuple[Path, PreTrainedModel]]
MakeEngine = Callable[..., Any]


def sources(lengths: list[int], eos_id: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [[*torch.randint(3, 79, (length - 1,), generator=generator).tolist(), eos_id] for length in lengths]


def reference_ids(model: PreTrainedModel, source: list[int]) -> list[int]:
    """What `generate` adds to the start token, by the parameters in the model's generation config."""
    # The cache that transformers 5 gives T5 has as many layers as the encoder, and the decoder here has more.
    cached = model.config.model_type not in ("t5", "mt5", "umt5")
    with torch.no_grad():
        out = model.generate(torch.tensor([source]), use_cache=cached)
    return [int(i) for i in out[0, 1:]]


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "max_new_tokens": 13},
    "beams": {"num_beams": 4, "max_new_tokens": 13},
    "long-hypotheses-preferred": {"num_beams": 4, "max_new_tokens": 14, "length_penalty": 2.0},
    "short-hypotheses-preferred": {"num_beams": 3, "max_new_tokens": 14, "length_penalty": -1.0},
    "early": {"num_beams": 4, "max_new_tokens": 14, "early_stopping": True},
    "never": {"num_beams": 4, "max_new_tokens": 14, "early_stopping": "never", "length_penalty": 0.5},
    "no-repeats": {"num_beams": 4, "max_new_tokens": 18, "no_repeat_ngram_size": 2},
    "greedy-no-repeats": {"num_beams": 1, "max_new_tokens": 18, "no_repeat_ngram_size": 2},
    "lengths": {"num_beams": 4, "min_length": 9, "max_length": 13},
    "no-repeats-of-the-source": {"num_beams": 4, "max_new_tokens": 14, "encoder_no_repeat_ngram_size": 1},
    "greedy-no-repeats-of-the-source": {"num_beams": 1, "max_new_tokens": 14, "encoder_no_repeat_ngram_size": 1},
    "greedy-lengths": {"num_beams": 1, "min_length": 9, "max_length": 13},
    "forced": {"num_beams": 4, "max_length": 11, "forced_bos_token_id": 42, "forced_eos_token_id": "eos"},
    "repetition": {"num_beams": 4, "max_new_tokens": 12, "repetition_penalty": 1.7},
    "greedy-banned": {"num_beams": 1, "max_new_tokens": 12, "bad_words_ids": [[25], [7], [95]]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_ids_are_those_of_transformers(save_seq2seq: SaveSeq2Seq, make_engine: MakeEngine, setting: str) -> None:
    check(save_seq2seq, make_engine, "mbart", SETTINGS[setting])


@pytest.mark.parametrize("setting", ["greedy", "beams"])
def test_ids_are_those_of_transformers_in_every_family(
    save_seq2seq: SaveSeq2Seq, make_engine: MakeEngine, family: str, setting: str
) -> None:
    check(save_seq2seq, make_engine, family, SETTINGS[setting])


def check(save_seq2seq: SaveSeq2Seq, make_engine: MakeEngine, family: str, setting: dict[str, Any]) -> None:
    """Several sources of mixed lengths at once; parameters come from the checkpoint's own generation_config.json."""
    # Without it, tiny random networks say one thing again and again.
    parameters = {"forced_eos_token_id": None, "no_repeat_ngram_size": 3, **setting}
    _, plain = save_seq2seq(family)
    eos_id = int(plain.config.eos_token_id)
    if parameters["forced_eos_token_id"] == "eos":
        parameters["forced_eos_token_id"] = eos_id
    folder, model = save_seq2seq(family, seed=3, **parameters)
    asked = sources([6, 19, 2, 33], eos_id)
    found = make_engine(folder).generate(asked, Choices(num_beams=parameters["num_beams"]))
    expected = [reference_ids(model, source) for source in asked]
    assert found == expected


@pytest.mark.parametrize(("num_beams", "num_blocks"), [(1, 17), (4, 34)])
def test_a_crowd_in_a_small_cache_gets_the_ids_of_each_alone(
    save_seq2seq: SaveSeq2Seq, make_engine: MakeEngine, num_beams: int, num_blocks: int
) -> None:
    """Room for few requests at a time, steps shorter than a source: queueing, preemption, sources encoded anew."""
    folder, _ = save_seq2seq("mbart", seed=3, no_repeat_ngram_size=3, min_length=12, max_length=19)
    asked = sources([6, 19, 2, 33, 6, 12, 25], eos_id=2)
    choices = Choices(num_beams=num_beams)
    alone = [make_engine(folder).generate([source], choices)[0] for source in asked]
    small = make_engine(folder, max_batch_tokens=24, num_blocks=num_blocks)
    assert small.generate(asked, choices) == alone
    assert small.num_preempted > 0


def test_sampled_ids_depend_on_the_seed_and_not_on_the_company(
    save_seq2seq: SaveSeq2Seq, make_engine: MakeEngine
) -> None:
    folder, _ = save_seq2seq("flan-t5")
    asked = sources([6, 19, 11], eos_id=1)
    choices = Choices(temperature=0.8, seed=11, max_tokens=12)
    together = make_engine(folder).generate(asked, choices)
    assert together == [make_engine(folder).generate([source], choices)[0] for source in asked]
    assert make_engine(folder).generate(asked, Choices(temperature=0.8, seed=12, max_tokens=12)) != together
