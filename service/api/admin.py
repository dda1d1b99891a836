"""`/admin/models`: versions put in service, shared out, compared, taken back and removed, while the service runs.

Needs an admin key: the gate sees to that. What a change means is `service.engine.versions`' business. HTTP only. Runs
in the API process.
"""

import re
from typing import Annotated, Literal, Protocol, cast

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.api.schemas_openai import Strict
from service.api.state import request_state
from service.engine.aliases import Alias
from service.engine.deployment import Deployment
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.versions import Versions
from service.errors import InvalidRequest
from service.settings import CacheMemory, ContextLength

router = APIRouter(prefix="/admin", tags=["admin"])

MAX_VERSIONS = 64
_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
VersionLabel = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Weight = Annotated[float, Field(ge=0, le=1_000_000)]


class DeployBody(Strict):
    """A checkpoint to load beside what runs; what is left out is as the service is configured."""

    source: str = Field(min_length=1, max_length=1024, description="folder or GGUF file on the server, or hub name")
    version: VersionLabel | None = Field(None, description="label; by default the checkpoint's fingerprint")
    adapter: bool = Field(False, description="a LoRA adapter, over the weights of its base, which is served")
    draft: str | None = Field(
        None, max_length=1024, description="folder, GGUF file or hub name of what guesses its tokens; empty: nothing"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    quantization: Literal["none", "int8", "int4", "fp8"] | None = None
    kv_cache_memory: CacheMemory | None = None
    kv_cache_dtype: Literal["auto", "int8"] | None = None
    max_model_len: ContextLength | None = None
    warm_up: bool = Field(True, description="run a tiny request before it serves")
    self_test: bool = Field(True, description="run the checkpoint's golden.json before it serves")
    switch: bool = Field(True, description="false: serve it as name@version alone, for a canary or a shadow")
    keep_former: bool = Field(False, description="leave the replaced version loaded, as name@version")


class AliasBody(Strict):
    """Shares of a name's requests by version; the same caller always gets the same version."""

    weights: dict[VersionLabel, Weight] = Field(min_length=1, max_length=MAX_VERSIONS)
    shadow: VersionLabel | None = Field(None, description="version that runs each request again, for comparison")


class VersionCard(Strict):
    version: str
    id: str = Field(description="name@version, by which requests may address it")
    state: str
    weight: float = Field(description="share of the name's requests, 0 to 1")
    shadow: bool = False
    source: str
    base: str | None = Field(None, description="name@version whose weights an adapter shares")
    draft: str | None = Field(None, description="what guesses its tokens")
    tasks: list[str]
    dtype: str | None = None
    quantization: str | None = None
    weight_bytes: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str | None = None
    load_seconds: float | None = None


class NameCard(Strict):
    name: str
    versions: list[VersionCard]
    can_roll_back: bool
    last_failure: str | None = None


class NameList(Strict):
    object: Literal["list"] = "list"
    data: list[NameCard]


class AdminEngine(Protocol):
    models: ModelDirectory

    @property
    def versions(self) -> Versions: ...


@router.get("/models", summary="All names with their versions, shares and states")
async def list_versions(request: Request) -> NameList:
    engine = _engine(request)
    names = dict.fromkeys(model.name for model in engine.models.everything())
    return NameList(data=[_card(engine, name) for name in names])


@router.post("/models/{name:path}/rollback", summary="Back to what the name stood for before its last change")
async def roll_back(request: Request, name: str) -> NameCard:
    engine = _engine(request)
    await engine.versions.rollback(checked_name(name))
    return _card(engine, name)


@router.put("/models/{name:path}/alias", summary="Share a name out between versions; set a shadow")
async def set_alias(request: Request, name: str, body: AliasBody) -> NameCard:
    engine = _engine(request)
    engine.versions.divide(checked_name(name), body.weights, body.shadow)
    return _card(engine, name)


@router.post("/models/{name:path}", summary="Load a version, test it, and switch to it; or leave all as it was")
async def deploy(request: Request, name: str, body: DeployBody) -> NameCard:
    engine = _engine(request)
    fields = body.model_dump()
    fields["kv_cache_memory"] = int(body.kv_cache_memory) if body.kv_cache_memory is not None else None
    await engine.versions.deploy(checked_name(name), Deployment(**fields))
    return _card(engine, name)


@router.delete(
    "/models/{name:path}", status_code=204, summary="Take a version without a share, or a whole name, out of service"
)
async def remove(request: Request, name: str) -> Response:
    _engine(request).versions.remove(name)
    return Response(status_code=204)


def _engine(request: Request) -> AdminEngine:
    return cast(AdminEngine, request_state(request).engine)


def checked_name(name: str, param: str = "name") -> str:
    if not _SERVED_NAME.fullmatch(name):
        raise InvalidRequest("a served name is 1 to 128 letters, digits, '.', '_', '/' or '-'", param=param)
    return name


def _card(engine: AdminEngine, name: str) -> NameCard:
    served = engine.models.versions_of(name)
    alias = engine.versions.alias_of(name) if served else Alias()
    total = sum(alias.weights.values()) or 1.0
    versions = []
    for model in engine.models.everything():
        if model.name == name:
            weight = alias.weights.get(model.version, 0.0) if model.version in served else 0.0
            versions.append(_version(model, weight=weight / total, shadow=model.version == alias.shadow))
    return NameCard(
        name=name,
        versions=versions,
        can_roll_back=engine.versions.can_roll_back(name),
        last_failure=engine.versions.failures.get(name),
    )


def _version(model: LoadedModel, *, weight: float, shadow: bool) -> VersionCard:
    loaded = model.loaded
    return VersionCard(
        version=model.version,
        id=model.key,
        state=model.state,
        weight=weight,
        shadow=shadow,
        source=model.location,
        base=None if model.base is None else model.base.key,
        draft=None if model.draft is None else model.draft.location,
        tasks=list(model.tasks),
        dtype=loaded.dtype if loaded is not None else None,
        quantization=loaded.quantization if loaded is not None else None,
        weight_bytes=loaded.weight_bytes if loaded is not None else None,
        kv_cache_bytes=loaded.kv_cache_bytes if loaded is not None else None,
        kv_cache_dtype=loaded.kv_cache_dtype if loaded is not None else None,
        load_seconds=loaded.load_seconds if loaded is not None else None,
    )
