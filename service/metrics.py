"""Everything that is counted and timed, under one prefix, in a registry of its own.

Knows names, labels and buckets; not who calls. Hot paths fetch their labelled children once (`request_metrics`,
`model_metrics`) and then only add. Runs in the API process, on the event loop.
"""

import asyncio
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

PREFIX = "slimpajama"
LATENCY_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LENGTH_BUCKETS = (*SIZE_BUCKETS, 32768)
OUTCOMES = ("stop", "length", "cancelled", "deadline", "error")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_MODEL = ("model", "version")
_TASK = ("model", "version", "task")


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """The series of one (model, version, task). Times in seconds."""

    num_accepted: Counter
    outcomes: dict[str, Counter]
    prompt_tokens: Counter
    cached_tokens: Counter
    generated_tokens: Counter
    request_prompt_tokens: Histogram
    request_generated_tokens: Histogram
    first_token_seconds: Histogram
    inter_token_seconds: Histogram
    queue_seconds: Histogram
    prefill_seconds: Histogram
    decode_seconds: Histogram
    request_seconds: Histogram

    def accepted(self) -> None:
        self.num_accepted.inc()

    def outcome(self, outcome: str, *, seconds: float) -> None:
        """How an accepted request ended, and how long it was with us; called exactly once for each."""
        self.outcomes[outcome].inc()
        self.request_seconds.observe(seconds)

    def tokens(self, *, prompt: int = 0, cached: int = 0, generated: int = 0) -> None:
        if prompt:
            self.prompt_tokens.inc(prompt)
        if cached:
            self.cached_tokens.inc(cached)
        if generated:
            self.generated_tokens.inc(generated)

    def lengths(self, *, prompt: int, generated: int | None) -> None:
        """Of a request that has ended and was computed; `generated` is None where it has had no token."""
        self.request_prompt_tokens.observe(prompt)
        if generated is not None:
            self.request_generated_tokens.observe(generated)

    def queued(self, seconds: float) -> None:
        """From acceptance to the first step that holds the request."""
        self.queue_seconds.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """From acceptance to the first token out."""
        self.first_token_seconds.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self.inter_token_seconds.observe(seconds)

    def prefilled(self, seconds: float) -> None:
        """From the first step that holds the request to its first token."""
        self.prefill_seconds.observe(seconds)

    def decoded(self, seconds: float) -> None:
        """From the first token to the last."""
        self.decode_seconds.observe(seconds)


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """The series of one (model, version): the state of its lane in the worker."""

    waiting: Gauge
    running: Gauge
    kv_cache_usage: Gauge
    weight_bytes: Gauge
    kv_cache_bytes: Gauge
    kv_cache_blocks: Gauge
    kv_cache_block_tokens: Gauge
    preemptions: Counter
    draft_tokens: Counter
    accepted_draft_tokens: Counter
    step_seconds: Histogram
    forward_seconds: Histogram
    step_tokens: Histogram
    step_sequences: Histogram

    def load(self, *, waiting: int, running: int, kv_cache_usage: float = 0.0) -> None:
        self.waiting.set(waiting)
        self.running.set(running)
        self.kv_cache_usage.set(kv_cache_usage)

    def memory(self, *, weight_bytes: int, kv_cache_bytes: int, num_blocks: int, block_tokens: int) -> None:
        self.weight_bytes.set(weight_bytes)
        self.kv_cache_bytes.set(kv_cache_bytes)
        self.kv_cache_blocks.set(num_blocks)
        self.kv_cache_block_tokens.set(block_tokens)

    def step(
        self,
        *,
        seconds: float,
        forward_seconds: float,
        tokens: int,
        sequences: int,
        preempted: int = 0,
        drafted: int = 0,
        accepted: int = 0,
    ) -> None:
        self.step_seconds.observe(seconds)
        self.forward_seconds.observe(forward_seconds)
        self.step_tokens.observe(tokens)
        self.step_sequences.observe(sequences)
        if preempted:
            self.preemptions.inc(preempted)
        if drafted:
            self.draft_tokens.inc(drafted)
            self.accepted_draft_tokens.inc(accepted)


class Metrics:
    """All metrics of one process. Make one per application: nothing is registered globally."""

    def __init__(self, *, build_version: str = "unknown") -> None:
        # A time stamp beside every series would double what is scraped. (The library leaves this function untyped.)
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._by_task: dict[tuple[str, str, str], RequestMetrics] = {}
        self._by_model: dict[tuple[str, str], ModelMetrics] = {}
        self._info_labels: dict[tuple[str, str], tuple[str, ...]] = {}
        self._make_request_metrics()
        self._make_task_metrics()
        self._make_model_metrics()
        self._make_process_metrics(build_version)

    def http_request(self, *, endpoint: str, method: str, status: int) -> None:
        """`endpoint` is a route's template, never a path as sent: paths are the caller's and would have no end."""
        self._requests.labels(endpoint, method if method in METHODS else "other", str(status)).inc()

    def rejected(self, cause: str) -> None:
        """A request refused before it was accepted: `queue_requests`, `queue_tokens`, `rate_limit`, `draining`, ..."""
        self._rejected.labels(cause).inc()

    def replayed(self, num_requests: int = 1) -> None:
        self._replayed.inc(num_requests)

    def shadowed(self, *, model: str, version: str, outcome: str) -> None:
        """A request run again by a shadow version: `same`, `different`, `failed`; `skipped` if there was a queue."""
        self._shadowed.labels(model, version, outcome).inc()

    def worker_restarted(self, cause: str) -> None:
        self._restarts.labels(cause).inc()

    def worker_up(self, up: bool) -> None:
        self._worker_up.set(1 if up else 0)

    def totals(self) -> dict[str, int]:
        """Accepted requests, and how many of them ended how, over all models and tasks."""
        found = {"accepted": 0} | dict.fromkeys(OUTCOMES, 0)
        for counter in (self._accepted, self._outcomes):
            for family in counter.collect():
                for sample in family.samples:
                    found[sample.labels.get("outcome", "accepted")] += int(sample.value)
        return found

    def model_loaded(self, *, model: str, version: str, architecture: str, dtype: str, device: str) -> None:
        labels = (model, version, architecture, dtype, device)
        self._info_labels[model, version] = labels
        self._model_info.labels(*labels).set(1)

    def request_metrics(self, *, model: str, version: str, task: str) -> RequestMetrics:
        key = (model, version, task)
        found = self._by_task.get(key)
        if found is None:
            found = self._by_task[key] = self._bind_task(key)
        return found

    def model_metrics(self, *, model: str, version: str) -> ModelMetrics:
        key = (model, version)
        found = self._by_model.get(key)
        if found is None:
            found = self._by_model[key] = self._bind_model(key)
        return found

    def forget_model(self, *, model: str, version: str) -> None:
        """Takes an unloaded model's gauges away; its counters stay, as Prometheus expects of counters."""
        info = self._info_labels.pop((model, version), None)
        if info is not None:
            self._model_info.remove(*info)
        if self._by_model.pop((model, version), None) is not None:
            for gauge in (self._waiting, self._running, self._weight_bytes, *self._kv_cache):
                gauge.remove(model, version)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = LATENCY_BUCKETS
    ) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _make_request_metrics(self) -> None:
        self._requests = self._counter(
            "requests", "HTTP requests answered, by route and status.", ("endpoint", "method", "status")
        )
        self._rejected = self._counter("requests_rejected", "Requests refused at the door, by cause.", ("cause",))
        self._accepted = self._counter("requests_accepted", "Requests accepted by the engine.", _TASK)
        self._outcomes = self._counter(
            "request_outcomes", "Accepted requests that have ended, by how.", (*_TASK, "outcome")
        )
        self._replayed = self._counter("requests_replayed", "Accepted requests run again after a worker's death.")
        self._shadowed = self._counter(
            "shadow_requests", "Requests that a shadow version ran again, by how it compares.", (*_MODEL, "outcome")
        )

    def _make_task_metrics(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.", _TASK)
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the prefix cache.", _TASK)
        self._generated_tokens = self._counter("generated_tokens", "Tokens generated.", _TASK)
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of one request, when it has ended.", _TASK, LENGTH_BUCKETS
        )
        self._request_generated_tokens = self._histogram(
            "request_generated_tokens", "Tokens generated for one request that had any.", _TASK, LENGTH_BUCKETS
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From acceptance to the first token out.", _TASK
        )
        self._inter_token = self._histogram(
            "inter_token_seconds", "Between two outputs of one generating request.", _TASK
        )
        self._queue = self._histogram("queue_seconds", "From acceptance to the first step.", _TASK)
        self._prefill = self._histogram("prefill_seconds", "From the first step to the first token.", _TASK)
        self._decode = self._histogram("decode_seconds", "From the first token to the last.", _TASK)
        self._request_seconds = self._histogram(
            "request_seconds", "From acceptance to the end, whatever it was.", _TASK
        )

    def _make_model_metrics(self) -> None:
        self._waiting = self._gauge("requests_waiting", "Accepted requests that wait for their first step.", _MODEL)
        self._running = self._gauge("requests_running", "Requests in the running batch.", _MODEL)
        self._kv_cache_usage = self._gauge("kv_cache_usage", "Share of KV blocks in use, 0 to 1.", _MODEL)
        self._weight_bytes = self._gauge("weight_bytes", "Memory of the weights.", _MODEL)
        self._kv_cache_bytes = self._gauge("kv_cache_bytes", "Memory of all KV blocks, in use or not.", _MODEL)
        self._kv_cache_blocks = self._gauge("kv_cache_blocks", "KV blocks, in use or not.", _MODEL)
        self._kv_cache_block_tokens = self._gauge("kv_cache_block_tokens", "Tokens that a KV block holds.", _MODEL)
        self._kv_cache = (
            self._kv_cache_usage, self._kv_cache_bytes, self._kv_cache_blocks, self._kv_cache_block_tokens,
        )  # fmt: skip
        self._preemptions = self._counter("preemptions", "Sequences put back to waiting to free KV blocks.", _MODEL)
        self._draft_tokens = self._counter("draft_tokens", "Tokens guessed and checked in a step.", _MODEL)
        self._accepted_draft_tokens = self._counter(
            "accepted_draft_tokens", "Tokens guessed that turned out to be right.", _MODEL
        )
        self._step_seconds = self._histogram("step_seconds", "Duration of one step of the worker.", _MODEL)
        self._forward_seconds = self._histogram(
            "forward_seconds", "The part of a step that the network and the sampler take.", _MODEL
        )
        self._step_tokens = self._histogram("step_tokens", "Tokens computed in one step.", _MODEL, SIZE_BUCKETS)
        self._step_sequences = self._histogram("step_sequences", "Sequences in one step.", _MODEL, SIZE_BUCKETS)

    def _make_process_metrics(self, build_version: str) -> None:
        self._restarts = self._counter("worker_restarts", "Worker restarts, by cause of the death.", ("cause",))
        self._worker_up = self._gauge("worker_up", "1 while a worker process is running, else 0.")
        self._model_info = self._gauge(
            "model_info", "1 for each loaded checkpoint.", (*_MODEL, "architecture", "dtype", "device")
        )
        self._build_info = self._gauge("build_info", "1, labelled with the version that runs.", ("version",))
        self._build_info.labels(build_version).set(1)
        self._tasks = self._gauge("event_loop_tasks", "Tasks of the API process's event loop; idle, a constant few.")
        self._tasks.set_function(_num_tasks)

    def _bind_task(self, key: tuple[str, str, str]) -> RequestMetrics:
        return RequestMetrics(
            num_accepted=self._accepted.labels(*key),
            outcomes={outcome: self._outcomes.labels(*key, outcome) for outcome in OUTCOMES},
            prompt_tokens=self._prompt_tokens.labels(*key),
            cached_tokens=self._cached_tokens.labels(*key),
            generated_tokens=self._generated_tokens.labels(*key),
            request_prompt_tokens=self._request_prompt_tokens.labels(*key),
            request_generated_tokens=self._request_generated_tokens.labels(*key),
            first_token_seconds=self._first_token.labels(*key),
            inter_token_seconds=self._inter_token.labels(*key),
            queue_seconds=self._queue.labels(*key),
            prefill_seconds=self._prefill.labels(*key),
            decode_seconds=self._decode.labels(*key),
            request_seconds=self._request_seconds.labels(*key),
        )

    def _bind_model(self, key: tuple[str, str]) -> ModelMetrics:
        return ModelMetrics(
            waiting=self._waiting.labels(*key),
            running=self._running.labels(*key),
            kv_cache_usage=self._kv_cache_usage.labels(*key),
            weight_bytes=self._weight_bytes.labels(*key),
            kv_cache_bytes=self._kv_cache_bytes.labels(*key),
            kv_cache_blocks=self._kv_cache_blocks.labels(*key),
            kv_cache_block_tokens=self._kv_cache_block_tokens.labels(*key),
            preemptions=self._preemptions.labels(*key),
            draft_tokens=self._draft_tokens.labels(*key),
            accepted_draft_tokens=self._accepted_draft_tokens.labels(*key),
            step_seconds=self._step_seconds.labels(*key),
            forward_seconds=self._forward_seconds.labels(*key),
            step_tokens=self._step_tokens.labels(*key),
            step_sequences=self._step_sequences.labels(*key),
        )


def _num_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # read from a thread without an event loop
        return 0
