"""What a chaos run says of its law, a row of docs/faults.md, and the law that is part of all: the books balance."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.chaos.service import Service


@dataclass(slots=True)
class Row:
    """One run: what was done, what was found, whether its law held."""

    what: str
    found: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def check(self, holds: bool, fault: str) -> None:
        if not holds and fault not in self.faults:
            self.faults.append(fault)

    def __str__(self) -> str:
        verdict = "held" if not self.faults else f"**broken**: {'; '.join(self.faults)}"
        return f"| {self.what} | {'; '.join(self.found)} | {verdict} |"


async def check_books(service: Service, row: Row) -> None:
    """Accepted = completed + failed + cancelled + expired, to the unit, and nothing is left running or waiting."""
    await service.until_idle()
    metrics = await service.metrics()
    outcomes = {name[6:]: int(value) for name, value in metrics.items() if name.startswith("ended_")}
    add_books(row, int(metrics.get("requests_accepted_total", 0)), outcomes)
    for gauge in ("requests_running", "requests_waiting", "kv_cache_usage"):
        row.check(metrics.get(gauge, 0) == 0, f"{gauge} is {metrics.get(gauge, 0):g} at the end")


def add_books(row: Row, accepted: int, outcomes: Mapping[str, int]) -> None:
    """Accepted = ended, by cause."""
    causes = [f"{number:,} {outcome}" for outcome, number in outcomes.items() if number]
    row.found.append(f"{accepted:,} accepted = {' + '.join(causes)}")
    ended = sum(outcomes.values())
    row.check(accepted == ended, f"{accepted:,} accepted and {ended:,} ended")


def growth_texts(row: Row, before: tuple[int, int], after: tuple[int, int], limit: float) -> list[str]:
    """What both processes' memory has grown by, checked against the limit (a share)."""
    growth = [last / first - 1 for first, last in zip(before, after, strict=True)]
    row.check(max(growth) <= limit, f"memory has grown by more than {limit:.0%}")
    return [
        f"memory {growth[0]:+.1%} (API process, {after[0] / 2**20:.0f} MiB), "
        f"{growth[1]:+.1%} (worker, {after[1] / 2**20:.0f} MiB)"
    ]
