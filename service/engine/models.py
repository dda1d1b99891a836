"""Which checkpoints are served under which names, and which of them can do a task.

Knows folders, descriptions and tokenizers, not weights: those are the worker's. API process only.
"""

from dataclasses import dataclass
from typing import Literal

from model.chat_template import ChatTemplate
from model.description import CheckpointDescription
from model.languages import Languages
from model.tokenizer import Tokenizer
from service.engine.protocol import Loaded, ModelSpec
from service.errors import ModelNotFound, TaskNotSupported

ModelState = Literal["loading", "ready", "failed", "draining"]


@dataclass(slots=True, kw_only=True, eq=False)
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

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.description.tasks


class ModelDirectory(dict[str, LoadedModel]):
    """Served name to checkpoint, in the order of loading."""

    def by_key(self, key: str) -> LoadedModel | None:
        """The checkpoint with that `name@version`."""
        return next((model for model in self.values() if model.key == key), None)

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        """The checkpoint of that name (`name` or `name@version`), or the first that can do the task.

        Raises:
            ModelNotFound: no checkpoint has that name, or none can do the task.
            TaskNotSupported: the named checkpoint cannot do the task; the message says which could.
        """
        able = [model for model in self.values() if task in model.tasks]
        if name is None:
            if not able:
                raise ModelNotFound(f"no loaded checkpoint can do '{task}'", param="model")
            return able[0]
        model = self.get(name) or self.by_key(name)
        if model is None:
            raise ModelNotFound(f"model '{name}' is not loaded; loaded: {', '.join(self)}", param="model")
        if task not in model.tasks:
            others = f"; '{task}' is done by: {', '.join(m.name for m in able)}" if able else ""
            raise TaskNotSupported(
                f"model '{model.name}' cannot do '{task}', it can do: {', '.join(model.tasks)}{others}", param="model"
            )
        return model
