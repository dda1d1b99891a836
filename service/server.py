"""Runs the application: listens, and ends as Kubernetes wants it, without losing what was accepted.

First SIGTERM or SIGINT: not ready at once, listening goes on, accepted requests finish within the drain limit, exit 0.
Second: ends at once. An engine that has failed for good ends the process too. Runs in the API process, main thread.
"""

import asyncio
import logging
import resource
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.state import AppState, app_state
from service.engine.memory import keep_what_is_here
from service.http.certificate import Certificate
from service.http.protocol import PROBE_CONNECTIONS, ConnectionLimits, bounded_protocol
from service.settings import Settings
from service.settings_sources import SettingsError

log = logging.getLogger(__name__)

EXIT_ENGINE_FAILED = 3
GRACE_SECONDS = 5
"""After the engine has drained, for the last bytes of answers to leave."""
SPARE_DESCRIPTORS = 128
TICKS_PER_LOOK = 10
"""At the certificate's files: once a second."""


class DrainingServer(uvicorn.Server):
    """Signals start a drain; only its end stops the listening."""

    def __init__(self, config: uvicorn.Config, state: AppState) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._certificate: Certificate | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._certificate = self._watched_certificate()
        keep_what_is_here()
        address, port = self.servers[0].sockets[0].getsockname()[:2]
        log.info("listening", extra={"address": address, "port": port})
        if self._state.draining:
            self._begin_drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Runs between two bytecodes of the main thread: sets what must hold at once, leaves the rest to the loop."""
        if self._state.draining:
            self.exit_code = 128 + sig
            self.force_exit = self.should_exit = True
            return
        self._state.draining = True
        if self._loop is not None and self.started:
            self._loop.call_soon_threadsafe(self._begin_drain)

    async def on_tick(self, counter: int) -> bool:
        if self._state.engine.state == "failed" and not self.should_exit:
            log.critical("the engine has failed for good: ending")
            self.exit_code = EXIT_ENGINE_FAILED
            self.should_exit = True
        if self._certificate is not None and counter % TICKS_PER_LOOK == 0:
            self._certificate.refresh()
        return await super().on_tick(counter)

    def _watched_certificate(self) -> Certificate | None:
        settings = self._state.settings
        if self.config.ssl is None or settings.tls_certificate is None or settings.tls_key is None:
            return None
        return Certificate(self.config.ssl, settings.tls_certificate, settings.tls_key)

    def _begin_drain(self) -> None:
        self._drain = asyncio.get_running_loop().create_task(self._drain_engine())

    async def _drain_engine(self) -> None:
        seconds = self._state.settings.drain_timeout
        log.info("draining: accepted requests have %g seconds, new ones are refused", seconds)
        try:
            await self._state.drain()
        except Exception:
            log.exception("draining failed: ending")
            self.exit_code = EXIT_ENGINE_FAILED
        finally:
            self.should_exit = True


def serve(settings: Settings, app: FastAPI) -> int:
    """Serves until told to end. Returns the process's exit code.

    Raises SettingsError if it would listen to other machines without keys.
    """
    refuse_open_doors(settings)
    max_connections = _allow_connections(settings.max_connections)
    limits = ConnectionLimits(
        max_connections=max_connections,
        max_header_bytes=settings.max_header_bytes,
        header_timeout_seconds=settings.header_timeout,
        write_timeout_seconds=settings.write_timeout,
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded_protocol(limits),
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(int(settings.keep_alive_timeout), 1),
        timeout_graceful_shutdown=GRACE_SECONDS,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    server = DrainingServer(config, app_state(app))
    server.run()
    return server.exit_code


def refuse_open_doors(settings: Settings) -> None:
    if settings.is_public and not settings.has_keys and not settings.no_auth:
        raise SettingsError(
            f"{settings.host} can be reached by other machines: give --api-keys-file or SLIMPAJAMA_API_KEY, "
            "or --no-auth if that is meant"
        )


def _allow_connections(wanted: int) -> int:
    """Raises the process's limit of open files as far as needed and possible; returns how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = wanted + PROBE_CONNECTIONS + SPARE_DESCRIPTORS
    allowed = max(soft, needed if hard == resource.RLIM_INFINITY else min(needed, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    fitting = max(allowed - PROBE_CONNECTIONS - SPARE_DESCRIPTORS, 1)
    if fitting < wanted:
        log.warning("only %d connections fit into the limit of open files (%d)", fitting, allowed)
    return min(wanted, fitting)
