"""`GET /metrics` for Prometheus, and `GET /version`. HTTP only. Runs in the API process."""

import platform

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.responses import Response

from service.api.state import request_state

router = APIRouter(tags=["operation"])


class Version(BaseModel):
    name: str = "slimpajama"
    version: str
    python: str


@router.get("/metrics", summary="All metrics, as text or OpenMetrics", response_class=Response)
async def metrics(request: Request) -> Response:
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request_state(request).metrics.registry), headers={"Content-Type": media_type})


@router.get("/version", summary="What is running")
async def version(request: Request) -> Version:
    return Version(version=request_state(request).version, python=platform.python_version())
