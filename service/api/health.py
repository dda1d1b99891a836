"""Probes: started once everything is loaded, ready while a request would be taken, live while there is hope.

Answered from what is in memory, without a key, in well under a millisecond. HTTP only. Runs in the API process.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from service.api.state import AppState, request_state

router = APIRouter(tags=["health"])

STARTED_STATES = frozenset({"ready", "restarting", "draining"})
DEAD_STATES = frozenset({"failed", "stopped"})
RETRY_AFTER_SECONDS = {"starting": 2, "restarting": 1, "draining": 5}
DEAD_RETRY_AFTER_SECONDS = 30


@router.get("/livez", summary="Whether the process should go on living")
@router.head("/livez", include_in_schema=False)
async def livez(request: Request) -> JSONResponse:
    state = request_state(request)
    return _answer(state, healthy=state.engine_state not in DEAD_STATES and state.engine.alive)


@router.get("/startupz", summary="Whether everything has been loaded once")
@router.head("/startupz", include_in_schema=False)
async def startupz(request: Request) -> JSONResponse:
    state = request_state(request)
    return _answer(state, healthy=state.engine_state in STARTED_STATES)


@router.get("/", summary="The same as /readyz, as text-embeddings-inference has it")
@router.get("/ping", summary="The same as /readyz, as SageMaker asks for it")
@router.get("/readyz", summary="Whether a request would be taken now")
@router.get("/health", summary="The same as /readyz")
@router.head("/readyz", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def readyz(request: Request) -> JSONResponse:
    state = request_state(request)
    return _answer(state, healthy=state.engine_state == "ready")


def _answer(state: AppState, *, healthy: bool) -> JSONResponse:
    body: dict[str, Any] = {
        "status": "ok" if healthy else "unavailable",
        "state": state.engine_state,
        "models": {name: model.state for name, model in state.engine.models.items()},
    }
    if healthy:
        return JSONResponse(body)
    retry_after = RETRY_AFTER_SECONDS.get(state.engine_state, DEAD_RETRY_AFTER_SECONDS)
    return JSONResponse(body, status_code=503, headers={"Retry-After": str(retry_after)})
