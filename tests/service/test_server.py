"""Real processes with a fake engine: signals, exit codes, and what clients see meanwhile."""

import json
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

SCRIPT = Path(__file__).with_name("fake_service.py")
PATIENCE_SECONDS = 30.0


class Service:
    """A running `fake_service.py`, with a request or more under way."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        port = self.wait_for("listening")["port"]
        certificate = settings.get("tls_certificate")
        verify = ssl.create_default_context(cafile=certificate) if certificate else False
        url = f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=url, timeout=PATIENCE_SECONDS, verify=verify)
        self._threads = ThreadPoolExecutor()

    def wait_for(self, message: str) -> dict[str, Any]:
        """Reads the log up to the line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            fields: dict[str, Any] = json.loads(line)
            if fields["message"].startswith(message):
                return fields
        pytest.fail(f"the service ended before it said '{message}'")

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hold(self):
        """A request that the service has accepted; its future gives the response."""
        future = self._threads.submit(self.client.post, "/v1/hold")
        self.wait_for("held")
        return future

    def wait_until_not_ready(self) -> httpx.Response:
        """A signal takes a moment to arrive; each probe is answered in the meantime."""
        while True:
            response = self.client.get("/readyz")
            if response.status_code != 200:
                return response

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._threads.shutdown()
        self.client.close()


@pytest.fixture
def make_service() -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def make(**settings: Any) -> Service:
        services.append(Service({"drain_timeout": PATIENCE_SECONDS, **settings}))
        return services[-1]

    yield make
    for service in services:
        service.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_service_ends_with_zero_at_the_first_signal(make_service, number):
    service = make_service()
    assert service.client.get("/readyz").status_code == 200
    service.process.send_signal(number)
    assert service.exit_code() == 0
    service.wait_for("stopped")


def test_while_draining_probes_and_refusals_are_answered_and_accepted_requests_finish(make_service):
    service = make_service()
    held = [service.hold() for _ in range(3)]
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_until_not_ready().json()["state"] == "draining"
    assert service.client.get("/livez").status_code == 200
    refused = service.client.post("/v1/hold")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert refused.headers["connection"] == "close"
    assert not any(future.done() for future in held)
    service.order("finish")
    assert [future.result().content for future in held] == [b"begun done"] * 3
    assert service.exit_code() == 0


def test_drain_that_takes_too_long_is_ended_by_the_engine_and_the_exit_is_still_zero(make_service):
    service = make_service(drain_timeout=0.2)
    held = service.hold()
    service.process.send_signal(signal.SIGTERM)
    assert held.result().content == b"begun done"
    assert service.exit_code() == 0


def test_second_signal_ends_at_once_and_the_exit_code_says_so(make_service):
    service = make_service()
    held = service.hold()
    service.process.send_signal(signal.SIGTERM)
    service.wait_until_not_ready()
    service.process.send_signal(signal.SIGTERM)
    assert service.exit_code() == 128 + signal.SIGTERM
    with pytest.raises(httpx.TransportError):
        held.result()


def test_engine_that_failed_for_good_ends_the_process_with_its_own_exit_code(make_service):
    service = make_service()
    service.order("fail")
    assert service.exit_code() == 3


@pytest.fixture
def make_certificate(tmp_path) -> Callable[[str], dict[str, str]]:
    """make_certificate(name): a new self-signed certificate and its key, as settings."""
    if shutil.which("openssl") is None:
        pytest.skip("a certificate is made with openssl, which is not here")

    def make(name: str) -> dict[str, str]:
        certificate, key = str(tmp_path / f"{name}.pem"), str(tmp_path / f"{name}.key")
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        )
        options = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key]
        subprocess.run([*command.split(), *options], check=True, capture_output=True)
        return {"tls_certificate": certificate, "tls_key": key}

    return make


def test_certificate_and_key_make_it_https(make_service, make_certificate):
    service = make_service(**make_certificate("server"))
    assert service.client.get("/readyz").status_code == 200
    service.process.send_signal(signal.SIGTERM)
    assert service.exit_code() == 0


def put_in_place(new: dict[str, str], old: dict[str, str]) -> None:
    for name, path in new.items():
        Path(path).replace(old[name])


def shown_certificate(service: Service) -> str:
    return ssl.get_server_certificate(("127.0.0.1", service.client.base_url.port or 0), timeout=PATIENCE_SECONDS)


def test_a_renewed_certificate_is_shown_to_new_connections_and_cuts_none(make_service, make_certificate):
    files, renewed = make_certificate("server"), make_certificate("renewed")
    former, expected = Path(files["tls_certificate"]).read_text(), Path(renewed["tls_certificate"]).read_text()
    service = make_service(**files)
    assert shown_certificate(service).strip() == former.strip()
    held = service.hold()
    put_in_place(renewed, files)
    service.wait_for("certificate reloaded")
    assert shown_certificate(service).strip() == expected.strip()
    service.order("finish")
    assert held.result().content == b"begun done"
    assert service.client.get("/readyz").status_code == 200, "on the connection that knows the former certificate"


def test_a_key_that_does_not_fit_leaves_the_former_certificate_in_use(make_service, make_certificate):
    """As it is for a moment where certificate and key are written one after the other."""
    files, renewed = make_certificate("server"), make_certificate("renewed")
    former, expected = Path(files["tls_certificate"]).read_text(), Path(renewed["tls_certificate"]).read_text()
    service = make_service(**files)
    put_in_place({"tls_key": renewed["tls_key"]}, files)
    service.wait_for("certificate not reloaded")
    assert shown_certificate(service).strip() == former.strip()
    put_in_place({"tls_certificate": renewed["tls_certificate"]}, files)
    service.wait_for("certificate reloaded")
    assert shown_certificate(service).strip() == expected.strip()
