"""`GET /docs`: a page that lists the endpoints from /openapi.json and lets them be tried.

It is one file of ours that loads nothing else, so that it works where there is no internet; its policy names the hashes
of its own script and style, and forbids a browser all others. The page itself tells nothing of this service and needs
no key; the description that it reads does. HTTP only. Runs in the API process.
"""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

PAGE = files("service.api").joinpath("pages/docs.html").read_text(encoding="utf-8")


def content_security_policy(page: str) -> str:
    """Lets run what stands in the page, and lets it ask this service; nothing else (W3C, CSP level 3, 6.7.3)."""
    script, style = (_source(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _source(page: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert len(found) == 1, f"the page has one {tag}"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": content_security_policy(PAGE),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@router.get("/docs")
@router.head("/docs")
async def docs(_request: Request) -> HTMLResponse:
    return HTMLResponse(PAGE, headers=HEADERS)
