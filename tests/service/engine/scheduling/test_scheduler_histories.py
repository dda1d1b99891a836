"""Random histories of the scheduler against a runner that knows what every slot must hold.

`HISTORIES=20000 pytest tests/service/engine/scheduling/test_scheduler_histories.py` runs so many of each kind.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from model.batch import Batch, BeamParams, Grammar
from service.engine import planner

NUM_HISTORIES = int(os.environ.get("HISTORIES", "100"))
STEPS_PER_HISTORY = 40

# Few distinct prompts with common beginnings, of all lengths around block boundaries.
prompts = st.tuples(
    st.sampled_from(["aaaaaaaaaaaaaaaa", "aaaabbbbbbbbbbbb", "cdcdcdcdcdcdcdcd"]), st.integers(1, 16)
).map(lambda choice: [ord(letter) - 97 for letter in choice[0][: choice[1]]])
sources = st.sampled_from([1, 3, 6, 6, 9, 20]).map(
    lambda length: [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4][:length]
)
samplings = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 16),
        "seed": st.integers(0, 3),
        "stop_ids": st.sampled_from([(), (), (0,), (0, 3)]),
        "min_tokens": st.integers(0, 3),
    }
)
orders = st.fixed_dictionaries(
    {
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "cache_salt": st.sampled_from(["", "", "tenant"]),
        "adapter": st.sampled_from([None, None, 1, 2]),
        "lifetime": st.sampled_from([None, None, None, None, None, 0, 1, 5]),
    }
)
beams = st.builds(
    BeamParams,
    num_beams=st.integers(2, 3),
    length_penalty=st.sampled_from([1.0, 0.0, -1.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
)


def seconds_of(batch: Batch) -> float:
    """What a step takes, by which steps with prompts are sized."""
    return 0.01 + 0.001 * batch.num_tokens


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests here are too short for the least that prompts really get."""
    monkeypatch.setattr(planner, "MIN_PROMPT_TOKENS", 1)


class History(RuleBasedStateMachine):
    """What may happen to a service of one checkpoint, in any order."""

    def __init__(self, make_service: Callable[..., Any], make_request: Callable[..., Any]) -> None:
        super().__init__()
        self.make_service = make_service
        self.make_request = make_request
        self.compiling: list[int] = []

    @initialize(
        num_slots=st.sampled_from([12, 20, 28, 36, 48, 64]),
        block_size=st.sampled_from([1, 2, 4]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        max_batch_tokens=st.integers(4, 24),
        max_sequences=st.sampled_from([1, 2, 3, 4, 6, 6]),
        prefill_chunk=st.sampled_from([None, 1, 3, 8]),
        max_step_stretch=st.sampled_from([None, 1.0, 2.5]),
        speculative_tokens=st.sampled_from([0, 0, 2, 8]),
        draft_len=st.sampled_from([None, None, 24, 24, 14]),
        look_ahead=st.booleans(),
    )
    def start(self, num_slots: int, block_size: int, **settings: Any) -> None:
        num_blocks = num_slots // block_size
        self.service = self.make_service(num_blocks=num_blocks, block_size=block_size, max_model_len=24, **settings)
        self.service.seconds_of = seconds_of

    def _add(self, prompt_ids: list[int], order: dict[str, Any], **fields: Any) -> Any:
        lifetime = order["lifetime"]
        request = self.make_request(
            prompt_ids,
            priority=order["priority"],
            cache_salt=order["cache_salt"],
            adapter=order["adapter"],
            arrival=self.service.now,
            deadline=None if lifetime is None else self.service.now + lifetime,
            **fields,
        )
        self.service.add(request)
        return request

    @rule(prompt_ids=prompts, sampling=samplings, order=orders)
    def add(self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any]) -> None:
        self._add(prompt_ids, order, **sampling)

    @rule(prompt_ids=prompts, sampling=samplings, order=orders, count=st.integers(2, 4))
    def add_several_of_one_prompt(
        self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any], count: int
    ) -> None:
        for seed in range(count):
            self._add(prompt_ids, order, **{**sampling, "seed": seed})

    @rule(prompt_ids=prompts, sampling=samplings, order=orders, share=st.floats(0, 1))
    def add_replayed(
        self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any], share: float
    ) -> None:
        answer, _ = self.make_request(prompt_ids, **sampling).answer(self.service.scheduler.max_model_len)
        self._add(prompt_ids, order, output_ids=answer[: round(share * len(answer))], **sampling)

    @rule(prompt_ids=prompts, sampling=samplings, order=orders)
    def add_with_prompt_logprobs(self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any]) -> None:
        self._add(prompt_ids, order, prompt_logprobs=1, **{**sampling, "max_tokens": sampling["max_tokens"] - 1})

    @rule(prompt_ids=prompts, sampling=samplings, order=orders)
    def add_with_grammar(self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any]) -> None:
        request = self._add(prompt_ids, order, grammar=Grammar("regex", "a*"), **sampling)
        self.compiling.append(request.request_id)

    @rule(source=sources, num_start=st.sampled_from([1, 5]), sampling=samplings, order=orders, beam=st.none() | beams)
    def add_encoder_decoder(
        self,
        source: list[int],
        num_start: int,
        sampling: dict[str, Any],
        order: dict[str, Any],
        beam: BeamParams | None,
    ) -> None:
        if beam is not None:
            sampling = {**sampling, "max_tokens": 1 + sampling["max_tokens"] // 2}
        self._add([2] * num_start, order, encoder_ids=source, beam=beam, **sampling)

    @rule(prompt_ids=prompts, sampling=samplings, order=orders, beam=beams)
    def add_beam_search(
        self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any], beam: BeamParams
    ) -> None:
        self._add(prompt_ids[:4], order, beam=beam, **{**sampling, "max_tokens": 1 + sampling["max_tokens"] // 2})

    @rule(prompt_ids=prompts, sampling=samplings, order=orders, fails_at=st.integers(0, 5))
    def add_faulty(self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any], fails_at: int) -> None:
        self._add(prompt_ids, order, fails_at=fails_at, **sampling)

    @rule(prompt_ids=prompts, sampling=samplings, order=orders)
    def add_poisonous(self, prompt_ids: list[int], sampling: dict[str, Any], order: dict[str, Any]) -> None:
        self._add(prompt_ids, order, poisons=True, **sampling)

    @precondition(lambda self: self.compiling)
    @rule(data=st.data(), good=st.booleans())
    def compiled(self, data: st.DataObject, good: bool) -> None:
        number = self.compiling.pop(data.draw(st.integers(0, len(self.compiling) - 1)))
        if good:
            self.service.scheduler.grammar_ready(number)
        elif number not in self.service.ends:
            self.service.take(self.service.scheduler.grammar_failed(number, "no such grammar"))

    def _cancel_one(self, data: st.DataObject) -> None:
        numbers = sorted(self.service.requests)
        if numbers:
            self.service.cancel(data.draw(st.sampled_from(numbers)))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._cancel_one(data)
        self.service.check()

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        self.service.now += seconds

    @rule(count=st.integers(1, 4))
    def few_steps(self, count: int) -> None:
        for _ in range(count):
            self.service.step()

    @rule(count=st.integers(4, 12))
    def many_steps(self, count: int) -> None:
        for _ in range(count):
            self.service.step()

    @rule()
    def failing_step(self) -> None:
        self.service.step(fails=True)

    @rule()
    def step_after_one_that_turns_out_to_have_failed(self) -> None:
        self.service.step(landing_fails=True)

    @rule(data=st.data(), fails=st.booleans(), seconds=st.integers(0, 2))
    def step_with_events_while_it_runs(self, data: st.DataObject, fails: bool, seconds: int) -> None:
        def between() -> None:
            self._cancel_one(data)
            self.service.now += seconds

        self.service.step(fails=fails, between=between)

    def teardown(self) -> None:
        if not hasattr(self, "service"):
            return
        for number in self.compiling:
            self.service.scheduler.grammar_ready(number)
        self.service.finish()
        assert set(self.service.ends) == set(self.service.requests)


@pytest.mark.slow
def test_any_history_leaves_right_answers_and_free_blocks(make_service: Any, make_request: Any) -> None:
    run_state_machine_as_test(
        lambda: History(make_service, make_request),
        settings=settings(
            max_examples=NUM_HISTORIES,
            stateful_step_count=STEPS_PER_HISTORY,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=(Phase.generate, Phase.shrink),
        ),
    )


def crowd_request(chance: random.Random, make_request: Callable[..., Any]) -> Any:
    """Anything of what may come, sized so that a handful fills the cache."""
    kind = chance.choice(["plain", "plain", "beam", "beam", "source", "source beam", "scored"])
    fields: dict[str, Any] = {
        "max_tokens": chance.randint(3, 9),
        "seed": chance.randint(0, 3),
        "priority": chance.choice([0, 0, 1]) - ("beam" in kind) * chance.randint(0, 1),
        "stop_ids": chance.choice([(), (0,)]),
    }
    prompt_ids = [0] * chance.randint(1, 7) + [chance.randint(0, 1)]
    if "source" in kind:
        fields["encoder_ids"] = [3, 1, 4, 1, 5, 9, 2][: chance.choice([3, 7])] * chance.choice([1, 1, 3])
    if "beam" in kind:
        fields["beam"] = BeamParams(num_beams=chance.randint(2, 3), early_stopping=chance.choice([True, "never"]))
    if kind == "scored":
        fields["prompt_logprobs"] = 0
    return make_request(prompt_ids, **fields)


@pytest.mark.slow
def test_any_crowd_in_a_tight_cache_gets_right_answers(make_service: Any, make_request: Any) -> None:
    @settings(
        max_examples=3 * NUM_HISTORIES,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def crowd(seed: int) -> None:
        chance = random.Random(seed)
        block_size = chance.choice([1, 2, 4])
        service = make_service(
            num_blocks=chance.randint(36, 60) // block_size,
            block_size=block_size,
            prefix_caching=chance.random() < 0.8,
            max_batch_tokens=chance.randint(6, 20),
            max_sequences=chance.randint(3, 6),
            prefill_chunk=chance.choice([None, 1, 2, 5]),
            max_step_stretch=chance.choice([None, 1.0, 2.5]),
            speculative_tokens=chance.choice([0, 0, 2, 8]),
            draft_len=chance.choice([None, 24, 14]),
            seconds_of=seconds_of,
            look_ahead=chance.random() < 0.7,
        )
        for _ in range(chance.randint(3, 9)):
            service.add(crowd_request(chance, make_request))
            for _ in range(chance.choice([0, 0, 0, 1, 4])):
                service.step(fails=chance.random() < 0.03)
        service.finish()
        assert set(service.ends) == set(service.requests)

    crowd()
