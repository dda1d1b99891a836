"""Asks a running service many things at once, politely: so many requests at a time, and it waits when told to.

429 and 503 are waited out as `Retry-After` says; another refusal is its item's own; what no item can change (no
connection, no such model, no key) ends the evaluation. Knows nothing of tasks. Runs in the evaluation's process.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

TIMEOUT_SECONDS = 600.0
DEFAULT_RETRY_SECONDS = 1.0
NOT_ITS_OWN = {401, 403, 404, 405}
"""Statuses that any other item would get too."""

Sleep = Callable[[float], Awaitable[None]]


class EvaluateError(Exception):
    """The data, the service or the command line is not what it should be; the message says which and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """`patience_seconds`: how long one item may be put off in all."""

    url: str
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 16
    patience_seconds: float = 300.0

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}" if self.model else self.url


@dataclass(frozen=True, slots=True)
class Fault:
    """What the service said of one item."""

    status: int
    message: str


async def ask_all(
    service: Service,
    path: str,
    bodies: Sequence[dict[str, Any]],
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    sleep: Sleep = asyncio.sleep,
) -> list[dict[str, Any] | Fault]:
    """The answer to each body, in their order.

    Raises: EvaluateError.
    """
    headers = {"Authorization": f"Bearer {service.api_key}"} if service.api_key else {}
    turns = asyncio.Semaphore(service.concurrency)
    async with httpx.AsyncClient(
        base_url=service.url, headers=headers, timeout=TIMEOUT_SECONDS, transport=transport
    ) as client:

        async def ask(body: dict[str, Any]) -> dict[str, Any] | Fault:
            whole = body | ({"model": service.model} if service.model else {})
            async with turns:
                return await _ask(client, service, path, whole, sleep)

        tasks = [asyncio.create_task(ask(body)) for body in bodies]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(
    client: httpx.AsyncClient, service: Service, path: str, body: dict[str, Any], sleep: Sleep
) -> dict[str, Any] | Fault:
    waited = 0.0
    while True:
        try:
            response = await client.post(path, json=body)
            answer = response.json()
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise EvaluateError(f"{service.url} does not answer: {reason}") from error
        except ValueError as error:
            raise EvaluateError(f"{service.url}{path} answers with something that is not JSON") from error
        if response.status_code == 200 and isinstance(answer, dict):
            return answer
        fault = Fault(response.status_code, _message(response, answer))
        if fault.status in NOT_ITS_OWN:
            raise EvaluateError(f"{service.url}{path} answers {fault.status}: {fault.message}")
        if fault.status not in (429, 503):
            return fault
        seconds = retry_after(response)
        if waited + seconds > service.patience_seconds:
            raise EvaluateError(
                f"{service.url} had no room for {waited:.0f} s (the limit is {service.patience_seconds:.0f}): "
                f"{fault.status}: {fault.message}"
            )
        await sleep(seconds)
        waited += seconds


def retry_after(response: httpx.Response) -> float:
    try:
        return max(float(response.headers["retry-after"]), 0.1)
    except (KeyError, ValueError):
        return DEFAULT_RETRY_SECONDS


def _message(response: httpx.Response, answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message) if message else response.text[:200]
