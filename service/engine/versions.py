"""Versions come and go under a live service: load beside, test, switch at once, drain, free; or leave all as it was.

A request is bound to a version when it is accepted. A version that has been replaced is freed when the last one who
was given it, queued, running or still tokenizing, has let go of it: that is what Python's own reference counts say.
Knows the engine only by `Owner`. Runs in the API process, on its event loop.
"""

import asyncio
import contextlib
import gc
import logging
import weakref
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from model.errors import CheckpointError
from model.tokenizer import TokenizerError
from service.engine.aliases import Alias
from service.engine.deployment import Deployment, Owner, Prepare
from service.engine.former import Former, again
from service.engine.memory import free_memory
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.probation import Probation
from service.errors import ModelNotFound, ServiceError, SwapFailed, Unavailable

log = logging.getLogger("slimpajama.versions")

T = TypeVar("T")

POLL_SECONDS = 0.05
POLLS_PER_COLLECTION = 20
"""A reference that a raised error keeps in a cycle goes only with a collection."""


class Versions:
    def __init__(self, owner: Owner, prepare: Prepare | None) -> None:
        self._owner = owner
        self._prepare = prepare
        self.probation = Probation(owner)
        self._busy: set[str] = set()
        self._former: dict[str, Former] = {}
        self._leaving: dict[str, weakref.ref[LoadedModel]] = {}
        """Out of service, by key: the worker has not been told yet to free them."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failures: dict[str, str] = {}
        """Why the last deployment of a name failed, until one succeeds."""

    # -- what an administrator asks for -------------------------------------------------------------------------------

    async def deploy(self, name: str, deployment: Deployment) -> LoadedModel:
        """Loads a version, tests it and puts it in service. Goes on if the caller leaves.

        Raises SwapFailed: it was not put in service, and nothing has changed.
        """
        return await self._alone(name, self._deploy(name, deployment))

    async def rollback(self, name: str) -> dict[str, float]:
        """Goes back to what the name stood for before its last change; a second rollback goes forward again."""
        return await self._alone(name, self._rollback(name))

    def divide(self, name: str, weights: Mapping[str, float], shadow: str | None = None) -> None:
        """Gives each version its share of the name's requests. Raises ModelNotFound, SwapFailed."""
        versions = self._versions_of(name)
        unknown = [version for version in (*weights, shadow) if version is not None and version not in versions]
        if unknown:
            raise ModelNotFound(f"'{name}@{unknown[0]}' is not loaded; loaded: {', '.join(versions)}", param="weights")
        if not any(weight > 0 for weight in weights.values()):
            raise SwapFailed("at least one version needs a weight above 0", param="weights")
        alias = Alias(dict(weights), shadow)
        if shadow is not None:
            _check_same_tokens(versions[alias.heaviest], versions[shadow])
        self._remember(name)
        self._owner.models.divide(name, alias)

    def remove(self, name: str) -> None:
        """Takes a version (`name@version`, or a name's only one) out of service. Raises ModelNotFound, SwapFailed."""
        models = self._owner.models
        model = next((entry for key, entry in models.items() if name in (key, entry.key)), None)
        if model is None:
            raise ModelNotFound(f"'{name[:160]}' is not loaded; loaded: {', '.join(models)}")
        others = [entry for entry in models.values() if entry is not model]
        if not others:
            raise SwapFailed(f"{model.key} is the last checkpoint of the service")
        if adapters := models.holders_of(model.key):
            names = ", ".join(adapter.key for adapter in adapters)
            raise SwapFailed(f"{model.key} is the base of {names}: take them out of service first")
        alias = self.alias_of(model.name)
        same_name = [entry for entry in others if entry.name == model.name]
        if same_name and (alias.weights.get(model.version, 0) > 0 or alias.shadow == model.version):
            raise SwapFailed(f"{model.key} has a share of '{model.name}': give it to another version first")
        self._former.pop(model.name, None)
        self._retire(model)

    def alias_of(self, name: str) -> Alias:
        models = self._owner.models
        return models.aliases.get(name) or Alias({models[name].version: 1.0})

    def can_roll_back(self, name: str) -> bool:
        with contextlib.suppress(KeyError, SwapFailed):
            self._former[name].check_bases(self._owner.models)
            return True
        return False

    async def stop(self, reason: str) -> None:
        self.probation.give_up(reason)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- the way in ---------------------------------------------------------------------------------------------------

    async def _alone(self, name: str, change: Coroutine[Any, Any, T]) -> T:
        """One change of a name at a time, as a task of its own."""
        if name in self._busy:
            change.close()
            raise SwapFailed(f"another version of '{name}' is being loaded: wait for it")
        self._busy.add(name)
        task = self._spawn(change)
        task.add_done_callback(lambda _task: self._busy.discard(name))
        return await asyncio.shield(task)

    async def _deploy(self, name: str, deployment: Deployment) -> LoadedModel:
        model: LoadedModel | None = None
        try:
            model = await self._prepared(name, deployment)
            if self._owner.models.by_key(model.key) is None:
                await self._bring_up(model, tests=deployment.self_test, warms_up=deployment.warm_up)
        except ServiceError as error:
            self.failures[name] = error.message
            label = model.key if model is not None else f"{name} from {deployment.source}"
            log.error("version refused", extra={"model": label, "reason": error.message})
            raise
        self.failures.pop(name, None)
        self._put_in_service(model, deployment)
        log.info("version in service", extra={"model": model.key, "switched": deployment.switch})
        return model

    async def _prepared(self, name: str, deployment: Deployment) -> LoadedModel:
        """A version that is to be loaded, or what is there of the same files: it need not be. Raises SwapFailed."""
        models = self._owner.models
        if name in models.other_names:
            raise SwapFailed(f"'{name}' is another name of '{models.other_names[name]}': deploy that one")
        if any((served.base is not None) != deployment.adapter for served in models.versions_of(name).values()):
            kinds = ("a checkpoint", "adapter") if deployment.adapter else ("an adapter", "checkpoint")
            raise SwapFailed(f"'{name}' is the name of {kinds[0]}: give the {kinds[1]} one of its own", param="name")
        if self._prepare is None or self._owner.state not in ("ready", "restarting"):
            raise Unavailable(f"the service is {self._owner.state}: no version can be loaded now", retry_after=2.0)
        try:
            served = ModelDirectory(models, models.other_names)
            model = await asyncio.to_thread(self._prepare, name, deployment, served)
        except (CheckpointError, TokenizerError, ValueError, OSError) as error:
            raise SwapFailed(f"'{deployment.source}' cannot be used: {error}", param="source") from error
        if model.base is not None and model.base not in models.values():
            raise SwapFailed(f"{model.base.key}, the base of {model.key}, has been taken out of service meanwhile")
        known = models.by_key(model.key)
        if known is None:
            return model
        if known.state == "failed" or not known.is_as(model) or (known in models.values() and not deployment.in_place):
            raise SwapFailed(f"{model.key} is loaded already: name another version", param="version")
        return known

    async def _bring_up(self, model: LoadedModel, *, tests: bool = True, warms_up: bool = True) -> None:
        """The worker frees what had the key before it loads what has it now."""
        if model.key in self._leaving:
            self._free(model.key)
        await self.probation.bring_up(model, tests=tests, warms_up=warms_up)

    def _put_in_service(self, model: LoadedModel, deployment: Deployment) -> None:
        """Between two turns of the event loop: nobody sees half of it."""
        models = self._owner.models
        alias, is_served = Alias({model.version: 1.0}), model in models.values()
        if is_served and self.alias_of(model.name) == alias:
            return
        switches = model.name in models and deployment.switch
        if switches:
            self._remember(model.name)
        if not is_served:
            self._serve(model)
        if switches:
            self._switch(model.name, alias, keeps=deployment.keep_former)

    def _serve(self, model: LoadedModel) -> None:
        """One that was loaded, or one that had been retired and is still in use."""
        models = self._owner.models
        models.pending.pop(model.key, None)
        if models.retired.pop(model.key, None) is not None:
            del self._leaving[model.key]
            model.state = "ready" if model.loaded is not None else "loading"
        models.serve(model)

    def _switch(self, name: str, alias: Alias, *, keeps: bool) -> None:
        versions, weights = self._versions_of(name), self.alias_of(name).weights
        self._owner.models.divide(name, alias)
        for version, weight in weights.items():
            if weight > 0 and version not in alias.weights and version != alias.shadow and not keeps:
                self._retire(versions[version])

    async def _rollback(self, name: str) -> dict[str, float]:
        former = self._former.get(name)
        versions = self._versions_of(name)
        if former is None:
            raise SwapFailed(f"'{name}' has stood for nothing else before")
        models = self._owner.models
        former.check_bases(models)
        for version, copy in former.models.items():
            if version in versions:
                continue
            model = models.retired.get(copy.key)
            if model is None:
                model = again(copy, models)
                await self._bring_up(model)
            self._serve(model)
        self._remember(name)
        self._switch(name, former.alias, keeps=False)
        return dict(former.alias.weights)

    # -- the way out --------------------------------------------------------------------------------------------------

    def _remember(self, name: str) -> None:
        self._former[name] = Former.of(self.alias_of(name), self._versions_of(name))

    def _retire(self, model: LoadedModel) -> None:
        self._owner.models.retire(model)
        self._leaving[model.key] = weakref.ref(model)
        self._spawn(self._free_when_unused(model.key, self._leaving[model.key]))

    async def _free_when_unused(self, key: str, of: "weakref.ref[LoadedModel]") -> None:
        owner, num_polls = self._owner, 0
        while self._leaving.get(key) is of:  # else it is back in service, or has been freed for another one of that key
            if of() is None:
                self._free(key)
                return
            num_polls += 1
            in_use = owner.num_requests_of(key) > 0 or bool(owner.models.holders_of(key))
            if num_polls % POLLS_PER_COLLECTION == 0 and not in_use:
                gc.collect()
            await asyncio.sleep(POLL_SECONDS)

    def _free(self, key: str) -> None:
        """Of one that nobody refers to any more."""
        del self._leaving[key]
        name, _, version = key.rpartition("@")
        self._owner.unload(name, version, key)
        free_memory()
        log.info("version freed", extra={"model": key})

    def _versions_of(self, name: str) -> dict[str, LoadedModel]:
        versions = self._owner.models.versions_of(name)
        if not versions:
            raise ModelNotFound(f"model '{name[:160]}' is not loaded; loaded: {', '.join(self._owner.models)}")
        return versions

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_look_at)
        return task


def _look_at(task: "asyncio.Task[Any]") -> None:
    """A change whose caller has left has told the log already; nothing else waits for its error."""
    with contextlib.suppress(asyncio.CancelledError):
        error = task.exception()
        if error is not None and not isinstance(error, ServiceError):
            log.error("a change of versions failed", exc_info=error)


def _check_same_tokens(served: LoadedModel, shadow: LoadedModel) -> None:
    """A shadow is given the caller's token ids, and they must mean the same to it."""
    vocabularies = [model.tokenizer.backend.get_vocab(with_added_tokens=True) for model in (served, shadow)]
    if vocabularies[0] != vocabularies[1]:
        raise SwapFailed(f"{shadow.key} cannot shadow {served.key}: their tokenizers differ", param="shadow")
