"""Queue limits, the measured drain rate and its advice, rates per key: pure functions of time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import DrainRate, QueueFull, QueueLimits, QueueLoad, RateLimiter, TokenBucket


def test_steady_drain_rate_is_measured_right_from_the_start():
    rate = DrainRate(now=0.0, window_seconds=10.0)
    for tick in range(1, 31):
        rate.record(100, now=tick * 0.1)
    assert rate.tokens_per_second(3.0) == pytest.approx(1000, rel=0.02)


def test_drain_rate_follows_a_change_within_a_few_windows():
    rate = DrainRate(now=0.0, window_seconds=10.0)
    for second in range(1, 101):
        rate.record(1000, now=float(second))
    for second in range(101, 161):
        rate.record(100, now=float(second))
    assert rate.tokens_per_second(160.0) == pytest.approx(100, rel=0.1)


def test_retry_after_is_what_waits_divided_by_the_rate():
    rate = DrainRate(now=0.0)
    for tick in range(1, 101):
        rate.record(50, now=tick * 0.1)
    assert rate.retry_after(10_000, now=10.0) == pytest.approx(20.0, rel=0.05)


@pytest.mark.parametrize(("ahead", "expected"), [(0, 1.0), (10, 1.0), (10**9, 120.0)])
def test_retry_after_is_never_less_than_a_second_nor_more_than_two_minutes(ahead, expected):
    rate = DrainRate(now=0.0)
    rate.record(1000, now=1.0)
    assert rate.retry_after(ahead, now=1.0) == expected


def test_retry_after_is_short_while_nothing_has_been_measured():
    assert DrainRate(now=0.0).retry_after(10**6, now=5.0) == 1.0


def check(limits, load, *, num_tokens=1, client=""):
    limits.check(load, num_tokens=num_tokens, client=client, retry_after=7.0)


@pytest.mark.parametrize(
    ("load", "num_tokens", "client", "cause"),
    [
        (QueueLoad(10, 0), 1, "", "queue_requests"),
        (QueueLoad(1, 95), 6, "", "queue_tokens"),
        (QueueLoad(5, 10, 5, 10), 1, "alice", "queue_share"),
        (QueueLoad(2, 50, 1, 45), 6, "alice", "queue_share"),
    ],
)
def test_full_queue_refuses_with_cause_numbers_and_retry_after(load, num_tokens, client, cause):
    with pytest.raises(QueueFull) as caught:
        check(QueueLimits(10, 100), load, num_tokens=num_tokens, client=client)
    assert caught.value.cause == cause
    assert caught.value.status == 429
    assert caught.value.retry_after == 7.0


@pytest.mark.parametrize(
    ("load", "num_tokens", "client"),
    [
        (QueueLoad(9, 0), 1, ""),
        (QueueLoad(1, 95), 5, ""),
        (QueueLoad(0, 0), 1000, ""),
        (QueueLoad(9, 50, 0, 0), 40, "bob"),
        (QueueLoad(5, 10, 5, 10), 1, ""),
    ],
)
def test_queue_with_room_lets_in(load, num_tokens, client):
    check(QueueLimits(10, 100), load, num_tokens=num_tokens, client=client)


def test_flooding_client_leaves_room_for_another():
    limits, waiting = QueueLimits(10, 1000), 0
    while True:
        try:
            check(limits, QueueLoad(waiting, waiting, waiting, waiting), client="flood")
        except QueueFull:
            break
        waiting += 1
    assert waiting == 5
    check(limits, QueueLoad(waiting, waiting, 0, 0), client="calm")


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 30)), max_size=50))
def test_token_bucket_never_gives_more_than_its_rate_allows(steps):
    bucket, now, taken = TokenBucket(60, now=0.0), 0.0, 0.0
    for elapsed, amount in steps:
        now += elapsed
        if bucket.level(now) >= amount:
            bucket.take(amount, now)
            taken += amount
        assert bucket.level(now) <= 60
        assert taken <= 60 + now * 1.0 + 1e-6


@given(st.floats(0.1, 60), st.floats(0, 60))
def test_token_bucket_has_the_amount_when_it_said_it_would(amount, taken):
    bucket = TokenBucket(60, now=0.0)
    bucket.take(taken, 0.0)
    wait = bucket.seconds_until(amount, 0.0)
    assert bucket.level(wait) >= amount - 1e-6


def headers_of(decision):
    return {name.decode(): value.decode() for name, value in decision.headers}


def test_requests_beyond_the_rate_are_refused_until_the_time_it_says():
    limiter = RateLimiter(requests_per_minute=2, tokens_per_minute=None)
    decisions = [limiter.admit("alice", estimated_tokens=0, now=0.0) for _ in range(3)]
    assert [decision.refused for decision in decisions] == [None, None, "requests"]
    assert decisions[2].retry_after == pytest.approx(30.0)
    assert limiter.admit("alice", estimated_tokens=0, now=29.0).refused == "requests"
    assert limiter.admit("alice", estimated_tokens=0, now=30.1).refused is None


def test_one_clients_rate_is_not_anothers():
    limiter = RateLimiter(requests_per_minute=1, tokens_per_minute=None)
    assert limiter.admit("alice", estimated_tokens=0, now=0.0).refused is None
    assert limiter.admit("bob", estimated_tokens=0, now=0.0).refused is None
    assert limiter.admit("alice", estimated_tokens=0, now=0.0).refused == "requests"


def test_headers_say_limit_remaining_and_reset_as_openai_does():
    limiter = RateLimiter(requests_per_minute=60, tokens_per_minute=6000)
    assert headers_of(limiter.admit("alice", estimated_tokens=100, now=0.0)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5900",
        "x-ratelimit-reset-tokens": "1.000s",
    }


def test_tokens_used_beyond_the_estimate_are_owed():
    limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=60)
    assert limiter.admit("alice", estimated_tokens=10, now=0.0).refused is None
    limiter.settle("alice", estimated_tokens=10, actual_tokens=90, now=0.0)
    refused = limiter.admit("alice", estimated_tokens=5, now=29.0)
    assert refused.refused == "tokens"
    assert refused.retry_after == pytest.approx(6.0)
    assert limiter.admit("alice", estimated_tokens=5, now=35.1).refused is None


def test_tokens_estimated_but_not_used_are_given_back():
    limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=100)
    limiter.admit("alice", estimated_tokens=100, now=0.0)
    assert limiter.admit("alice", estimated_tokens=50, now=0.0).refused == "tokens"
    limiter.settle("alice", estimated_tokens=100, actual_tokens=10, now=0.0)
    assert limiter.admit("alice", estimated_tokens=50, now=0.0).refused is None


def test_request_larger_than_the_bucket_is_let_in_when_it_is_full():
    limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=100)
    assert limiter.admit("alice", estimated_tokens=1000, now=0.0).refused is None
    assert limiter.admit("alice", estimated_tokens=0, now=0.0).refused == "tokens"


def test_idle_clients_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(RateLimiter, "MAX_CLIENTS", 10)
    limiter = RateLimiter(requests_per_minute=60, tokens_per_minute=None)
    for number in range(100):
        limiter.admit(f"client-{number}", estimated_tokens=0, now=number * 10.0)
    assert len(limiter._clients) <= 10


def test_without_limits_the_limiter_is_off():
    assert not RateLimiter(requests_per_minute=None, tokens_per_minute=None).enabled
