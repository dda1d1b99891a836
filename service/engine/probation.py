"""A version on its way into service: loaded beside those that serve, warmed up, tested; or given up without a trace.

Hears from the engine what the worker says of it. Decides nothing of what it will serve. Runs in the API process, on its
event loop.
"""

import asyncio
from dataclasses import dataclass

from service.engine.deployment import Owner
from service.engine.models import LoadedModel
from service.engine.protocol import Load
from service.engine.self_test import check_golden, read_golden, warm_up
from service.errors import SwapFailed

MAX_LOAD_DEATHS = 2
"""Worker deaths while a version is loaded or tested after which the version is taken for the cause."""


@dataclass(slots=True)
class _Candidate:
    loaded: "asyncio.Future[None]"
    num_deaths: int = 0


class Probation:
    """Versions on probation, by key."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._candidates: dict[str, _Candidate] = {}

    async def bring_up(self, model: LoadedModel, *, tests: bool = True, warms_up: bool = True) -> None:
        """Loads and tests; on return the version is ready and not yet served. Raises SwapFailed."""
        owner, key = self._owner, model.key
        candidate = self._candidates[key] = _Candidate(asyncio.get_running_loop().create_future())
        owner.models.pending[key] = model
        try:
            owner.supervisor.send(Load(model.spec))
            await candidate.loaded
            if warms_up:
                await warm_up(owner, model)
            if tests:
                for golden in await asyncio.to_thread(read_golden, model.description.folder):
                    await check_golden(owner, model, golden)
        except BaseException:
            owner.models.pending.pop(key, None)
            owner.fail_requests_of(key, SwapFailed("the version was given up"))
            owner.unload(model.name, model.version, key)
            raise
        finally:
            del self._candidates[key]

    def loaded(self, model: LoadedModel) -> None:
        candidate = self._candidates.get(model.key)
        if candidate is not None and not candidate.loaded.done():
            candidate.loaded.set_result(None)

    def load_failed(self, model: LoadedModel, reason: str) -> None:
        self._fail(model.key, f"it does not load: {reason}")

    def worker_died(self) -> None:
        """A version during whose probation the worker keeps dying is given up before the next worker is to load it."""
        for key, candidate in list(self._candidates.items()):
            candidate.num_deaths += 1
            if candidate.num_deaths >= MAX_LOAD_DEATHS:
                self._fail(key, f"the worker died {candidate.num_deaths} times while it was loaded and tested")

    def give_up(self, reason: str) -> None:
        for key in list(self._candidates):
            self._fail(key, reason)

    def _fail(self, key: str, reason: str) -> None:
        candidate = self._candidates.get(key)
        if candidate is None:
            return
        self._owner.models.pending.pop(key, None)
        if candidate.loaded.done():
            self._owner.fail_requests_of(key, SwapFailed(reason))
        else:
            candidate.loaded.set_exception(SwapFailed(reason))
