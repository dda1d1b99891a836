"""A lane that makes its steps ahead, or that guesses tokens, gives what one gives that does neither, to the token,
whatever happens."""

import operator
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM

from model.attention.cpu import CpuAttention
from model.batch import Batch, BeamParams, Grammar, SamplingParams, StepOutput
from model.block_manager import BlockManager
from model.checkpoint import load_network
from model.decoder import Decoder
from model.drafting_runner import DraftingRunner
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache
from model.runner import LaunchedStep, Runner
from service.engine import drafts
from service.engine.generating_network import cache_shape
from service.engine.generation_lane import GenerationLane
from service.engine.protocol import Generate, Loaded, TokenOutput
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.step_costs import StepCosts

VOCAB, BLOCK = 97, 4
NUM_HISTORIES = 12

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "stops": {"stop_ids": tuple(range(0, VOCAB, 5)), "min_tokens": 2},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "logprobs": 2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "temperature": 0.7},
    "no repeats": {"no_repeat_ngram_size": 2},
    "grammar": {"grammar": Grammar("regex", "(ab|ba)+c"), "temperature": 1.0},
    "scored": {"prompt_logprobs": 1, "logprobs": 0},
    "beams": {"beam": BeamParams(num_beams=2)},
}


class FailingRunner(DraftingRunner):
    """Raises where the numbers of its launches and collections are in `launches` and `collections`."""

    launches: frozenset[int] = frozenset()
    collections: frozenset[int] = frozenset()
    num_launched = num_collected = num_ahead = num_drafted = num_confirmed = 0

    def launch(self, batch: Batch) -> LaunchedStep:
        self.num_launched += 1
        self.num_ahead += any(row.fed for row in batch.rows)
        if self.num_launched in self.launches:
            raise RuntimeError("no memory")
        return super().launch(batch)

    def collect(self, step: LaunchedStep) -> StepOutput:
        self.num_collected += 1
        if self.num_collected in self.collections:
            raise RuntimeError("a device's fault")
        output = super().collect(step)
        self.num_drafted += sum(row.num_drafted for row in step.rows)
        self.num_confirmed += sum(len(row.following) for row in output.rows)
        return output


def make_network(folder: Path, seed: int, **config: int) -> Decoder:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128,
    }  # fmt: skip
    reference = LlamaForCausalLM(LlamaConfig(**(sizes | config)))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(3)  # the most likely token is clear of the second by more than rounding
    reference.save_pretrained(folder)
    found = load_network(folder)
    assert isinstance(found, Decoder)
    return found


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_network(tmp_path_factory.mktemp("llama"), 5)


@pytest.fixture(scope="module")
def draft_networks(network: Decoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    """Itself, and others of the same ids: of another shape, of fewer rows in its embedding and of more."""
    shapes = {"shallow": {"num_hidden_layers": 1}, "fewer ids": {"vocab_size": 60}, "more ids": {"vocab_size": 128}}
    made = {name: make_network(tmp_path_factory.mktemp("draft"), 6, **sizes) for name, sizes in shapes.items()}
    return {"itself": network, **made}


@pytest.fixture(scope="module")
def tokenizer() -> str:
    pieces = ["<end>", "<unused>", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<unused>"])
    return made.to_str()


def cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses always pay."""
    monkeypatch.setattr(StepCosts, "least_odds", lambda *_: 0.0)
    monkeypatch.setattr(StepCosts, "share_of", lambda *_: 0.0)


MakeLane = Callable[..., tuple[GenerationLane, FailingRunner]]


@pytest.fixture
def make_lane(network: Decoder, draft_networks: dict[str, Decoder], tokenizer: str) -> MakeLane:
    def cache_of(decoder: Decoder, num_blocks: int) -> KVCache:
        return KVCache.of_shape(cache_shape(decoder.config, BLOCK, torch.float32), num_blocks, "cpu")

    def make(
        *, look_ahead: bool = False, num_blocks: int = 200, draft: str | None = None, **limits: int
    ) -> tuple[GenerationLane, FailingRunner]:
        guesses = draft_networks[draft or "shallow"]
        if draft is not None:
            limits = {"draft_len": 128, "speculative_tokens": 5} | limits
        grammars = GrammarCompiler(tokenizer, VOCAB, [0])
        own = Runner(guesses, guesses.config, cache_of(guesses, num_blocks), CpuAttention())
        cache = cache_of(network, num_blocks)
        runner = FailingRunner(network, cache, CpuAttention(), draft=own, grammars=grammars)
        bounds = SchedulerLimits(**({"max_batch_tokens": 24, "max_sequences": 6, "max_model_len": 64} | limits))
        scheduler = Scheduler(BlockManager(num_blocks, BLOCK), bounds)
        loaded = Loaded(model="m@1", dtype="float32", device="cpu", weight_bytes=0)
        return GenerationLane(loaded, scheduler, runner, grammars, look_ahead=look_ahead), runner

    return make


class Told:
    """What one request was given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.end: str | None = None

    def take(self, output: TokenOutput) -> None:
        assert self.end is None, "an output after the end"
        self.ids += output.token_ids
        self.logprobs += [entry.logprob for entry in [*output.prompt_logprobs, *output.logprobs]]
        self.end = output.finish_reason


def play(lane: GenerationLane, requests: list[tuple[int, Generate]], cancels: dict[int, int]) -> dict[int, Told]:
    """Submits each request before the step of its number, cancels (step to request), and runs till all is told."""
    told = {request.request_id: Told() for _, request in requests}
    for number in range(2000):
        for when, request in requests:
            if when == number:
                lane.submit(request, 0.0)
        if number in cancels:
            lane.cancel(cancels[number])
        for output in lane.step(0.0).tokens:
            told[output.request_id].take(output)
        if number > max(when for when, _ in requests) and not lane.has_work and not lane._scheduler.request_ids:
            return told
    raise AssertionError("somebody starves")


def make_requests(chance: random.Random, kinds: list[str], most_tokens: int = 14) -> list[tuple[int, Generate]]:
    requests = []
    for number, kind in enumerate(kinds):
        prompt = [chance.randint(2, 20) for _ in range(chance.choice([1, 3, 4, 8, 13]))]
        sampling = SamplingParams(max_tokens=chance.randint(1, most_tokens), seed=number, **SAMPLINGS[kind])
        priority = chance.choice([0, 0, 0, 1])
        message = Generate(request_id=number, model="m@1", prompt_ids=prompt, sampling=sampling, priority=priority)
        requests.append((chance.randint(0, 25), message))
    return requests


@pytest.mark.parametrize("num_blocks", [200, 22], ids=["roomy", "tight"])
@pytest.mark.parametrize("history", range(NUM_HISTORIES))
def test_any_history_gives_the_same_tokens_ahead_and_step_by_step(
    make_lane: MakeLane, history: int, num_blocks: int
) -> None:
    chance = random.Random(history)
    requests = make_requests(chance, chance.choices(list(SAMPLINGS), k=14))
    cancels = {chance.randint(1, 30): chance.randrange(14) for _ in range(3)}
    plain, _ = make_lane(look_ahead=False, num_blocks=num_blocks)
    ahead, runner = make_lane(look_ahead=True, num_blocks=num_blocks)
    expected, found = (play(lane, requests, cancels) for lane in (plain, ahead))
    for number, told in found.items():
        if told.end is None:  # cancelled: at another moment of its life
            assert number in cancels.values()
            length = min(len(told.ids), len(expected[number].ids))
            assert told.ids[:length] == expected[number].ids[:length]
        elif expected[number].end is not None:
            assert (told.ids, told.end) == (expected[number].ids, expected[number].end)
            assert told.logprobs == pytest.approx(expected[number].logprobs, abs=1e-4)
    assert runner.num_ahead > 0
    for lane in (plain, ahead):
        lane._scheduler._blocks.check([])


@pytest.mark.parametrize("num_blocks", [200, 22], ids=["roomy", "tight"])
@pytest.mark.parametrize("history", range(5))
def test_any_history_gives_the_same_tokens_guessed_and_one_by_one(
    make_lane: MakeLane, history: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is guessed: here what will come, but for one token in five. Ids that the network does not know, too, as
    a source with a vocabulary of its own has them: a guess at one was taken for a fault of its request."""
    chance = random.Random(history)
    requests = make_requests(chance, chance.choices(list(SAMPLINGS), k=14), most_tokens=30)
    plain, _ = make_lane(num_blocks=num_blocks)
    guessing, runner = make_lane(num_blocks=num_blocks, speculative_tokens=6)
    expected = play(plain, requests, {})
    texts = [request.prompt_ids + expected[number].ids for number, (_, request) in enumerate(requests)]

    def continuation(ids: NDArray[np.int64], count: int) -> list[int]:
        text = next((text for text in texts if text[: len(ids)] == ids.tolist()), [])
        return [chance.choice([token] * 8 + [7, VOCAB + 7]) for token in text[len(ids) : len(ids) + count]]

    monkeypatch.setattr(drafts, "continuation", continuation)
    cost_nothing(monkeypatch)
    found = play(guessing, requests, {})
    for number, told in found.items():
        assert (told.ids, told.end) == (expected[number].ids, expected[number].end)
        assert told.logprobs == pytest.approx(expected[number].logprobs, abs=1e-4)
    assert runner.num_confirmed > 0
    for lane in (plain, guessing):
        lane._scheduler._blocks.check([])


@pytest.mark.parametrize("num_blocks", [200, 22], ids=["roomy", "tight"])
@pytest.mark.parametrize("draft", ["itself", "shallow", "fewer ids", "more ids"])
@pytest.mark.parametrize("history", range(3))
def test_any_history_gives_the_same_tokens_with_a_draft_network(
    make_lane: MakeLane, draft: str, history: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it guesses; one that is the network itself is nearly always right, whatever came and went before."""
    cost_nothing(monkeypatch)
    chance = random.Random(history)
    requests = make_requests(chance, chance.choices(list(SAMPLINGS), k=14), most_tokens=30)
    plain, _ = make_lane(num_blocks=num_blocks)
    guessing, runner = make_lane(num_blocks=num_blocks, draft=draft)
    expected, found = (play(lane, requests, {}) for lane in (plain, guessing))
    for number, told in found.items():
        assert (told.ids, told.end) == (expected[number].ids, expected[number].end)
        assert told.logprobs == pytest.approx(expected[number].logprobs, abs=1e-4)
    assert runner.num_drafted > 8
    if draft == "itself":
        assert runner.num_confirmed >= 0.98 * runner.num_drafted
    for lane in (plain, guessing):
        lane._scheduler._blocks.check([])


@pytest.mark.parametrize("lane", [{"look_ahead": True}, {"draft": "itself"}], ids=["ahead", "drafted"])
@pytest.mark.parametrize("history", range(6))
def test_steps_that_fail_are_made_again_ahead_as_step_by_step(
    make_lane: MakeLane, history: int, lane: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a step fails when it is launched or when its results are fetched, with the next one launched already. A
    draft does not rely on what it should have computed in one."""
    cost_nothing(monkeypatch)
    chance = random.Random(100 + history)
    requests = make_requests(chance, chance.choices([kind for kind in SAMPLINGS if kind != "beams"], k=10))
    plain, _ = make_lane(look_ahead=False)
    expected = play(plain, requests, {})
    ahead, runner = make_lane(**lane)
    # Not two in a row: a request that is alone in a step that fails is at fault.
    runner.launches, runner.collections = frozenset({9, 30}), frozenset({14, 22})
    found = play(ahead, requests, {})
    failed = [number for number, told in found.items() if told.end == "error"]
    assert len(failed) <= 2
    for number, told in found.items():
        if number not in failed:
            assert (told.ids, told.end) == (expected[number].ids, expected[number].end)
    assert runner.num_confirmed >= 0.98 * runner.num_drafted
    ahead._scheduler._blocks.check([])


def test_a_plain_crowd_runs_ahead_all_the_time_and_wastes_a_row_at_most_for_each(make_lane: MakeLane) -> None:
    lane, runner = make_lane(look_ahead=True)
    told = play(lane, make_requests(random.Random(1), ["stops"] * 6), {})
    num_tokens = sum(len(entry.ids) for entry in told.values())
    assert runner.num_ahead >= runner.num_launched / 2
    assert runner.num_launched <= num_tokens + 2 * len(told)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_the_scheduler_is_told_what_each_step_took(
    look_ahead: bool, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, runner = make_lane(look_ahead=look_ahead)
    heard: list[tuple[int, bool]] = []
    # What the host does beside the device costs no time; what it does before and after it does.
    is_right = operator.eq if look_ahead else operator.gt
    monkeypatch.setattr(
        lane._scheduler,
        "record",
        lambda batch, seconds, _: heard.append((batch.num_tokens, is_right(seconds, runner.forward_seconds))),
    )
    play(
        lane, [(0, Generate(request_id=1, model="m@1", prompt_ids=[5] * 30, sampling=SamplingParams(max_tokens=3)))], {}
    )
    assert heard == [(24, True), (6, True), (1, True), (1, True)]


def test_a_cancelled_request_gets_nothing_more_and_frees_its_blocks_while_its_step_runs(make_lane: MakeLane) -> None:
    lane, _ = make_lane(look_ahead=True)
    sampling = SamplingParams(max_tokens=30)
    lane.submit(Generate(request_id=3, model="m@1", prompt_ids=[5, 6, 7], sampling=sampling), 0.0)
    for _ in range(4):
        lane.step(0.0)
    lane.cancel(3)
    lane._scheduler._blocks.check([])
    assert lane.step(0.0).tokens == []
    assert not lane.has_work
