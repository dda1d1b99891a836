"""Has the requests of a batch answered by a running service: so many at a time, none lost, and none twice.

What has no room (429, 503) is asked again when the service says so, what finds no service when there is one again; any
other answer is the request's own. Runs in the batch's process.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from service.batch.lines import BatchError, BatchRequest
from service.evaluate.asking import DEFAULT_RETRY_SECONDS, Service, Sleep, retry_after

TIMEOUT = httpx.Timeout(10.0, read=None)
"""The service has deadlines of its own (`--max-request-timeout`)."""
JSON = {"Content-Type": "application/json"}
FORBIDDEN = {401, 403}
"""Statuses that every other request would get too."""

Write = Callable[[dict[str, Any]], None]


async def run(
    service: Service,
    requests: Iterator[BatchRequest],
    write: Write,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    sleep: Sleep = asyncio.sleep,
) -> Counter[str]:
    """Writes each answer as it comes; how many there were of each status, or "no answer".

    Raises: BatchError where no request would be answered. What was written until then stays.
    """
    found: Counter[str] = Counter()
    headers = {"Authorization": f"Bearer {service.api_key}"} if service.api_key else {}
    limits = httpx.Limits(max_connections=service.concurrency)
    async with httpx.AsyncClient(
        base_url=service.url, headers=headers, timeout=TIMEOUT, limits=limits, transport=transport
    ) as client:

        async def ask_next_ones() -> None:
            for request in requests:
                line = await _ask(client, service, request, sleep)
                write(line)
                found[str(line["response"]["status_code"]) if line["response"] else "no answer"] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(service.concurrency):
                group.create_task(ask_next_ones())
    return found


async def _ask(client: httpx.AsyncClient, service: Service, request: BatchRequest, sleep: Sleep) -> dict[str, Any]:
    """The line of its answer."""
    waited = 0.0
    while True:
        try:
            response = await client.post(request.url, content=json.dumps(request.body), headers=JSON)
        except httpx.TransportError as error:
            seconds, why = DEFAULT_RETRY_SECONDS, ("unreachable", str(error) or type(error).__name__)
        else:
            if response.status_code in FORBIDDEN:
                raise BatchError(f"{service.url}{request.url} answers {response.status_code}: {response.text[:200]}")
            if response.status_code not in (429, 503):
                return request.answered(response.status_code, response.headers.get("x-request-id"), _body(response))
            seconds, why = retry_after(response), ("no_room", f"{response.status_code}: {response.text[:200]}")
        if waited + seconds > service.patience_seconds:
            return request.failed(*why)
        await sleep(seconds)
        waited += seconds


def _body(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text
