"""Which checkpoints are served under which names and versions, and which of them can do a task.

Knows folders, descriptions and tokenizers, not weights: those are the worker's. A version that is being loaded is not
served yet; one that has been replaced is served no more, but known for as long as somebody still uses it. API process
only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

from model.chat_template import ChatTemplate
from model.description import SPARSE_TASK, CheckpointDescription
from model.gguf.folder import Unpacked
from model.languages import Languages
from model.tokenizer import Tokenizer
from service.engine.aliases import Alias, sticky_key
from service.engine.protocol import Loaded, ModelSpec, max_batch_items
from service.errors import ModelNotFound, TaskNotSupported

ModelState = Literal["loading", "ready", "failed", "draining"]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A smaller checkpoint that guesses another one's tokens."""

    location: str
    """The folder or the file that it came from."""
    unpacked: Unpacked | None = None


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class LoadedModel:
    """A checkpoint as the API process sees it; `loaded` is set once the worker holds its weights."""

    name: str
    version: str
    spec: ModelSpec
    description: CheckpointDescription
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    languages: Languages | None = None
    """Translating encoder-decoders: which there are, and how the network is told."""
    state: ModelState = "loading"
    loaded: Loaded | None = None
    base: "LoadedModel | None" = None
    """An adapter's that shares its base's weights: the version that it was bound to, which is kept for as long as it is
    here."""
    draft: DraftModel | None = None
    step_tokens: int = 0
    """Of single-pass work, of a step that has the worker to itself: what the worker said last, whether or not it is
    there now."""
    asked_for: str | None = None
    """The folder, file or hub name that it was found by."""
    unpacked: Unpacked | None = None
    """Of a GGUF file: its folder, which the worker reads again whenever it is restarted, and rollbacks whenever they go
    back to it."""

    @property
    def location(self) -> str:
        """The folder or the file that it came from."""
        return self.spec.folder if self.unpacked is None else str(self.unpacked.location)

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def lane_key(self) -> str:
        """Of the checkpoint in whose steps its requests are computed: its own, or its base's."""
        return self.key if self.base is None else self.base.key

    def is_as(self, other: "LoadedModel") -> bool:
        """Whether both are one checkpoint, loaded in one way: the same key can be given to other files."""
        return self.spec == other.spec and self.description.version == other.description.version

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.description.tasks

    @property
    def max_batch_items(self) -> int:
        """Inputs of a step of its single-pass work."""
        return max_batch_items(self.description.vocab_size if SPARSE_TASK in self.tasks else None)


class ModelDirectory(dict[str, LoadedModel]):
    """Served name to checkpoint, in the order of loading; of a name's versions the heaviest has the name itself, the
    others have `name@version`."""

    def __init__(
        self, models: Mapping[str, LoadedModel] | None = None, other_names: Mapping[str, str] | None = None
    ) -> None:
        """`other_names` stand for served ones, whichever checkpoint has those at the time."""
        super().__init__(models or {})
        self.other_names = dict(other_names or {})
        self.aliases: dict[str, Alias] = {}
        self.pending: dict[str, LoadedModel] = {}
        """Being loaded or tested, by key."""
        self.retired: WeakValueDictionary[str, LoadedModel] = WeakValueDictionary()
        """Replaced, by key: here until the last request that was given one has let go of it."""

    def by_key(self, key: str) -> LoadedModel | None:
        """The checkpoint with that `name@version`, served or not."""
        served = self.get(key.rpartition("@")[0])
        if served is None or served.key != key:
            served = next((model for model in self.values() if model.key == key), None)
        return served or self.pending.get(key) or self.retired.get(key)

    def everything(self) -> Iterator[LoadedModel]:
        """All that the worker should hold, those that are served first."""
        yield from self.values()
        yield from self.retired.values()
        yield from self.pending.values()

    def adapters_of(self, key: str) -> list[LoadedModel]:
        """Those that share the weights of the checkpoint with that `name@version`, served or still in use."""
        models = (*self.values(), *self.retired.values())
        return [model for model in models if model.base is not None and model.base.key == key]

    def holders_of(self, key: str) -> list[LoadedModel]:
        """Those adapters, and the ones that are being loaded over it."""
        pending = [model for model in self.pending.values() if model.base is not None and model.base.key == key]
        return self.adapters_of(key) + pending

    def versions_of(self, name: str) -> dict[str, LoadedModel]:
        return {model.version: model for model in self.values() if model.name == name}

    def names(self) -> dict[str, LoadedModel]:
        """All that requests may name: served names in the order of loading, then the others that stand for one."""
        stand_for = {other: self._served(name) for other, name in self.other_names.items()}
        return {**self, **{other: model for other, model in stand_for.items() if model is not None}}

    def _served(self, name: str) -> LoadedModel | None:
        """By `name` or `name@version`."""
        return self.get(name) or next((model for model in self.values() if model.key == name), None)

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        """The checkpoint of that name (`name` or `name@version`), or the first that can do the task.

        A name that several versions share gives the one that the caller always gets.

        Raises:
            ModelNotFound: no checkpoint has that name, or none can do the task.
            TaskNotSupported: the named checkpoint cannot do the task; the message says which could.
        """
        able = [model for model in self.offered() if task in model.tasks]
        if name is None:
            if not able:
                others = (
                    ", ".join(dict.fromkeys(other for model in self.offered() for other in model.tasks)) or "nothing"
                )
                raise ModelNotFound(
                    f"no loaded checkpoint can do '{task}'; together they can do: {others}", param="model"
                )
            return able[0]
        model = self.named(name)
        if task not in model.tasks:
            others = f"; '{task}' is done by: {', '.join(other.name for other in able)}" if able else ""
            raise TaskNotSupported(
                f"model '{model.name}' cannot do '{task}', it can do: {', '.join(model.tasks)}{others}", param="model"
            )
        return model

    def named(self, name: str) -> LoadedModel:
        """The checkpoint of that name (`name`, `name@version` or another name for one). Raises ModelNotFound."""
        served = self.other_names.get(name, name)
        found = self._served(served)
        if found is None:
            raise ModelNotFound(f"model '{name}' is not loaded; loaded: {', '.join(self.names())}", param="model")
        return self.share_of(found) if served == found.name else found

    def offered(self) -> list[LoadedModel]:
        """What a caller who names no checkpoint may get, in the order of loading: of each name the version that this
        caller always gets, never one that is served under `name@version` alone."""
        return [self.share_of(model) for key, model in self.items() if key == model.name]

    def share_of(self, model: LoadedModel) -> LoadedModel:
        """The version of this checkpoint's name that the caller gets."""
        alias = self.aliases.get(model.name)
        if alias is None:
            return model
        return self.versions_of(model.name).get(alias.pick(model.name, sticky_key()), model)

    def shadow_of(self, model: LoadedModel) -> LoadedModel | None:
        """The version that runs this one's requests again; None for the shadow itself."""
        alias = self.aliases.get(model.name)
        if alias is None or alias.shadow is None or alias.shadow == model.version:
            return None
        return self.versions_of(model.name).get(alias.shadow)

    def serve(self, model: LoadedModel) -> None:
        """Serves a further version beside the others, or a new name."""
        self[model.key if model.name in self else model.name] = model

    def divide(self, name: str, alias: Alias) -> None:
        """Gives each version its share of a name; the heaviest gets the name itself, in its place of the order."""
        former, primary = self[name], self.versions_of(name)[alias.heaviest]
        if former is not primary:
            del self[primary.key]
            self[name] = primary
            self[former.key] = former
        if len(alias.weights) > 1 or alias.shadow is not None:
            self.aliases[name] = alias
        else:
            self.aliases.pop(name, None)

    def retire(self, model: LoadedModel) -> None:
        """Serves a version no more. The name itself must have been given to another one, unless this was the last."""
        key = model.key if self.get(model.name) is not model else model.name
        del self[key]
        model.state = "draining"
        self.retired[model.key] = model
