"""The page at /docs: of itself alone, true to the description, and of use to whoever has a key."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI

from service.api.docs import PAGE
from service.app import ROUTERS, create_app
from service.http.shortcut import plain_routes
from service.settings import Settings


@pytest.fixture(scope="module")
def application() -> FastAPI:
    return create_app(Settings(), cast(Any, None))


async def test_the_page_needs_no_key_and_nothing_from_elsewhere(make_client, tmp_path):
    """The framework's page loads its script from another server: blank without internet, and a tale with it."""
    (tmp_path / "keys").write_text("alice:sk-alice-0123\n")
    client = await make_client(api_keys_file=tmp_path / "keys")
    response = await client.get("/docs")
    assert (response.status_code, (await client.head("/docs")).status_code) == (200, 200)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"(?:https?:)?//\w|\bsrc=|@import|url\(", response.text) == []
    assert len(response.content) <= 15_000
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["connect-src"], policy["form-action"]) == ("'none'", "'self'", "'none'")
    assert re.findall(r"\son\w+=|\sstyle=|innerHTML", response.text) == []  # what the policy would not let run
    assert (await client.get("/openapi.json")).status_code == 401


async def test_there_is_no_second_page(make_client):
    client = await make_client()
    for path in ("/redoc", "/docs/oauth2-redirect"):
        assert (await client.get(path)).status_code == 404


def test_every_body_of_the_description_has_an_example_that_its_endpoint_takes(application: FastAPI) -> None:
    kinds = plain_routes([route for router in ROUTERS for route in router.routes])
    missing = []
    for path, operations in application.openapi()["paths"].items():
        for method, operation in operations.items():
            if "requestBody" not in operation:
                continue
            example = operation["requestBody"]["content"]["application/json"].get("example")
            if example is None:
                missing.append(f"{method} {path}")
            elif path in kinds:
                kinds[path][1].validate_python(example)
    assert missing == []


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_shows_all_that_is_described_and_sends_what_its_form_says(
    application: FastAPI, tmp_path: Path
) -> None:
    description = application.openapi()
    (tmp_path / "page.html").write_text(PAGE)
    (tmp_path / "openapi.json").write_text(json.dumps(description))
    run = subprocess.run(
        ["node", str(Path(__file__).parent / "docs_page.mjs"), "page.html", "openapi.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert "needs an API key" in found["refused"]
    wanted = {f"{method} {path}" for path, operations in description["paths"].items() for method in operations}
    assert set(found["seen"]) == wanted
    chat = found["seen"]["post /v1/chat/completions"]
    for words in ("messages", "required", "tool_call_id", "temperature", "≥ 0, ≤ 2", "chat_template_kwargs"):
        assert words in chat
    assert "top_k" in found["seen"]["post /hf/summarization"]  # two references deep
    address, method, headers, body = found["requests"][-1]
    assert (address, method) == ("https://here.example/behind/v1/completions", "POST")
    assert headers == {"Content-Type": "application/json", "Authorization": "Bearer a-key"}
    assert json.loads(body) == {"prompt": "Once upon a time", "max_tokens": 40}
    assert found["shown"].startswith("200")
    assert '"answer": 42' in found["shown"]
    assert re.fullmatch(r"204 No Content, \d+ ms\s*", found["emptied"])  # what has no body is no fault
    assert found["requests"][-2][0] == "https://here.example/behind/v1/models/a%20model"
    assert found["whileEmpty"] == len(found["requests"]) + 1 - 2  # without a name nothing was sent
    assert found["left"] == sum("rerank" in f"{name}{text}".lower() for name, text in _lines(description))


def _lines(description: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"{method} {path}", operation.get("summary", ""))
        for path, operations in description["paths"].items()
        for method, operation in operations.items()
    ]
