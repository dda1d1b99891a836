"""What a name stood for before its last change: what a rollback goes back to.

Copies of what was served, and of adapters' bases: they hold no weights and keep nothing loaded. Whether an adapter can
be gone back to depends on its base, which may be gone by then. Pure data. API process only.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from service.engine.aliases import Alias
from service.engine.models import LoadedModel, ModelDirectory
from service.errors import SwapFailed


@dataclass(frozen=True, slots=True)
class Former:
    alias: Alias
    models: dict[str, LoadedModel]

    @classmethod
    def of(cls, alias: Alias, versions: Mapping[str, LoadedModel]) -> "Former":
        wanted = [version for version, weight in alias.weights.items() if weight > 0 or version == alias.heaviest]
        wanted += [alias.shadow] if alias.shadow is not None else []
        copies = {version: _copy(versions[version]) for version in wanted if version in versions}
        weights = {version: weight for version, weight in alias.weights.items() if version in copies}
        return cls(Alias(weights, alias.shadow), copies)

    def check_bases(self, models: ModelDirectory) -> None:
        """Raises SwapFailed: the base of an adapter that would have to be loaded again is not there."""
        for copy in self.models.values():
            if models.by_key(copy.key) is None:
                again(copy, models)


def again(copy: LoadedModel, models: ModelDirectory) -> LoadedModel:
    """To be loaded, an adapter over its base as that is loaded now. Raises SwapFailed, if it is not."""
    if copy.base is None:
        return dataclasses.replace(copy)
    base = models.by_key(copy.base.key)
    if base is None or base.key in models.pending or not base.is_as(copy.base):
        raise SwapFailed(f"{copy.key} was served over {copy.base.key}, which is not loaded any more: deploy it anew")
    return dataclasses.replace(copy, base=base)


def _copy(model: LoadedModel) -> LoadedModel:
    base = None if model.base is None else dataclasses.replace(_copy(model.base), unpacked=None, draft=None)
    return dataclasses.replace(model, state="loading", loaded=None, base=base)
