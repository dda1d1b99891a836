"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them: adapters come and go beside their base.

Need an admin key: the gate sees to that. They do what `/admin/models` does with `adapter` set, in the shape that
vLLM's clients know. HTTP only. Runs in the API process.
"""

from typing import cast

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import PlainTextResponse

from service.api.admin import AdminEngine, checked_name
from service.api.schemas_openai import Strict
from service.api.state import request_state
from service.engine.deployment import Deployment
from service.errors import InvalidRequest, ModelNotFound

router = APIRouter(prefix="/v1", tags=["admin"])


class LoadAdapterBody(Strict):
    lora_name: str = Field(description="the name to serve it under")
    lora_path: str = Field(min_length=1, max_length=1024, description="folder on the server, or hub name")
    load_inplace: bool = Field(False, description="replace what has the name; false: refuse where something has")


class UnloadAdapterBody(Strict):
    lora_name: str


@router.post("/load_lora_adapter", summary="Serve a LoRA adapter over a checkpoint that is served, as vLLM does")
async def load_lora_adapter(request: Request, body: LoadAdapterBody) -> PlainTextResponse:
    engine, name = _engine(request), checked_name(body.lora_name, "lora_name")
    served = engine.models.get(name)
    if served is not None and served.base is not None and not body.load_inplace:
        raise InvalidRequest(f"'{name}' is loaded already: replace it with load_inplace", param="lora_name")
    await engine.versions.deploy(name, Deployment(source=body.lora_path, adapter=True, in_place=body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter", summary="Take such an adapter out of service, as vLLM does")
async def unload_lora_adapter(request: Request, body: UnloadAdapterBody) -> PlainTextResponse:
    engine, name = _engine(request), body.lora_name
    model = engine.models.get(name)
    if model is None or model.base is None:
        adapters = ", ".join(key for key, other in engine.models.items() if other.base is not None) or "none"
        raise ModelNotFound(f"there is no adapter '{name[:160]}'; adapters: {adapters}", param="lora_name")
    engine.versions.remove(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _engine(request: Request) -> AdminEngine:
    return cast(AdminEngine, request_state(request).engine)
