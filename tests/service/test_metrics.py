"""Metrics: names, labels, one registry per application, and that Prometheus' own parser reads them."""

import asyncio

import pytest
from prometheus_client import REGISTRY
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics

CONTRACT = {
    "requests": ("endpoint", "method", "status"),
    "request_outcomes": ("model", "version", "task", "outcome"),
    "requests_accepted": ("model", "version", "task"),
    "requests_rejected": ("cause",),
    "requests_replayed": (),
    "worker_restarts": ("cause",),
    "shadow_requests": ("model", "version", "outcome"),
    "preemptions": ("model", "version"),
    "prompt_tokens": ("model", "version", "task"),
    "cached_tokens": ("model", "version", "task"),
    "generated_tokens": ("model", "version", "task"),
    "request_prompt_tokens": ("model", "version", "task"),
    "request_generated_tokens": ("model", "version", "task"),
    "time_to_first_token_seconds": ("model", "version", "task"),
    "inter_token_seconds": ("model", "version", "task"),
    "queue_seconds": ("model", "version", "task"),
    "prefill_seconds": ("model", "version", "task"),
    "decode_seconds": ("model", "version", "task"),
    "request_seconds": ("model", "version", "task"),
    "draft_tokens": ("model", "version"),
    "accepted_draft_tokens": ("model", "version"),
    "step_seconds": ("model", "version"),
    "forward_seconds": ("model", "version"),
    "step_tokens": ("model", "version"),
    "step_sequences": ("model", "version"),
    "requests_waiting": ("model", "version"),
    "requests_running": ("model", "version"),
    "kv_cache_usage": ("model", "version"),
    "weight_bytes": ("model", "version"),
    "kv_cache_bytes": ("model", "version"),
    "kv_cache_blocks": ("model", "version"),
    "kv_cache_block_tokens": ("model", "version"),
    "model_info": ("model", "version", "architecture", "dtype", "device"),
    "worker_up": (),
    "build_info": ("version",),
    "event_loop_tasks": (),
}
LABELS = {"model": "tiny", "version": "1", "task": "chat"}


@pytest.fixture
def metrics():
    return Metrics(build_version="9.9")


@pytest.fixture
def full(metrics):
    """Every metric recorded once."""
    metrics.http_request(endpoint="/v1/models", method="GET", status=200)
    metrics.rejected("queue_tokens")
    metrics.replayed()
    metrics.worker_restarted("killed")
    metrics.worker_up(True)
    metrics.shadowed(model="tiny", version="1", outcome="same")
    metrics.model_loaded(model="tiny", version="1", architecture="Llama", dtype="float32", device="cpu")
    series = metrics.request_metrics(**LABELS)
    series.accepted()
    series.tokens(prompt=7, cached=3, generated=2)
    series.lengths(prompt=7, generated=2)
    for record in (series.queued, series.first_token, series.inter_token, series.prefilled, series.decoded):
        record(0.25)
    series.outcome("stop", seconds=0.5)
    lane = metrics.model_metrics(model="tiny", version="1")
    lane.load(waiting=1, running=2, kv_cache_usage=0.5)
    lane.memory(weight_bytes=10, kv_cache_bytes=20, num_blocks=4, block_tokens=16)
    lane.step(seconds=0.01, forward_seconds=0.01, tokens=64, sequences=4, preempted=1, drafted=5, accepted=3)
    return metrics


def families(metrics):
    text = generate_latest(metrics.registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"slimpajama_{name}", labels)


def test_every_metric_of_the_contract_is_there_with_its_labels(full):
    found = families(full)
    for name, labels in CONTRACT.items():
        family = found[f"slimpajama_{name}"]
        assert family.samples, name
        assert set(family.samples[0].labels) - {"le"} == set(labels), name


def test_nothing_of_ours_is_outside_the_contract(full):
    ours = {name.removeprefix("slimpajama_") for name in families(full) if name.startswith("slimpajama_")}
    assert ours == set(CONTRACT)


async def test_tasks_are_counted_while_they_run(metrics):
    before = value(metrics, "event_loop_tasks")
    tasks = [asyncio.create_task(asyncio.Event().wait()) for _ in range(3)]
    assert value(metrics, "event_loop_tasks") == before + 3
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert value(metrics, "event_loop_tasks") == before


def test_what_was_recorded_is_what_is_read(full):
    assert value(full, "prompt_tokens_total", **LABELS) == 7
    assert value(full, "cached_tokens_total", **LABELS) == 3
    assert value(full, "generated_tokens_total", **LABELS) == 2
    assert value(full, "request_outcomes_total", **LABELS, outcome="stop") == 1
    assert value(full, "request_outcomes_total", **LABELS, outcome="error") == 0
    assert value(full, "request_seconds_sum", **LABELS) == 0.5
    assert value(full, "requests_running", model="tiny", version="1") == 2
    assert value(full, "kv_cache_blocks", model="tiny", version="1") == 4
    assert value(full, "kv_cache_block_tokens", model="tiny", version="1") == 16
    assert value(full, "step_tokens_sum", model="tiny", version="1") == 64
    assert value(full, "preemptions_total", model="tiny", version="1") == 1
    assert value(full, "build_info", version="9.9") == 1


def test_totals_are_over_all_models_and_tasks(full):
    other = full.request_metrics(model="other", version="2", task="embed")
    other.accepted()
    other.accepted()
    other.outcome("deadline", seconds=0.5)
    assert full.totals() == {"accepted": 3, "stop": 1, "length": 0, "cancelled": 0, "deadline": 1, "error": 0}


def test_latency_buckets_begin_at_a_millisecond(full):
    assert value(full, "inter_token_seconds_bucket", **LABELS, le="0.001") == 0


def test_lengths_are_told_up_to_32k_tokens(full):
    full.request_metrics(**LABELS).lengths(prompt=32_768, generated=None)
    assert value(full, "request_prompt_tokens_bucket", **LABELS, le="8.0") == 1
    assert value(full, "request_prompt_tokens_bucket", **LABELS, le="16384.0") == 1
    assert value(full, "request_prompt_tokens_bucket", **LABELS, le="32768.0") == 2
    assert value(full, "request_generated_tokens_count", **LABELS) == 1, "only of requests that had a token"


def test_an_unknown_method_is_not_a_new_label_value(metrics):
    for method in ("BREW", "PROPFIND"):
        metrics.http_request(endpoint="unmatched", method=method, status=405)
    assert value(metrics, "requests_total", endpoint="unmatched", method="other", status="405") == 2


def test_registries_are_apart_from_each_other_and_from_the_global_one(full):
    assert value(Metrics(), "requests_replayed_total") == 0
    assert not any(family.name.startswith("slimpajama") for family in REGISTRY.collect())


def test_unloaded_model_keeps_its_counters_and_loses_its_gauges(full):
    full.forget_model(model="tiny", version="1")
    assert value(full, "requests_waiting", model="tiny", version="1") is None
    assert value(full, "kv_cache_usage", model="tiny", version="1") is None
    assert value(full, "weight_bytes", model="tiny", version="1") is None
    assert value(full, "kv_cache_bytes", model="tiny", version="1") is None
    assert value(full, "kv_cache_blocks", model="tiny", version="1") is None
    assert value(full, "kv_cache_block_tokens", model="tiny", version="1") is None
    assert not families(full)["slimpajama_model_info"].samples
    assert value(full, "preemptions_total", model="tiny", version="1") == 1
    full.model_metrics(model="tiny", version="1").load(waiting=3, running=0)
    assert value(full, "requests_waiting", model="tiny", version="1") == 3


def test_forgetting_a_model_that_never_loaded_does_nothing(metrics):
    metrics.forget_model(model="none", version="0")


def test_process_and_python_metrics_are_there(metrics):
    names = set(families(metrics))
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "python_info"} <= names
