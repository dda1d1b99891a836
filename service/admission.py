"""Who may come in: how much may wait, when to come back, and what one key may spend per minute.

Pure logic: time is an argument (`time.monotonic()` seconds), nothing is scheduled, nobody is called. The engine client
asks `QueueLimits` and `DrainRate`; the HTTP layer asks `RateLimiter`. Runs in the API process, on the event loop.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from service.errors import Overloaded

MIN_RETRY_AFTER_SECONDS = 1.0
MAX_RETRY_AFTER_SECONDS = 120.0


class DrainRate:
    """Tokens finished per second, as an exponentially decaying average over about `window_seconds`.

    A sum that decays by exp(-dt / window), divided by the window; the division by (1 - exp(-age / window)) removes
    the bias of the first moments, when the sum is still filling.
    """

    def __init__(self, now: float, *, window_seconds: float = 10.0) -> None:
        self._window_seconds = window_seconds
        self._began = now
        self._updated = now
        self._decayed_sum = 0.0

    def record(self, num_tokens: int, now: float) -> None:
        self._decay(now)
        self._decayed_sum += num_tokens

    def tokens_per_second(self, now: float) -> float:
        self._decay(now)
        filled = 1.0 - math.exp(-max(now - self._began, 0.0) / self._window_seconds)
        return self._decayed_sum / (self._window_seconds * filled) if filled > 0.0 else 0.0

    def retry_after(self, num_tokens_ahead: int, now: float) -> float:
        """Seconds until `num_tokens_ahead` should be done; the shortest advice while nothing has been measured."""
        rate = self.tokens_per_second(now)
        seconds = num_tokens_ahead / rate if rate > 0.0 else MIN_RETRY_AFTER_SECONDS
        return min(max(seconds, MIN_RETRY_AFTER_SECONDS), MAX_RETRY_AFTER_SECONDS)

    def _decay(self, now: float) -> None:
        elapsed = now - self._updated
        if elapsed > 0.0:
            self._decayed_sum *= math.exp(-elapsed / self._window_seconds)
            self._updated = now


class QueueFull(Overloaded):
    """`cause` is the metrics' word for it: `queue_requests`, `queue_tokens` or `queue_share`."""

    def __init__(self, message: str, *, cause: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.cause = cause


class QueueLoad(NamedTuple):
    """What waits now: in all, and of the client that asks."""

    num_requests: int
    num_tokens: int
    client_requests: int = 0
    client_tokens: int = 0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait. A named client may hold `client_share` of it, so that others always find room.

    A request larger than `max_tokens` is let into an empty queue, or it could never run. What bounds it then: the
    context, where it generates; where it reads, the size of a body (and how often a context is read for a question).
    """

    max_requests: int
    max_tokens: int
    client_share: float = 0.5

    def check(self, load: QueueLoad, *, num_tokens: int, client: str, retry_after: float) -> None:
        """Raises `QueueFull` unless a request of `num_tokens` may join the queue. `client` is "" without keys."""
        if load.num_requests + 1 > self.max_requests:
            message = f"the queue is full: {load.num_requests:,} requests wait; the limit is {self.max_requests:,}"
            raise QueueFull(message, cause="queue_requests", retry_after=retry_after)
        if load.num_requests and load.num_tokens + num_tokens > self.max_tokens:
            message = (
                f"the queue is full: {load.num_tokens:,} tokens wait and this request adds {num_tokens:,}; "
                f"the limit is {self.max_tokens:,}"
            )
            raise QueueFull(message, cause="queue_tokens", retry_after=retry_after)
        if client and load.client_requests and self._over_share(load, num_tokens):
            message = (
                f"your share of the queue is full: {load.client_requests:,} requests with {load.client_tokens:,} "
                f"tokens of this key wait; one key may hold {self.client_share:.0%} of the queue"
            )
            raise QueueFull(message, cause="queue_share", retry_after=retry_after)

    def _over_share(self, load: QueueLoad, num_tokens: int) -> bool:
        return (
            load.client_requests + 1 > self.client_share * self.max_requests
            or load.client_tokens + num_tokens > self.client_share * self.max_tokens
        )


class TokenBucket:
    """Holds up to `per_minute`, refilled evenly; may be overdrawn, and then refuses until it is paid back."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._updated = now

    def level(self, now: float) -> float:
        elapsed = max(now - self._updated, 0.0)
        self._level = min(self._level + elapsed * self.per_minute / 60.0, float(self.per_minute))
        self._updated = max(now, self._updated)
        return self._level

    def take(self, amount: float, now: float) -> None:
        self._level = min(self.level(now) - amount, float(self.per_minute))

    def seconds_until(self, amount: float, now: float) -> float:
        """Until `amount` is there, or the bucket is full if that is less."""
        missing = min(amount, float(self.per_minute)) - self.level(now)
        return max(missing, 0.0) * 60.0 / self.per_minute

    def seconds_until_full(self, now: float) -> float:
        return (self.per_minute - self.level(now)) * 60.0 / self.per_minute


class RateDecision(NamedTuple):
    """`refused` names the limit that was hit ("requests" or "tokens"); `headers` go onto the response either way."""

    refused: str | None
    retry_after: float
    headers: list[tuple[bytes, bytes]]


class _ClientBuckets(NamedTuple):
    requests: TokenBucket | None
    tokens: TokenBucket | None


class RateLimiter:
    """Requests and tokens per minute for each client; a client idle long enough to be full again is forgotten.

    A request's tokens are first estimated (`admit`), and corrected when they are known (`settle`).
    """

    MAX_CLIENTS = 10_000

    def __init__(self, *, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._requests_per_minute = requests_per_minute
        self._tokens_per_minute = tokens_per_minute
        self._clients: dict[str, _ClientBuckets] = {}

    @property
    def enabled(self) -> bool:
        return self._requests_per_minute is not None or self._tokens_per_minute is not None

    def admit(self, client: str, *, estimated_tokens: int, now: float) -> RateDecision:
        """Takes one request and `estimated_tokens` from the client, unless one of its buckets is empty."""
        buckets = self._buckets(client, now)
        refused, retry_after = None, 0.0
        if buckets.requests is not None and buckets.requests.level(now) < 1.0:
            refused, retry_after = "requests", buckets.requests.seconds_until(1.0, now)
        if buckets.tokens is not None and buckets.tokens.level(now) < min(estimated_tokens, buckets.tokens.per_minute):
            refused = refused or "tokens"
            retry_after = max(retry_after, buckets.tokens.seconds_until(estimated_tokens, now))
        if refused is None:
            if buckets.requests is not None:
                buckets.requests.take(1.0, now)
            if buckets.tokens is not None:
                buckets.tokens.take(estimated_tokens, now)
        return RateDecision(refused, retry_after, self._headers(buckets, now))

    def settle(self, client: str, *, estimated_tokens: int, actual_tokens: int, now: float) -> None:
        """Replaces what `admit` took for a request by what it used."""
        buckets = self._buckets(client, now)
        if buckets.tokens is not None:
            buckets.tokens.take(actual_tokens - estimated_tokens, now)

    def _buckets(self, client: str, now: float) -> _ClientBuckets:
        found = self._clients.get(client)
        if found is None:
            if len(self._clients) >= self.MAX_CLIENTS:
                self._forget_idle(now)
            requests, tokens = self._requests_per_minute, self._tokens_per_minute
            found = self._clients[client] = _ClientBuckets(
                TokenBucket(requests, now) if requests is not None else None,
                TokenBucket(tokens, now) if tokens is not None else None,
            )
        return found

    def _forget_idle(self, now: float) -> None:
        for name, buckets in list(self._clients.items()):
            if all(bucket is None or bucket.seconds_until_full(now) <= 0.0 for bucket in buckets):
                del self._clients[name]

    @staticmethod
    def _headers(buckets: _ClientBuckets, now: float) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*` names; the reset is when the bucket is full again, like `6.25s`."""
        headers: list[tuple[bytes, bytes]] = []
        for name, bucket in (("requests", buckets.requests), ("tokens", buckets.tokens)):
            if bucket is not None:
                values = (
                    ("limit", str(bucket.per_minute)),
                    ("remaining", str(max(int(bucket.level(now)), 0))),
                    ("reset", f"{bucket.seconds_until_full(now):.3f}s"),
                )
                headers += [(f"x-ratelimit-{kind}-{name}".encode(), value.encode()) for kind, value in values]
        return headers
