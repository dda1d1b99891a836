"""From records to figures, and from figures to a table, JSON and a page with a plot.

Percentiles are of the sorted sample by linear interpolation; goodput counts the requests that met every latency limit.
Knows nothing of HTTP.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service.bench.load import Record

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request must meet to count as good, in seconds; None asks nothing."""

    first_token_seconds: float | None = None
    inter_token_seconds: float | None = None
    total_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. Rates are per second of the run; latencies in seconds, by percentile."""

    label: str
    requests: int
    failed: int
    rejected: int
    seconds: float
    requests_per_second: float
    items_per_second: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    goodput_requests_per_second: float
    first_token_seconds: dict[str, float]
    inter_token_seconds: dict[str, float]
    total_seconds: dict[str, float]
    errors: dict[str, int]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks (numpy's default); NaN for no values.

    Worked example: the 90th of [1, 2, 3, 4] lies at rank 0.9 * 3 = 2.7, so it is 3 + 0.7 * (4 - 3) = 3.7.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def figures(label: str, records: list[Record], limits: Limits) -> Figures:
    good = [record for record in records if record.error is None]
    seconds = max(r.finished for r in records) - min(r.sent for r in records)
    gaps = [b - a for r in good for a, b in zip(r.chunk_times, r.chunk_times[1:], strict=False)]
    errors: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            key = f"{record.status}: {record.error[:80]}"
            errors[key] = errors.get(key, 0) + 1
    return Figures(
        label=label,
        requests=len(records),
        failed=len(records) - len(good),
        rejected=sum(record.status in (429, 503) for record in records),
        seconds=seconds,
        requests_per_second=len(good) / seconds,
        items_per_second=sum(record.num_items for record in good) / seconds,
        prompt_tokens_per_second=sum(record.num_prompt_tokens for record in good) / seconds,
        output_tokens_per_second=sum(record.num_output_tokens for record in good) / seconds,
        goodput_requests_per_second=sum(_meets(record, limits) for record in good) / seconds,
        first_token_seconds=_spread([r.chunk_times[0] - r.sent for r in good if r.chunk_times]),
        inter_token_seconds=_spread(gaps),
        total_seconds=_spread([r.finished - r.sent for r in good]),
        errors=errors,
    )


def _meets(record: Record, limits: Limits) -> bool:
    times = record.chunk_times
    checks = [(limits.total_seconds, record.finished - record.sent)]
    if times:
        gaps = (times[-1] - times[0]) / max(len(times) - 1, 1)
        checks += [(limits.first_token_seconds, times[0] - record.sent), (limits.inter_token_seconds, gaps)]
    return all(limit is None or value <= limit for limit, value in checks)


def _spread(values: list[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}


def table(runs: list[Figures]) -> str:
    """A Markdown table, latencies in milliseconds; good requests are those that met every limit."""
    head = "| run | requests | failed | req/s | good req/s | items/s | output tok/s | first token p50 / p99 ms | between tokens p50 / p99 ms | total p50 / p99 ms |"  # noqa: E501
    lines = [head, "|" + "---|" * 10]
    for run in runs:
        cells = [
            run.label, str(run.requests), str(run.failed), f"{run.requests_per_second:.1f}",
            f"{run.goodput_requests_per_second:.1f}", f"{run.items_per_second:.1f}",
            f"{run.output_tokens_per_second:.1f}",
            _pair(run.first_token_seconds), _pair(run.inter_token_seconds), _pair(run.total_seconds),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(spread: dict[str, float]) -> str:
    return "-" if math.isnan(spread["p50"]) else f"{spread['p50'] * 1000:.1f} / {spread['p99'] * 1000:.1f}"


def write_json(runs: list[Figures], path: Path, setting: Mapping[str, object]) -> None:
    text = json.dumps({"setting": setting, "runs": [asdict(run) for run in runs]}, indent=2, allow_nan=True)
    path.write_text(text.replace("NaN", "null") + "\n")


def write_page(runs: list[Figures], path: Path, setting: Mapping[str, object]) -> None:
    """One HTML file without outside parts: the table, and a bar for each run's throughput."""
    rates = [run.output_tokens_per_second or run.items_per_second for run in runs]
    unit = "output tokens/s" if any(run.output_tokens_per_second for run in runs) else "items/s"
    top = max([*rates, 1e-9])
    bars = "".join(
        f'<text x="0" y="{28 * i + 18}">{html.escape(run.label)}</text>'
        f'<rect x="160" y="{28 * i + 4}" width="{420 * rate / top:.1f}" height="20" fill="#4269d0"/>'
        f'<text x="{166 + 420 * rate / top:.1f}" y="{28 * i + 18}">{rate:.1f}</text>'
        for i, (run, rate) in enumerate(zip(runs, rates, strict=True))
    )
    rows = [line.strip("| ").split(" | ") for line in table(runs).splitlines() if not line.startswith("|---")]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    path.write_text(
        '<!doctype html><meta charset="utf-8"><title>slimpajama bench</title>'
        "<style>body{font:14px sans-serif;margin:2em}td{border:1px solid #ccc;padding:4px 8px}"
        "table{border-collapse:collapse}</style>"
        f"<h1>slimpajama bench</h1><p>{unit}</p>"
        f'<svg width="700" height="{28 * len(runs) + 8}" font-family="sans-serif" font-size="13">{bars}</svg>'
        f"<table>{cells}</table><pre>{html.escape(json.dumps(setting, indent=2))}</pre>\n"
    )
