"""The scheduler's laws, one example each; `test_scheduler_histories.py` looks for the exceptions."""

from typing import Any

import pytest

from model.batch import BeamParams, Grammar


def numbers(count: int, start: int = 100) -> list[int]:
    return list(range(start, start + count))


def test_decoding_requests_get_their_token_in_every_step_of_a_long_prefill(
    make_service: Any, make_request: Any
) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=8, max_model_len=64)
    decoding = [make_request([7, index], max_tokens=20) for index in range(2)]
    for request in decoding:
        service.add(request)
    service.step()
    long = make_request(numbers(30))
    service.add(long)
    for _ in range(5):
        batch = service.step()
        assert [len(row.token_ids) for row in batch.rows] == [1, 1, 6]
    service.finish()


def test_a_prompt_takes_no_more_than_a_chunk_of_a_step(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=16, prefill_chunk=5, max_model_len=64)
    for start in (100, 200):
        service.add(make_request(numbers(12, start)))
    assert [len(row.token_ids) for row in service.step().rows] == [5, 5]
    service.finish()


def test_a_step_is_given_the_time_of_its_own_tokens_and_not_of_all_that_wait(
    make_service: Any, make_request: Any
) -> None:
    """A worker that hung before long prompts was given hours; the later chunks of a prompt counted as a token each."""
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=8, max_model_len=64)
    for start in (100, 200, 300):
        service.add(make_request(numbers(20, start)))
    foretold = []
    while service.scheduler.has_work:
        foretold.append((service.scheduler.next_step_tokens, service.step().num_tokens))
    assert all(8 >= most >= found for most, found in foretold)
    assert foretold[:3] == [(8, 8)] * 3
    assert foretold[-1] == (1, 1)


def test_a_source_that_is_longer_than_a_step_is_given_its_time(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=8, max_model_len=64)
    service.add(make_request([1], encoder_ids=numbers(20)))
    assert service.scheduler.next_step_tokens == 21
    assert service.step().num_tokens == 21
    service.finish()


def test_requests_of_one_prompt_share_it_within_one_step(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=64, max_model_len=64)
    for seed in range(3):
        service.add(make_request(numbers(18), seed=seed))
    batch = service.step()
    assert [len(row.token_ids) for row in batch.rows] == [18, 2, 2]
    service.finish()
    assert [service.cached[number] for number in range(3)] == [0, 16, 16]


def test_requests_of_one_long_prompt_compute_it_once_between_them(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=60, block_size=4, max_batch_tokens=16, prefill_chunk=8, max_model_len=64)
    for seed in range(2):
        service.add(make_request(numbers(40), seed=seed, max_tokens=1))
    service.finish()
    assert sum(batch.num_tokens for batch in service.batches) == 40 + 4


def test_a_prompt_that_is_cached_whole_is_computed_from_its_last_block(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=64, max_model_len=64)
    service.add(make_request(numbers(8)))
    service.finish()
    again = make_request(numbers(8))
    service.add(again)
    [row] = service.step().rows
    assert (row.start, len(row.token_ids), row.samples) == (4, 4, True)
    assert service.cached[again.request_id] == 4
    service.finish()


def test_prompt_logprobs_are_computed_and_not_read_from_the_cache(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=64, max_model_len=64)
    service.add(make_request(numbers(10)))
    service.finish()
    scored = make_request(numbers(10), prompt_logprobs=0)
    service.add(scored)
    assert service.step().rows[0].start == 0
    service.finish()
    assert len(service.prompt_logprobs[scored.request_id]) == 9


@pytest.mark.parametrize(("first", "cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (20, 8)])
def test_blocks_before_the_first_wanted_logprob_come_from_the_cache(
    first: int, cached: int, make_service: Any, make_request: Any
) -> None:
    """The token before the first one that is reported is computed: its logits are what is reported."""
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=64, max_model_len=64)
    service.add(make_request(numbers(12)))
    service.finish()
    scored = make_request(numbers(12), prompt_logprobs=0, prompt_logprobs_start=first, max_tokens=0)
    service.add(scored)
    assert service.step().rows[0].start == cached
    service.finish()
    assert len(service.prompt_logprobs.get(scored.request_id, [])) == max(0, 12 - max(first, 1))


def test_endings_of_one_prompt_share_its_blocks_within_a_step(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=64, max_model_len=64)
    for ending in range(3):
        prompt = [*numbers(10), 100 + ending, 200 + ending]
        service.add(make_request(prompt, prompt_logprobs=0, prompt_logprobs_start=10, max_tokens=0))
    assert [row.start for row in service.step().rows] == [0, 8, 8]
    service.finish()


def test_prompt_logprobs_without_output_end_with_the_prompt(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4)
    scored = make_request(numbers(10), prompt_logprobs=0, max_tokens=0)
    service.add(scored)
    service.finish()
    assert service.ends[scored.request_id] == "length"
    assert service.given[scored.request_id] == []
    assert len(service.prompt_logprobs[scored.request_id]) == 9


def test_tenants_do_not_share_blocks(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_batch_tokens=64, max_model_len=64)
    for salt in ("one", "two"):
        service.add(make_request(numbers(12), cache_salt=salt))
    assert [row.start for row in service.step().rows] == [0, 0]
    service.finish()


def test_waiting_requests_go_by_priority_and_then_by_arrival(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_sequences=1)
    order = [make_request([index], priority=priority, max_tokens=1) for index, priority in enumerate([0, 0, 2, 1])]
    for request in order:
        service.add(request)
    served = [service.step().rows[0].sequence_id for _ in order]
    assert served == [2, 3, 0, 1]


def test_a_more_urgent_request_takes_the_place_of_the_least_urgent(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_sequences=2)
    first, second = make_request([1], max_tokens=9), make_request([2], max_tokens=9)
    service.add(first)
    service.add(second)
    service.step()
    urgent = make_request([3], priority=1, max_tokens=3)
    service.add(urgent)
    rows = [row.sequence_id for row in service.step().rows]
    assert rows == [urgent.request_id, first.request_id]
    assert service.scheduler.num_preempted == 1
    service.finish()


def test_equal_priority_never_preempts_to_be_admitted(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=4, max_sequences=1)
    service.add(make_request([1], max_tokens=9))
    service.step()
    service.add(make_request([2], arrival=-1.0))
    for _ in range(5):
        assert [row.sequence_id for row in service.step().rows] == [0]
    service.finish()


def test_preempted_request_resumes_with_the_same_tokens(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=8, block_size=2, max_batch_tokens=16, prefix_caching=False, max_model_len=16)
    for index in range(3):
        service.add(make_request([index, index], max_tokens=10))
    num_preempted = 0
    while service.scheduler.has_work:
        service.step()
        num_preempted += service.scheduler.num_preempted
    assert num_preempted > 0
    service.finish()
    assert list(service.ends) == [0, 1, 2]


def test_the_latest_of_equals_gives_way(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=6, block_size=2, max_batch_tokens=16, prefix_caching=False, max_model_len=12)
    for index in range(2):
        service.add(make_request([index, index, index], max_tokens=9))
    while service.scheduler.num_preempted == 0:
        batch = service.step()
    assert [row.sequence_id for row in batch.rows] == [0]
    service.finish()


def test_admission_leaves_the_running_room_to_grow(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=60, block_size=2, max_batch_tokens=64, max_sequences=8, max_model_len=120)
    for start in (0, 20, 40):
        service.add(make_request(numbers(39, 1000 * start), max_tokens=30))
    service.step()
    assert service.scheduler.num_running == 2
    service.add(make_request(numbers(36, 7), max_tokens=30, priority=-1))
    service.step()
    assert service.scheduler.num_running == 2, "it would fit, but leave no block for each row"
    service.finish()


@pytest.mark.parametrize("field", ["prompt", "memory", "source", "beams", "empty", "negative", "huge"])
def test_what_could_not_run_alone_is_refused_with_the_numbers(field: str, make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=10, block_size=2, max_sequences=4, max_model_len=18)
    beams = BeamParams(num_beams=5)
    request, figures = {
        "prompt": (make_request(numbers(18)), ["18 tokens", "limit is 17"]),
        "memory": (make_request([1], max_tokens=9, beam=BeamParams(num_beams=3)), ["30 tokens", "holds 20"]),
        "source": (make_request([1], max_tokens=2, encoder_ids=numbers(40)), ["40 encoded", "holds 20"]),
        "beams": (make_request([1], max_tokens=1, beam=beams), ["5 beams", "limit is 4"]),
        "empty": (make_request([]), ["no tokens"]),
        "negative": (make_request([1, -5]), ["token id -5"]),
        "huge": (make_request([1], encoder_ids=[2**40]), ["token id 1099511627776"]),
    }[field]
    service.add(request)
    assert service.ends == {request.request_id: "error"}
    for figure in figures:
        assert figure in service.errors[request.request_id]
    too_long = field in ("prompt", "memory", "source")
    assert service.blames[request.request_id] == ("context" if too_long else "request")
    assert not service.scheduler.has_work


def test_the_whole_cache_is_enough_for_the_longest_text(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=8, block_size=2, max_model_len=100)
    assert service.scheduler.max_model_len == 16
    request = make_request(numbers(5), max_tokens=1000)
    service.add(request)
    service.finish()
    assert service.ends[request.request_id] == "length"
    assert len(service.given[request.request_id]) == 11


def test_a_request_alone_may_fill_the_whole_cache(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=8, block_size=2)
    service.add(make_request(numbers(15)))
    service.step()
    assert service.ends == {0: "length"}


def test_cancel_frees_the_blocks_at_once(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=10, block_size=2)
    request = make_request(numbers(7))
    service.add(request)
    service.step()
    assert service.blocks.num_free == 6
    service.cancel(request.request_id)
    assert service.blocks.num_free == 10
    assert service.ends == {request.request_id: "cancelled"}
    assert service.scheduler.cancel(request.request_id) is None


def test_deadlines_hold_in_the_queue_in_prefill_and_in_decode(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2, max_batch_tokens=4, max_sequences=2, max_model_len=60)
    decoding = make_request([1], max_tokens=30, deadline=5.0)
    prefilling = make_request(numbers(20), deadline=4.0)
    queued = make_request([2], deadline=3.0)
    for request in (decoding, prefilling, queued):
        service.add(request)
    for now, ended in ((3.0, [queued]), (4.0, [queued, prefilling]), (5.0, [queued, prefilling, decoding])):
        service.step()
        assert len(service.ends) == len(ended) - 1
        service.now = now
        service.step()
        assert list(service.ends) == [request.request_id for request in ended]
    assert set(service.ends.values()) == {"deadline"}
    assert service.given[decoding.request_id]
    assert service.blocks.num_free == service.blocks.num_blocks


def test_a_deadline_holds_while_the_grammar_compiles(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2)
    request = make_request([1], grammar=Grammar("regex", "a+"), deadline=3.0)
    service.add(request)
    assert not service.scheduler.has_work
    service.now = 3.0
    service.step()
    assert service.ends == {request.request_id: "deadline"}
    assert service.scheduler.num_waiting == 0


def test_a_step_that_outlasts_the_deadline_still_gives_its_token(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2)
    request = make_request([1], deadline=1.0)
    service.add(request)
    service.step(between=lambda: setattr(service, "now", 2.0))
    assert service.ends == {request.request_id: "deadline"}
    assert len(service.given[request.request_id]) == 1


def test_replayed_ids_count_and_are_not_delivered_again(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2)
    answer, _ = make_request([1, 2], max_tokens=6).answer(24)
    request = make_request([1, 2], max_tokens=6, output_ids=answer[:4])
    service.add(request)
    [row] = service.step().rows
    assert row.token_ids == [1, 2, *answer[:4]]
    service.finish()
    assert service.given[request.request_id] == answer


def test_a_replay_with_nothing_left_to_do_ends_at_once(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2)
    service.add(make_request([1], max_tokens=3, output_ids=[4, 5, 6]))
    service.add(make_request([1], max_tokens=9, output_ids=[4, 5], stop_ids=(5,)))
    assert service.ends == {0: "length", 1: "stop"}


def test_a_stop_id_is_the_last_id_given(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2)
    tokens, _ = make_request([1], max_tokens=8).answer(24)
    request = make_request([1], max_tokens=8, stop_ids=(tokens[2],))
    service.add(request)
    service.finish()
    assert service.ends[request.request_id] == "stop"
    assert service.given[request.request_id][-1] == tokens[2]


def test_a_request_waits_for_its_grammar_and_for_nobody_else_s(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2)
    grammar = Grammar("regex", "a+")
    first, second = make_request([1], grammar=grammar), make_request([2], grammar=grammar)
    for request in (first, second, make_request([3])):
        service.add(request)
    assert [row.sequence_id for row in service.step().rows] == [2]
    service.scheduler.grammar_ready(first.request_id)
    assert sorted(row.sequence_id for row in service.step().rows) == [0, 2]
    service.take(service.scheduler.grammar_failed(second.request_id, "no such grammar"))
    assert service.errors[second.request_id] == "no such grammar"
    service.finish()


def test_a_poisoned_request_fails_alone(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=60, block_size=2, max_sequences=8, max_batch_tokens=64)
    for index in range(7):
        service.add(make_request(numbers(5, index), poisons=index == 4))
    service.finish()
    assert [number for number, end in service.ends.items() if end == "error"] == [4]
    assert service.errors[4] == "the step failed"


def test_a_step_that_fails_once_costs_nobody_an_answer(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=60, block_size=2, max_sequences=8, max_batch_tokens=64)
    for index in range(4):
        service.add(make_request(numbers(5, index)))
    service.step()
    service.step(fails=True)
    service.finish()
    assert set(service.ends.values()) == {"length"}


def test_a_failed_step_costs_no_earlier_step_s_blocks(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=60, block_size=2, max_batch_tokens=64)
    for start in (100, 200):
        service.add(make_request(numbers(8, start)))
    service.step()
    service.step(fails=True)
    assert service.scheduler.num_running == 0
    assert [row.start for row in service.step().rows] == [8]
    assert [row.start for row in service.step().rows] == [8]
    service.finish()


def test_blocks_of_a_failed_step_are_not_found(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=60, block_size=2, max_batch_tokens=64)
    service.add(make_request(numbers(8), poisons=True))
    service.step()
    assert service.ends == {0: "error"}
    assert service.blocks.num_cached == 0


def test_blocks_of_a_request_that_came_out_wrong_are_not_found(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=60, block_size=2, max_batch_tokens=64)
    service.add(make_request(numbers(8), fails_at=3))
    service.finish()
    assert service.ends == {0: "error"}
    assert service.errors[0] == "not finite"
    assert service.blocks.num_cached == 0


def test_a_source_longer_than_a_step_runs_alone_and_not_twice_in_a_row(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=2, max_batch_tokens=8, max_sequences=4, max_model_len=30)
    service.add(make_request([2], encoder_ids=[1, 2, 3], max_tokens=20))
    service.step()
    for start in (100, 200):
        service.add(make_request([2], encoder_ids=numbers(12, start), max_tokens=4))
    rows = [[row.sequence_id for row in service.step().rows] for _ in range(4)]
    assert rows == [[1], [0, 1], [2], [0, 1, 2]]
    service.finish()


def test_long_sources_of_short_requests_follow_one_another(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=2, max_batch_tokens=8)
    for start in (100, 200):
        service.add(make_request([2], encoder_ids=numbers(12, start), max_tokens=1))
    assert [[row.sequence_id for row in service.step().rows] for _ in range(2)] == [[0], [1]]


def test_a_long_source_displaces_nobody_of_its_own_priority(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=2, max_batch_tokens=8, max_sequences=1)
    for start in (100, 200):
        service.add(make_request([2], encoder_ids=numbers(12, start), max_tokens=3))
    assert [[row.sequence_id for row in service.step().rows] for _ in range(4)] == [[0], [0], [0], [1]]
    service.finish()


def test_a_source_of_which_a_part_was_evicted_is_encoded_again(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=20, block_size=2, max_batch_tokens=8, max_model_len=40)
    service.add(make_request([2], encoder_ids=numbers(12), max_tokens=1))
    service.finish()
    filler = make_request(numbers(31), max_tokens=1)
    service.add(filler)
    service.finish()
    assert 0 < service.blocks.num_cached - 15 < 6, "a part of the source is left"
    service.add(make_request([5], max_tokens=5))
    service.step()
    service.add(make_request([2], encoder_ids=numbers(12), max_tokens=4))
    assert [row.encode for row in service.step().rows] == [True]
    service.finish()


def test_one_source_is_encoded_once(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=4, max_batch_tokens=32)
    for seed in range(2):
        service.add(make_request([2], encoder_ids=numbers(10), seed=seed))
    assert [row.encode for row in service.step().rows] == [True, False]
    service.finish()
    service.add(make_request([2], encoder_ids=numbers(10), seed=5))
    assert [row.encode for row in service.step().rows] == [False]
    service.finish()


def test_decoder_blocks_are_shared_under_one_source_alone(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=4, max_batch_tokens=64, max_model_len=30)
    for source in ([1, 2, 3], [1, 2, 3], [1, 2]):
        service.add(make_request(numbers(10), encoder_ids=source))
    assert [row.start for row in service.step().rows] == [0, 8, 0]
    service.finish()


def test_a_beam_search_starts_from_its_beginning_whatever_it_comes_with(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=4)
    request = make_request([2], max_tokens=4, beam=BeamParams(num_beams=2))
    sequence = request.sequence()
    sequence.output_ids = [5, 6, 7]
    service.runner.add(request)
    assert service.scheduler.add(sequence, 0.0) is None
    assert service.scheduler.schedule(0.0).rows[0].token_ids == [2]


def test_beams_run_together_or_not_at_all(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=4, max_batch_tokens=32, max_sequences=5)
    beam = BeamParams(num_beams=3)
    for seed in range(2):
        service.add(make_request([2], encoder_ids=numbers(3, seed), max_tokens=6, beam=beam))
    widths = [len(service.step().rows) for _ in range(3)]
    assert widths == [1, 3, 3]
    service.finish()


def test_a_branch_that_is_cached_further_waits_for_the_others(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=90, block_size=2, max_batch_tokens=20, prefill_chunk=2, max_model_len=40)
    service.add(make_request([2], max_tokens=16, beam=BeamParams(num_beams=2)))
    planner = service.scheduler._planner
    while not planner.running or len(planner.running[0].branches) < 2 or planner.running[0].branches[0].num_tokens < 12:
        service.step()
    [sequence] = planner.running
    planner._preempt(sequence)
    found = [service.blocks.find(digest) for digest in sequence.branches[1].chain]
    service.blocks.forget([block for block in found if block is not None])
    steps = [service.step().rows for _ in range(4)]
    assert [[len(row.token_ids) for row in rows] for rows in steps] == [[2, 2], [2, 2], [1, 2], [1, 2]]
    assert [any(row.samples for row in rows) for rows in steps] == [False, False, False, True]
    assert all(row.samples for row in steps[-1])
    service.finish()


def test_preempted_beams_resume_with_the_same_answer(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=14, block_size=2, max_batch_tokens=9, max_sequences=4, max_model_len=20)
    searching = make_request([2], encoder_ids=numbers(4), max_tokens=6, beam=BeamParams(num_beams=3), priority=-1)
    service.add(searching)
    for _ in range(3):
        service.step()
    service.add(make_request(numbers(14), max_tokens=2))
    service.step()
    service.add(make_request(numbers(14, 1), max_tokens=2, priority=1))
    num_preempted = 0
    while service.scheduler.has_work:
        service.step()
        num_preempted += service.scheduler.num_preempted
    assert num_preempted > 0
    service.finish()
    assert set(service.ends.values()) <= {"stop", "length"}
