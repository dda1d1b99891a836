"""`make rolling`: roll-outs of two replicas behind Envoy under load, as the chart has them; not one answer is lost.

A roll-out is that of a Deployment with `maxSurge: 1, maxUnavailable: 0`: a new pod, and once it is available an old one
goes. The proxy hears of it five seconds late, the longest that values.yaml reckons with. Then once more without the
preStop sleep, to see that losses would be seen. `--write`: what came of it into docs/kubernetes.md. Takes some minutes.
"""

import argparse
import asyncio
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

from tests.deploy.rolling.load import Load, Seen
from tests.deploy.rolling.pods import Pod, Rules
from tests.deploy.rolling.proxy import Envoy
from tests.deploy.summary import write

NUM_REPLICAS = 2
NEWS_SECONDS = 5.0


class Rehearsal:
    """The pods that there are, and the endpoints that the proxy is told."""

    def __init__(self, rules: Rules, folder: Path) -> None:
        self._rules = rules
        self._folder = folder
        self.pods: list[Pod] = []
        self.gone: list[Pod] = []
        self.proxy = Envoy(folder, rules.readiness, delay_seconds=NEWS_SECONDS)

    def _tell(self) -> None:
        self.proxy.route_to(pod.port for pod in self.pods if pod.ready and not pod.terminating)

    def start_pod(self) -> Pod:
        pod = Pod(self._rules, self._folder, self._tell)
        self.pods.append(pod)
        return pod

    async def roll_out(self) -> None:
        going = []
        for old in list(self.pods):
            await self.start_pod().until_available()
            going.append(asyncio.create_task(self._remove(old)))
        await asyncio.gather(*going)

    async def _remove(self, pod: Pod) -> None:
        await pod.terminate()
        self.pods.remove(pod)
        self.gone.append(pod)

    def stop(self) -> None:
        self.proxy.stop()
        for pod in self.pods:
            pod.kill()


async def rehearse(rules: Rules, *, num_callers: int, num_roll_outs: int) -> tuple[Seen, list[Pod], float]:
    """What callers saw, the pods that went, and for how many seconds there was load."""
    with tempfile.TemporaryDirectory(prefix="rolling") as folder:
        rehearsal = Rehearsal(rules, Path(folder))
        try:
            await asyncio.gather(*(rehearsal.start_pod().until_available() for _ in range(NUM_REPLICAS)))
            await rehearsal.proxy.until_healthy(NUM_REPLICAS)
            load, began = Load(rehearsal.proxy.url, num_callers), time.monotonic()
            await asyncio.sleep(NEWS_SECONDS)
            for _ in range(num_roll_outs):
                await rehearsal.roll_out()
            seen = await load.stop()
            return seen, rehearsal.gone, time.monotonic() - began
        finally:
            rehearsal.stop()


def row(what: str, found: str) -> str:
    return f"| {what} | {found} |"


def rows(rules: Rules, seen: Seen, gone: list[Pod], seconds: float) -> list[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(seen.whole.items()))
    slowest = max(pod.termination_seconds for pod in gone)
    return [
        row("pods replaced under load", f"{len(gone)}, two at a time in service, over {seconds:.0f} s"),
        row("answers that were whole", f"{kinds}; the longest took {seen.longest_seconds:.1f} s"),
        row("not 2xx, or not whole", f"{len(seen.faults)}"),
        row(
            "ends of pods",
            f"exit codes {sorted({pod.exit_code for pod in gone}, key=str)}; the slowest took {slowest:.0f} s of "
            f"{rules.grace} (preStop {rules.pre_stop:g}, drain at most {rules.drain:g})",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make rolling", description=__doc__)
    parser.add_argument("--callers", type=int, default=9)
    parser.add_argument("--roll-outs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="the table into docs/kubernetes.md")
    given = parser.parse_args()
    rules = Rules.of_the_chart()
    seen, gone, seconds = asyncio.run(rehearse(rules, num_callers=given.callers, num_roll_outs=given.roll_outs))
    table = rows(rules, seen, gone, seconds)
    sys.stdout.write("\n".join([*table, *seen.faults]) + "\n")
    hasty = dataclasses.replace(rules, pre_stop=0)
    lost, _, _ = asyncio.run(rehearse(hasty, num_callers=given.callers, num_roll_outs=1))
    table.append(row("the same without the preStop sleep", f"{len(lost.faults)} not 2xx, or not whole"))
    sys.stdout.write(table[-1] + "\n" + "\n".join(lost.faults[:5]) + "\n")
    kept = not seen.faults and all(pod.exit_code == 0 and not pod.not_live for pod in gone)
    if given.write:
        write("rolling", table)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
