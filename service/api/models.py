"""`GET /v1/models`: what is loaded, in OpenAI's shape, with what a caller wants to know before asking.

HTTP only. Runs in the API process.
"""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from service.api.state import request_state
from service.engine.models import LoadedModel
from service.errors import ModelNotFound
from service.tasks.classification import head_names
from service.tasks.sampling import context_limit

router = APIRouter(prefix="/v1", tags=["models"])


class ModelCard(BaseModel):
    id: str
    """A name to ask for it by: `name@version` where another version has the name itself, or an alias."""
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "slimpajama"
    root: str
    """The name it is served under: another one than `id` where that is an alias."""
    parent: str | None
    """The base of an adapter: the name that it is served under where its weights are shared."""
    version: str
    architecture: str
    tasks: list[str]
    context_length: int
    max_model_len: int
    """Tokens that a prompt and its completion may have together here, by vLLM's name."""
    dtype: str | None
    quantization: str | None
    """Of the weights: none, int8, int4 or fp8. Both are None until the weights are loaded."""
    weight_bytes: int | None
    kv_cache_bytes: int | None
    """Of the worker's memory; None until the weights are loaded."""
    kv_cache_dtype: str | None
    """Of keys and values; None also where there are none."""
    state: str
    labels: list[str] = []
    """Its own; those of its heads are in `heads`."""
    heads: dict[str, list[str]] = {}
    """Of a request's `head`: the labels of each."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/models", summary="The loaded checkpoints")
async def list_models(request: Request) -> ModelList:
    state = request_state(request)
    names = state.engine.models.names()
    return ModelList(data=[_card(name, model, state.started_at) for name, model in names.items()])


@router.get("/models/{name:path}", summary="One checkpoint, by name or name@version")
async def get_model(request: Request, name: str) -> ModelCard:
    state = request_state(request)
    names = state.engine.models.names()
    for known, model in names.items():
        if name in (known, model.key):
            return _card(known, model, state.started_at)
    loaded = ", ".join(names) or "none"
    raise ModelNotFound(f"model '{name[:128]}' is not loaded; loaded: {loaded}", param="model")


def _card(served: str, model: LoadedModel, created: int) -> ModelCard:
    loaded = model.loaded
    return ModelCard(
        id=served,
        created=created,
        root=model.name,
        parent=model.description.base if model.base is None else model.base.name,
        version=model.version,
        architecture=model.description.architecture,
        tasks=list(model.description.tasks),
        context_length=model.description.context_length,
        max_model_len=context_limit(model),
        dtype=loaded.dtype if loaded is not None else None,
        quantization=loaded.quantization if loaded is not None else None,
        weight_bytes=loaded.weight_bytes if loaded is not None else None,
        kv_cache_bytes=loaded.kv_cache_bytes if loaded is not None else None,
        kv_cache_dtype=loaded.kv_cache_dtype if loaded is not None else None,
        state=model.state,
        labels=list(model.description.labels),
        heads={name: list(model.description.heads[name].labels) for name in head_names(model.description)},
    )
