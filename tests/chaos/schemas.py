"""schemathesis over the whole OpenAPI description of a running service: no operation answers with a 5xx, none hangs.

It draws its data for each operation from the schema, sound and unsound, and follows links where there are any. A 504
is right where the data ask for a deadline. Management comes last, and to a service of its own: it takes the
checkpoints away that the other operations need.
"""

import argparse
import asyncio
import re
import sys
from pathlib import Path

from tests.chaos.law import Row, check_books
from tests.chaos.service import ADMIN_KEY, MODELS, Service, running

COUNT = 200
ANSWER_SECONDS = 120
NUM_WORKERS = 1
PARTS = {"tasks": ("--exclude-path-regex", "^/admin"), "management": ("--include-path-regex", "^/admin")}
CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


async def schemas(options: argparse.Namespace, log: Path) -> Row:
    count = options.count or COUNT
    row = Row(f"schemathesis, {count} examples for each operation and phase")
    config = log.with_name("schemathesis.toml")
    config.write_text(CONFIG)
    for part, chosen in PARTS.items():
        part_log = log.with_name(f"{log.stem}-{part}.log")
        async with running(part_log, "--kv-cache-memory", "64MiB", "--offline") as service:
            arguments = ["--config-file", str(config), "run", f"{service.client.base_url}/openapi.json", *chosen]
            arguments += ["--max-examples", str(count), "--seed", str(options.seed)]
            output, code = await _schemathesis(arguments, part_log.with_suffix(".txt"))
            row.check(code == 0, f"schemathesis ended with {code} in {part}")
            row.found.append(f"{part}: {await _counts(service, output)}")
            metrics = await service.metrics()
            row.check(metrics.get("worker_restarts_total", 0) == 0, "the worker died")
            if part == "tasks":
                loaded = (await service.client.get("/v1/models")).json()["data"]
                row.check(len(loaded) == len(MODELS), "a checkpoint was taken away")
            await check_books(service, row)
    return row


async def _schemathesis(arguments: list[str], report: Path) -> tuple[str, int | None]:
    """What it says, which `report` keeps, and its exit code."""
    command = [str(Path(sys.executable).with_name("schemathesis")), *arguments]
    command += ["--checks", "not_a_server_error", "--workers", str(NUM_WORKERS), "--continue-on-failure"]
    command += ["--request-timeout", str(ANSWER_SECONDS), "--suppress-health-check", "all"]
    command += ["--header", f"Authorization: Bearer {ADMIN_KEY}"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=report.parent, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    await asyncio.to_thread(report.write_text, output)
    return output, process.returncode


async def _counts(service: Service, output: str) -> str:
    operations, cases = re.search(r"(\d+) selected", output), re.search(r"(\d+) generated", output)
    requests = int((await service.metrics())["requests_total"])
    return (
        f"{operations[1] if operations else 0} operations, {int(cases[1]) if cases else 0:,} cases, "
        f"{requests:,} HTTP requests"
    )
