"""Text of encoder-decoders through scheduler and runner is what `transformers`' `generate` gives, id by id."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from model.attention.reference import ReferenceAttention
from model.block_manager import BlockManager
from model.checkpoint import load_network
from model.description import describe
from model.encoder_decoder import EncoderDecoder
from model.generation_defaults import Choices
from model.kv_cache import KVCache
from model.runner import Runner
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.sequence import Sequence

NUM_BLOCKS = 256
BLOCK_SIZE = 4
SaveSeq2Seq = Callable[..., tuple[Path, PreTrainedModel]]


@dataclass(slots=True)
class Engine:
    """One checkpoint from sources to finished ids, without processes."""

    folder: Path
    max_batch_tokens: int = 200
    num_blocks: int = NUM_BLOCKS
    num_preempted: int = 0

    def generate(self, sources: list[list[int]], choices: Choices, task: str | None = None) -> list[list[int]]:
        network = load_network(self.folder)
        assert isinstance(network, EncoderDecoder)
        config = network.config
        defaults = describe(self.folder).sequence_to_sequence
        assert defaults is not None
        cache = KVCache(
            num_layers=config.num_layers,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            dtype=torch.float32,
            device="cpu",
        )
        runner = Runner(network, config, cache, ReferenceAttention())
        limits = SchedulerLimits(
            max_batch_tokens=self.max_batch_tokens, max_sequences=64, max_model_len=config.context_length
        )
        scheduler = Scheduler(BlockManager(self.num_blocks, BLOCK_SIZE), limits)
        for number, source in enumerate(sources):
            sampling = defaults.sampling(task, choices)
            sequence = Sequence(number, list(defaults.decoder_prompt), sampling, encoder_ids=source)
            assert scheduler.add(sequence, now=0.0) is None
        found: list[list[int]] = [[] for _ in sources]
        for _ in range(1000):
            if not scheduler.has_work:
                return found
            batch = scheduler.schedule(0.0)
            self.num_preempted += scheduler.num_preempted
            for output in scheduler.update(batch, runner.run(batch), 0.0):
                assert output.error is None
                found[output.request_id] += output.token_ids
        raise AssertionError("the requests do not end")


def sources(lengths: list[int], eos_id: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [[*torch.randint(3, 79, (length - 1,), generator=generator).tolist(), eos_id] for length in lengths]


def reference_ids(model: PreTrainedModel, source: list[int]) -> list[int]:
    """What `generate` adds to the start token, by the parameters in the model's generation config."""
    # The cache that transformers 5 gives T5 has as many layers as the encoder, and the decoder here has more.
    cached = model.config.model_type not in ("t5", "mt5")
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
    "greedy-lengths": {"num_beams": 1, "min_length": 9, "max_length": 13},
    "forced": {"num_beams": 4, "max_length": 11, "forced_bos_token_id": 42, "forced_eos_token_id": "eos"},
    "repetition": {"num_beams": 4, "max_new_tokens": 12, "repetition_penalty": 1.7},
    "greedy-banned": {"num_beams": 1, "max_new_tokens": 12, "bad_words_ids": [[25], [7], [95]]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_ids_are_those_of_transformers(save_seq2seq: SaveSeq2Seq, setting: str) -> None:
    check(save_seq2seq, "mbart", SETTINGS[setting])


@pytest.mark.parametrize("setting", ["greedy", "beams"])
def test_ids_are_those_of_transformers_in_every_family(save_seq2seq: SaveSeq2Seq, family: str, setting: str) -> None:
    check(save_seq2seq, family, SETTINGS[setting])


def check(save_seq2seq: SaveSeq2Seq, family: str, setting: dict[str, Any]) -> None:
    """Several sources of mixed lengths at once; parameters come from the checkpoint's own generation_config.json."""
    # Without it, tiny random networks say one thing again and again.
    parameters = {"forced_eos_token_id": None, "no_repeat_ngram_size": 3, **setting}
    _, plain = save_seq2seq(family)
    eos_id = int(plain.config.eos_token_id)
    if parameters["forced_eos_token_id"] == "eos":
        parameters["forced_eos_token_id"] = eos_id
    folder, model = save_seq2seq(family, seed=3, **parameters)
    asked = sources([6, 19, 2, 33], eos_id)
    found = Engine(folder).generate(asked, Choices(num_beams=parameters["num_beams"]))
    expected = [reference_ids(model, source) for source in asked]
    assert found == expected


@pytest.mark.parametrize(("num_beams", "num_blocks"), [(1, 17), (4, 34)])
def test_a_crowd_in_a_small_cache_gets_the_ids_of_each_alone(
    save_seq2seq: SaveSeq2Seq, num_beams: int, num_blocks: int
) -> None:
    """Room for few requests at a time, steps shorter than a source: queueing, preemption, sources encoded anew."""
    folder, _ = save_seq2seq("mbart", seed=3, no_repeat_ngram_size=3, min_length=12, max_length=19)
    asked = sources([6, 19, 2, 33, 6, 12, 25], eos_id=2)
    choices = Choices(num_beams=num_beams)
    alone = [Engine(folder).generate([source], choices)[0] for source in asked]
    small = Engine(folder, max_batch_tokens=24, num_blocks=num_blocks)
    assert small.generate(asked, choices) == alone
    assert small.num_preempted > 0


def test_sampled_ids_depend_on_the_seed_and_not_on_the_company(save_seq2seq: SaveSeq2Seq) -> None:
    folder, _ = save_seq2seq("flan-t5")
    asked = sources([6, 19, 11], eos_id=1)
    choices = Choices(temperature=0.8, seed=11, max_tokens=12)
    together = Engine(folder).generate(asked, choices)
    assert together == [Engine(folder).generate([source], choices)[0] for source in asked]
    assert Engine(folder).generate(asked, Choices(temperature=0.8, seed=12, max_tokens=12)) != together
