"""schemathesis over the whole OpenAPI description of a running service: no operation answers with a 5xx, none hangs.

It draws its data for each operation from the schema, sound and unsound, and follows links where there are any. A 504
is right where the data ask for a deadline.
"""

import argparse
import asyncio
import re
import sys
from pathlib import Path

from tests.chaos.law import Row, check_books
from tests.chaos.service import ADMIN_KEY, running

COUNT = 200
ANSWER_SECONDS = 120
NUM_WORKERS = 1
CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


async def schemas(options: argparse.Namespace, log: Path) -> Row:
    count = options.count or COUNT
    row = Row(f"schemathesis, {count} examples for each operation and phase")
    config = log.with_name("schemathesis.toml")
    config.write_text(CONFIG)
    async with running(log, "--kv-cache-memory", "64MiB", "--offline") as service:
        num_operations = sum(map(len, (await service.client.get("/openapi.json")).json()["paths"].values()))
        command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run"]
        command += [f"{service.client.base_url}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--max-examples", str(count), "--workers", str(NUM_WORKERS), "--seed", str(options.seed)]
        command += ["--request-timeout", str(ANSWER_SECONDS), "--suppress-health-check", "all"]
        command += ["--continue-on-failure", "--header", f"Authorization: Bearer {ADMIN_KEY}"]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=log.parent, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output = (await process.communicate())[0].decode()
        log.with_name("schemathesis.txt").write_text(output)
        tested = re.search(r"(\d+) generated", output)
        metrics = await service.metrics()
        row.found += [
            f"{num_operations} operations, {int(tested[1]) if tested else 0:,} cases",
            f"{int(metrics['requests_total']):,} HTTP requests",
        ]
        row.check(process.returncode == 0, f"schemathesis ended with {process.returncode}")
        row.check(metrics.get("worker_restarts_total", 0) == 0, "the worker died")
        await check_books(service, row)
    return row
