"""Whatever happens to single-pass requests, each is in one place, the counts are those of a recount, and all get in."""

import os
from typing import Any, cast

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from service.engine.dispatch import Dispatcher
from service.engine.flight import EncodeFlight, EncodeRequest
from service.engine.protocol import EncodeInput, WorkerConfig

NUM_HISTORIES = int(os.environ.get("HISTORIES", "100"))
STEP_TOKENS = 100
DEADLY_DEATHS = 3


class Model:
    max_batch_items = 64

    def __init__(self, key: str, step_tokens: int) -> None:
        self.key = self.lane_key = key
        self.step_tokens = step_tokens


class Histories(RuleBasedStateMachine):
    """Two checkpoints, whose steps alone are one and eight times the others'."""

    @initialize(step_tokens=st.sampled_from([STEP_TOKENS, 8 * STEP_TOKENS]))
    def begin(self, step_tokens: int) -> None:
        self.dispatcher = Dispatcher(WorkerConfig(models=[], max_sequences=4, max_batch_tokens=STEP_TOKENS))
        self.models = [Model("a@1", STEP_TOKENS), Model("b@1", step_tokens)]
        self.loaded = {model.key for model in self.models}
        self.live: dict[int, EncodeFlight] = {}
        self.inside: set[int] = set()
        self.count = 0

    @rule(
        place=st.integers(0, 1),
        cost=st.sampled_from([5, 50, 90, 150, 390, 700, 1500, 9000]),
        priority=st.sampled_from([0, 0, 0, 5, -5]),
        client=st.sampled_from("xyz"),
    )
    def arrive(self, place: int, cost: int, priority: int, client: str) -> None:
        model = self.models[place]
        inputs = [EncodeInput(ids=[1])] * max(1, cost // 30)
        flight = EncodeFlight(
            request=EncodeRequest(model=model.key, output="embedding", inputs=inputs), results=[None] * len(inputs),
            number=self.count, model=cast(Any, model), task="embed", client=client, priority=priority, cost_tokens=cost,
            num_prompt_tokens=cost, accepted=0.0, deadline=None,
        )  # fmt: skip
        self.count += 1
        self.live[flight.number] = flight
        self.dispatcher.enqueue(flight)
        self._take()

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), ends=st.booleans())
    def step(self, data: st.DataObject, ends: bool) -> None:
        flight = self._chosen(data, self.inside)
        self.dispatcher.started(flight)
        self.dispatcher.made_progress(flight)
        if ends:
            self._forget(flight)
        self._take()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self._forget(self._chosen(data, self.live))
        self._take()

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), in_a_step=st.booleans())
    def die(self, data: st.DataObject, in_a_step: bool) -> None:
        batch = frozenset({self._chosen(data, self.inside).number}) if in_a_step else None
        self.loaded.clear()
        lost = self.dispatcher.take_back(batch)
        assert {flight.number for flight in lost} == self.inside
        self.inside.clear()
        for flight in lost:
            if flight.deaths_without_progress >= DEADLY_DEATHS:
                self._forget(cast(EncodeFlight, flight))
            else:
                self.dispatcher.enqueue(flight)

    @rule(place=st.integers(0, 1))
    def load(self, place: int) -> None:
        self.loaded.add(self.models[place].key)
        self._take()

    @invariant()
    def everyone_is_in_one_place(self) -> None:
        load = self.dispatcher.load("x")
        outside = [flight for number, flight in self.live.items() if number not in self.inside]
        num_waiting = sum(self.dispatcher.waiting_in(model.key) for model in self.models)
        assert num_waiting == len(outside)
        assert load.num_requests >= len(outside)
        assert load.num_tokens >= sum(flight.cost_tokens for flight in outside)
        assert load.client_requests >= sum(flight.client == "x" for flight in outside)

    def teardown(self) -> None:
        """Who is let in ends, and so all do: the smallest numbers of those inside go last, and keep nobody outside."""
        self.loaded = {model.key for model in self.models}
        while self.live:
            self._take()
            assert self.inside, "somebody starves"
            for number in self.inside:
                self.dispatcher.started(self.live[number])
                self.dispatcher.made_progress(self.live[number])
            self._forget(self.live[max(self.inside)])
        assert self.dispatcher.load("x")[:4] == (0, 0, 0, 0)

    def _take(self) -> None:
        for flight in self.dispatcher.take(self.loaded.__contains__):
            assert flight.number in self.live
            assert flight.number not in self.inside, "let in twice"
            self.inside.add(flight.number)

    def _forget(self, flight: EncodeFlight) -> None:
        self.dispatcher.forget(flight)
        del self.live[flight.number]
        self.inside.discard(flight.number)

    def _chosen(self, data: st.DataObject, numbers: Any) -> EncodeFlight:
        return self.live[data.draw(st.sampled_from(sorted(numbers)))]


def test_no_history_loses_anybody() -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=NUM_HISTORIES,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )
