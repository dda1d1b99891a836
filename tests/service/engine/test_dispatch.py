"""What the worker is given: never more than it can use, suspects one at a time, everything back after a death."""

from typing import Any, cast

import pytest

from model.batch import Grammar, SamplingParams
from service.admission import QueueLoad
from service.engine.dispatch import SPARE_PROMPTS, SPARE_REQUESTS, SUSPECT_DEATHS, Dispatcher
from service.engine.flight import EncodeFlight, EncodeRequest, Flight, GenerateFlight, GenerateRequest
from service.engine.models import LoadedModel
from service.engine.protocol import EncodeInput, WorkerConfig

MAX_SEQUENCES = 4


class NamedModel:
    max_batch_items = 8
    step_tokens = 0

    def __init__(self, key: str, lane_key: str | None = None) -> None:
        self.key = key
        self.lane_key = lane_key or key


def make_flight(
    number: int, *, client: str = "", deaths: int = 0, model: str = "m@1", prompt: int = 2, grammar: str | None = None
) -> GenerateFlight:
    sampling = SamplingParams(max_tokens=8, grammar=None if grammar is None else Grammar("regex", grammar))
    request = GenerateRequest(model=model, prompt_ids=[1, 2], sampling=sampling, client=client)
    flight = GenerateFlight(request=request, **common(number, client, 10, model))
    flight.deaths_without_progress = deaths
    flight.num_prompt_tokens = prompt
    return flight


def make_encode_flight(
    number: int, num_tokens: int, num_texts: int = 1, *, priority: int = 0, step_tokens: int = 0
) -> EncodeFlight:
    """`num_tokens` in each text."""
    inputs = [EncodeInput(ids=[1] * num_tokens)] * num_texts
    request = EncodeRequest(model="m@1", output="embedding", inputs=inputs)
    fields = common(number, "", num_tokens * num_texts, "m@1") | {"priority": priority}
    fields["model"].step_tokens = step_tokens
    return EncodeFlight(request=request, results=[None] * num_texts, **fields)


def common(number: int, client: str, cost: int, model: str) -> dict[str, Any]:
    return {
        "number": number, "model": cast(LoadedModel, NamedModel(model)), "task": "generate", "client": client,
        "priority": 0, "cost_tokens": cost, "num_prompt_tokens": 2, "accepted": 0.0, "deadline": None,
    }  # fmt: skip


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(WorkerConfig(models=[], max_sequences=MAX_SEQUENCES, max_batch_tokens=100))


def numbers(flights: list[Flight]) -> list[int]:
    return [flight.number for flight in flights]


def test_the_worker_is_given_a_full_batch_and_a_few_spares(dispatcher: Dispatcher) -> None:
    for number in range(100):
        dispatcher.enqueue(make_flight(number))
    taken = dispatcher.take()
    assert numbers(taken) == list(range(MAX_SEQUENCES + SPARE_REQUESTS))
    assert dispatcher.take() == []
    dispatcher.forget(taken[0])
    assert numbers(dispatcher.take()) == [MAX_SEQUENCES + SPARE_REQUESTS]


def test_adapters_wait_in_the_line_of_the_checkpoint_that_they_share(dispatcher: Dispatcher) -> None:
    for number in range(100):
        flight = make_flight(number)
        if number % 2:
            flight.model = cast(LoadedModel, NamedModel("adapter@1", "m@1"))
        dispatcher.enqueue(flight)
    inside = dispatcher.take(lambda key: key == "m@1")
    assert numbers(inside) == list(range(MAX_SEQUENCES + SPARE_REQUESTS))
    assert numbers(dispatcher.of("adapter@1")) == list(range(1, 100, 2))
    assert (dispatcher.num_of("m@1"), dispatcher.waiting_in("m@1")) == (50, 100 - len(inside))
    dispatcher.drop("adapter@1")
    assert dispatcher.num_of("adapter@1") == 50


def test_long_prompts_are_given_to_the_worker_as_it_starts_them_so_that_another_client_need_not_wait_for_all(
    dispatcher: Dispatcher,
) -> None:
    """The window is four steps' worth of tokens, 400."""
    flood = [make_flight(number, client="a", prompt=150) for number in range(10)]
    for flight in flood:
        dispatcher.enqueue(flight)
    assert numbers(dispatcher.take()) == list(range(SPARE_PROMPTS))
    dispatcher.enqueue(make_flight(99, client="b", prompt=150))
    assert dispatcher.take() == []
    dispatcher.started(flood[0])
    assert numbers(dispatcher.take()) == [99]
    dispatcher.started(flood[1])
    dispatcher.started(flood[2])
    assert numbers(dispatcher.take()) == [4, 5]


def test_those_that_wait_for_their_grammar_keep_nobody_outside(dispatcher: Dispatcher) -> None:
    for number in range(6):
        dispatcher.enqueue(make_flight(number, prompt=300, grammar="a+"))
    assert numbers(dispatcher.take()) == list(range(6))
    dispatcher.enqueue(make_flight(9, prompt=300))
    assert numbers(dispatcher.take()) == [9]


def test_what_is_unstarted_is_forgotten_with_its_request_and_with_its_worker(dispatcher: Dispatcher) -> None:
    flood = [make_flight(number, prompt=150) for number in range(10)]
    for flight in flood:
        dispatcher.enqueue(flight)
    for flight in dispatcher.take():
        dispatcher.forget(flight)
    assert numbers(dispatcher.take()) == [4, 5, 6, 7]
    for flight in dispatcher.take_back():
        dispatcher.enqueue(flight)
    assert numbers(dispatcher.take()) == [4, 5, 6, 7]


def test_a_more_urgent_request_is_given_to_a_full_worker_which_may_put_others_back(dispatcher: Dispatcher) -> None:
    for number in range(40):
        dispatcher.enqueue(make_flight(number))
    assert len(dispatcher.take()) == MAX_SEQUENCES + SPARE_REQUESTS
    urgent = [make_flight(number) for number in range(100, 140)]
    for flight in urgent:
        flight.priority = 1
        dispatcher.enqueue(flight)
    assert numbers(dispatcher.take()) == list(range(100, 100 + MAX_SEQUENCES + SPARE_REQUESTS))
    assert dispatcher.take() == []


def test_one_checkpoint_does_not_take_the_room_of_another(dispatcher: Dispatcher) -> None:
    for number in range(50):
        dispatcher.enqueue(make_flight(number))
    dispatcher.take()
    dispatcher.enqueue(make_flight(99, model="other@1"))
    assert numbers(dispatcher.take()) == [99]


def test_single_pass_work_is_bounded_by_tokens(dispatcher: Dispatcher) -> None:
    """The batch takes 100, and the worker is given up to 400."""
    for number in range(5):
        dispatcher.enqueue(make_encode_flight(number, 90))
    first = dispatcher.take()
    assert numbers(first) == [0, 1, 2, 3]
    dispatcher.forget(first[0])
    assert numbers(dispatcher.take()) == [4]


def test_requests_of_more_than_a_step_go_two_at_a_time_and_keep_no_smaller_one_outside(dispatcher: Dispatcher) -> None:
    """A query waited for the ends of all bulk requests before it: seconds, beside a step of milliseconds."""
    for number in range(4):
        dispatcher.enqueue(make_encode_flight(number, 5000))
    bulk = dispatcher.take()
    assert numbers(bulk) == [0, 1]
    dispatcher.enqueue(make_encode_flight(4, 10))
    assert numbers(dispatcher.take()) == [4]
    dispatcher.forget(bulk[1])
    assert numbers(dispatcher.take()) == [2]
    assert numbers(dispatcher.take_back()) == [0, 2, 4]
    assert dispatcher.load("")[:2] == (1, 5000)


def test_a_query_has_its_place_beside_bulk_that_runs_and_further_bulk_has_none(dispatcher: Dispatcher) -> None:
    """With `--max-queue-requests 0` queries were refused for as long as any bulk ran."""
    dispatcher.enqueue(make_encode_flight(0, 5000))
    dispatcher.take()
    assert dispatcher.has_seat(make_encode_flight(9, 60))
    assert not dispatcher.has_seat(make_encode_flight(9, 5000))
    dispatcher.enqueue(make_encode_flight(1, 60))
    dispatcher.take()
    assert not dispatcher.has_seat(make_encode_flight(9, 60))
    assert dispatcher.load("").num_requests == 0


def test_full_windows_of_small_requests_keep_no_bulk_outside(dispatcher: Dispatcher) -> None:
    for number in range(6):
        dispatcher.enqueue(make_encode_flight(number, 90))
    dispatcher.enqueue(make_encode_flight(6, 5000))
    assert numbers(dispatcher.take()) == [0, 1, 2, 3, 6]


def test_bulk_that_is_more_urgent_than_all_bulk_inside_need_not_wait_for_it(dispatcher: Dispatcher) -> None:
    flights = [make_encode_flight(number, 5000, priority=number // 2) for number in range(6)]
    for flight in flights:
        dispatcher.enqueue(flight)
        dispatcher.take()
    assert numbers(dispatcher.take_back()) == [0, 1, 2, 4]


def test_a_suspect_of_bulk_leaves_its_queue_as_it_is_let_in(dispatcher: Dispatcher) -> None:
    unproven, suspect = make_encode_flight(1, 10), make_encode_flight(2, 5000)
    suspect.deaths_without_progress = SUSPECT_DEATHS
    dispatcher.enqueue(unproven)
    dispatcher.enqueue(suspect)
    assert numbers(dispatcher.take()) == [1]
    dispatcher.made_progress(unproven)
    assert numbers(dispatcher.take()) == [2]
    assert dispatcher.waiting_in("m@1") == 0
    dispatcher.made_progress(suspect)
    assert dispatcher.take() == []


def test_bulk_that_waits_is_counted_and_is_before_no_smaller_one(dispatcher: Dispatcher) -> None:
    for number in range(4):
        dispatcher.enqueue(make_encode_flight(number, 5000))
    assert dispatcher.has_seat(make_encode_flight(9, 10))
    assert not dispatcher.has_seat(make_encode_flight(9, 5000))
    dispatcher.take()
    assert dispatcher.waiting_in("m@1") == 2
    assert dispatcher.load("") == QueueLoad(num_requests=3, num_tokens=15000, client_requests=3, client_tokens=15000)


def test_how_much_a_step_is_follows_from_what_the_checkpoint_takes_alone(dispatcher: Dispatcher) -> None:
    flights = [make_encode_flight(number, 300, step_tokens=400) for number in range(3)]
    for flight in flights:
        dispatcher.enqueue(flight)
    assert numbers(dispatcher.take()) == [0, 1]
    dispatcher.forget(flights[0])
    assert numbers(dispatcher.take()) == [2]


def test_everything_inside_comes_back_after_a_death_in_its_order(dispatcher: Dispatcher) -> None:
    for number in range(20):
        dispatcher.enqueue(make_flight(number))
    inside = dispatcher.take()
    back = dispatcher.take_back()
    assert numbers(back) == numbers(inside)
    for flight in back:
        dispatcher.enqueue(flight)
    assert numbers(dispatcher.take()) == numbers(inside)


def test_a_suspect_goes_in_alone_and_nobody_after_it_until_it_has_got_somewhere(dispatcher: Dispatcher) -> None:
    suspects = [make_flight(number, deaths=SUSPECT_DEATHS) for number in (1, 2)]
    innocent = make_flight(3)
    for flight in (*suspects, innocent):
        dispatcher.enqueue(flight)
    assert numbers(dispatcher.take()) == [1]
    assert dispatcher.take() == []
    dispatcher.made_progress(suspects[0])
    assert suspects[0].deaths_without_progress == 0
    assert numbers(dispatcher.take()) == [2]
    dispatcher.made_progress(suspects[1])
    assert numbers(dispatcher.take()) == [3]


def test_a_suspect_is_not_mixed_with_requests_that_have_proven_nothing_yet(dispatcher: Dispatcher) -> None:
    fresh = make_flight(1)
    dispatcher.enqueue(fresh)
    assert numbers(dispatcher.take()) == [1]
    dispatcher.enqueue(make_flight(2, deaths=SUSPECT_DEATHS))
    assert dispatcher.take() == []
    dispatcher.made_progress(fresh)
    assert numbers(dispatcher.take()) == [2]


@pytest.mark.parametrize("first", ["m@1", "other@1"])
def test_another_checkpoints_load_does_not_overtake_a_suspect_whose_turn_has_come(
    dispatcher: Dispatcher, first: str
) -> None:
    """It waited for those inside to get somewhere while others were let in all the time, until its deadline."""
    dispatcher.enqueue(make_flight(1, model=first))
    earlier = dispatcher.take()
    dispatcher.enqueue(make_flight(2, model="other@1"))
    earlier += dispatcher.take()
    suspect = make_flight(3, deaths=SUSPECT_DEATHS)
    dispatcher.enqueue(suspect)
    assert dispatcher.take() == []
    for number in (4, 5):
        dispatcher.enqueue(make_flight(number, model="other@1"))
    dispatcher.made_progress(earlier[0])
    assert dispatcher.take() == []
    dispatcher.made_progress(earlier[1])
    assert numbers(dispatcher.take()) == [3]
    assert dispatcher.take() == []
    dispatcher.made_progress(suspect)
    assert numbers(dispatcher.take()) == [4, 5]
    assert dispatcher.waiting_in("m@1") == 0


def test_a_suspect_that_ends_before_it_is_let_in_keeps_nobody_outside(dispatcher: Dispatcher) -> None:
    dispatcher.enqueue(make_flight(1))
    dispatcher.take()
    suspect = make_flight(2, deaths=SUSPECT_DEATHS)
    dispatcher.enqueue(suspect)
    dispatcher.enqueue(make_flight(3, model="other@1"))
    assert dispatcher.take() == []
    dispatcher.forget(suspect)
    assert numbers(dispatcher.take()) == [3]


def test_a_suspect_of_a_checkpoint_that_is_gone_from_the_worker_keeps_nobody_outside(dispatcher: Dispatcher) -> None:
    dispatcher.enqueue(make_flight(1))
    dispatcher.take()
    dispatcher.enqueue(make_flight(2, deaths=SUSPECT_DEATHS))
    assert dispatcher.take() == []
    dispatcher.enqueue(make_flight(3, model="other@1"))
    assert numbers(dispatcher.take(lambda key: key == "other@1")) == [3]


def test_each_death_counts_for_all_that_were_inside_and_for_nobody_else(dispatcher: Dispatcher) -> None:
    flights = [make_flight(number) for number in range(MAX_SEQUENCES + SPARE_REQUESTS + 1)]
    for flight in flights:
        dispatcher.enqueue(flight)
    dispatcher.take()
    dispatcher.take_back()
    assert [flight.deaths_without_progress for flight in flights] == [1] * (len(flights) - 1) + [0]


def test_a_death_in_the_midst_of_a_step_counts_for_those_in_the_step_alone(dispatcher: Dispatcher) -> None:
    """A worker killed again and again while it computed many prompts anew had those convicted that only waited."""
    flights = [make_flight(number) for number in range(4)]
    for flight in flights:
        dispatcher.enqueue(flight)
    dispatcher.take()
    assert numbers(dispatcher.take_back(frozenset({1, 3, 99}))) == [0, 1, 2, 3]
    assert [flight.deaths_without_progress for flight in flights] == [0, 1, 0, 1]


def test_a_grammar_that_is_being_compiled_beside_the_step_is_suspected_with_it(dispatcher: Dispatcher) -> None:
    compiling, compiled = make_flight(1, grammar="a+"), make_flight(2, grammar="b+")
    for flight in (compiling, compiled):
        dispatcher.enqueue(flight)
    dispatcher.take()
    dispatcher.started(compiled)
    dispatcher.take_back(frozenset())
    assert (compiling.deaths_without_progress, compiled.deaths_without_progress) == (1, 0)


def test_a_suspect_that_ends_makes_room_for_the_next(dispatcher: Dispatcher) -> None:
    suspects = [make_flight(number, deaths=SUSPECT_DEATHS) for number in (1, 2)]
    for flight in suspects:
        dispatcher.enqueue(flight)
    dispatcher.take()
    dispatcher.forget(suspects[0])
    assert numbers(dispatcher.take()) == [2]


def test_what_waits_is_counted_in_all_and_per_client_wherever_it_lies(dispatcher: Dispatcher) -> None:
    """What the worker holds beyond its batch was not counted: eight waited before the first of the bound."""
    for number in range(MAX_SEQUENCES + SPARE_REQUESTS):
        dispatcher.enqueue(make_flight(number, client="a"))
    inside = dispatcher.take()
    dispatcher.enqueue(make_flight(100, client="a"))
    dispatcher.enqueue(make_flight(101, client="b"))
    num = SPARE_REQUESTS + 2
    assert dispatcher.load("a") == (num, 10 * num, num - 1, 10 * (num - 1))
    dispatcher.forget(inside[0])
    dispatcher.started(inside[-1])
    assert dispatcher.load("b") == (num - 2, 10 * (num - 2), 1, 10)
    for flight in dispatcher.take_back():
        dispatcher.enqueue(flight)
    assert dispatcher.load("").num_requests == len(inside) - 1 + 2


def test_whoever_finds_a_place_in_the_batch_does_not_wait_and_nobody_else_is_said_not_to(
    dispatcher: Dispatcher,
) -> None:
    flights = [make_flight(number) for number in range(MAX_SEQUENCES)]
    for flight in flights:
        assert dispatcher.has_seat(flight)
        dispatcher.enqueue(flight)
        dispatcher.take()
    assert dispatcher.load("").num_requests == 0
    assert not dispatcher.has_seat(make_flight(9))
    dispatcher.forget(flights[0])
    assert dispatcher.has_seat(make_flight(9))
    dispatcher.enqueue(make_flight(10, deaths=SUSPECT_DEATHS))
    assert not dispatcher.has_seat(make_flight(11))


def test_those_that_the_cache_has_no_room_for_wait_and_nobody_is_let_in_before_them(dispatcher: Dispatcher) -> None:
    flights = [make_flight(number) for number in range(3)]
    for flight in flights:
        dispatcher.enqueue(flight)
    dispatcher.take()
    dispatcher.passed_over("m@1", 2)
    assert dispatcher.load("").num_requests == 2
    assert not dispatcher.has_seat(make_flight(9))
    dispatcher.forget(flights[1])
    dispatcher.forget(flights[2])
    assert dispatcher.load("").num_requests == 1
    dispatcher.passed_over("m@1", 0)
    assert dispatcher.has_seat(make_flight(9))


def test_a_grammar_that_is_being_compiled_takes_a_place_and_blocks_nobody(dispatcher: Dispatcher) -> None:
    dispatcher.enqueue(make_flight(1, grammar="a+"))
    dispatcher.take()
    dispatcher.passed_over("m@1", 1)
    assert dispatcher.load("").num_requests == 1
    assert dispatcher.has_seat(make_flight(2))


def test_a_grammar_that_has_been_compiled_is_no_reason_to_be_left_out(dispatcher: Dispatcher) -> None:
    """Until it gave its first token it was taken for the one that the step left out, and others were let in before the
    one that had no room."""
    started = make_flight(1, grammar="a+")
    for flight in (started, make_flight(2)):
        dispatcher.enqueue(flight)
    dispatcher.take()
    dispatcher.started(started)
    dispatcher.passed_over("m@1", 1)
    assert not dispatcher.has_seat(make_flight(3))
    dispatcher.enqueue(make_flight(4, grammar="b+"))
    dispatcher.take()
    dispatcher.passed_over("m@1", 1)
    assert dispatcher.has_seat(make_flight(3))
    dispatcher.passed_over("m@1", 2)
    assert not dispatcher.has_seat(make_flight(3))


def test_short_texts_wait_beyond_the_number_that_a_step_takes(dispatcher: Dispatcher) -> None:
    """The batch takes 100 tokens, and 8 texts: its tokens alone were counted."""
    flights = [make_encode_flight(number, 2, num_texts) for number, num_texts in enumerate((5, 3, 4))]
    for flight in flights:
        assert dispatcher.has_seat(flight) == (flight is not flights[2])
        dispatcher.enqueue(flight)
        dispatcher.take()
    assert dispatcher.load("")[:2] == (1, 8)
    assert not dispatcher.has_seat(make_encode_flight(9, 2))
    dispatcher.forget(flights[0])
    assert dispatcher.load("")[:2] == (0, 0)
    assert dispatcher.has_seat(make_encode_flight(9, 2))
    assert not dispatcher.has_seat(make_encode_flight(9, 2, 2))


def test_texts_wait_beyond_one_steps_worth_of_tokens(dispatcher: Dispatcher) -> None:
    """The batch takes 100, and the worker is given up to 400."""
    flights = [make_encode_flight(number, 40) for number in range(5)]
    assert [dispatcher.has_seat(flight) for flight in flights[:1]] == [True]
    for flight in flights:
        dispatcher.enqueue(flight)
    assert numbers(dispatcher.take()) == [0, 1, 2, 3, 4]
    assert dispatcher.load("")[:2] == (3, 120)
    dispatcher.forget(flights[1])
    assert dispatcher.load("")[:2] == (2, 80)
    for flight in (flights[0], *flights[2:]):
        assert not dispatcher.has_seat(make_encode_flight(9, 70))
        dispatcher.forget(flight)
    assert dispatcher.has_seat(make_encode_flight(9, 5000))
