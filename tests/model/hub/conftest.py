"""A small HTTP server that speaks as much of the hub's API as a download needs, on a port of its own."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

Revisions = dict[str, dict[str, bytes]]


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """Repositories by name, each with its revisions' files; counts what is asked for."""

    endpoint: str = ""
    repositories: dict[str, Revisions] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    downloads: list[str] = field(default_factory=list)
    num_requests: int = 0
    cut_after_bytes: dict[str, list[int]] = field(default_factory=dict)
    """File name to bytes sent before the connection breaks, download by download."""

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | str:
        """The commit and its files, or the hub's code for what is wrong."""
        if name in self.gated:
            return "GatedRepo"
        if name not in self.repositories:
            return "RepoNotFound"
        for branch, files in self.repositories[name].items():
            if revision in (branch, commit(branch)):
                return commit(branch), files
        return "RevisionNotFound"


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.num_requests += 1
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                name, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
            else:
                name, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
            found = hub.find(name, revision)
            if isinstance(found, str):
                status = {"GatedRepo": 403}.get(found, 404)
                self._send(status, b"{}", {"X-Error-Code": found, "X-Error-Message": found})
                return
            sha, files = found
            if kind == "revision":
                siblings = [{"rfilename": path} for path in files]
                self._send(200, json.dumps({"id": name, "sha": sha, "siblings": siblings}).encode(), {})
            elif kind == "tree":
                rows = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
                self._send(200, json.dumps(rows).encode(), {})
            else:
                self._send_file("/".join(parts[4:]), sha, files)

        def _send_file(self, path: str, sha: str, files: dict[str, bytes]) -> None:
            if path not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = files[path]
            headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
            status = 200
            if "Range" in self.headers:
                start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data, status = data[start:], 206
            if self.command == "GET":
                hub.downloads.append(path if status == 200 else f"{path} (rest)")
            cuts = hub.cut_after_bytes.get(path) if self.command == "GET" else None
            self._send(status, data, headers, cut=cuts.pop() if cuts else None)

        def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()
