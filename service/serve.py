"""`slimpajama serve`: from flags to a running service. Wires settings, logs, metrics, engine, application and server.

Everything that can be refused before listening is refused here, with exit code 2 and a line that says what to change.
"""

import importlib
import sys
from collections.abc import Mapping

from service import logs
from service.app import create_app, package_version
from service.auth import KeyFileError
from service.engine.assembly import make_engine
from service.engine.memory import bound_heaps
from service.flags import EXIT_USAGE
from service.http.certificate import check_certificate
from service.load_progress import LoadProgress
from service.metrics import Metrics
from service.server import refuse_open_doors, serve
from service.settings import Settings, load_settings
from service.settings_sources import SettingsError
from service.tracing import Tracer

LARGE_BYTES = 1 << 17


def run(flags: Mapping[str, object]) -> int:
    """Returns the process's exit code: 0 after a drain, 2 for a wrong setting, 3 if the engine failed for good."""
    try:
        settings = load_settings(flags)
        refuse_open_doors(settings)
        _refuse_nothing_to_serve(settings)
        _refuse_unusable_certificate(settings)
        bound_heaps(large_bytes=LARGE_BYTES)
        logs.configure(settings.log_format, settings.log_level)
        metrics = Metrics(build_version=package_version())
        engine = make_engine(settings, metrics)
        engine.on_loading = LoadProgress()
        app = create_app(settings, engine, registry=metrics, tracer=_make_tracer(settings))
    except (SettingsError, KeyFileError) as error:
        sys.stderr.write(f"slimpajama serve: error: {error}\n")
        return EXIT_USAGE
    return serve(settings, app)


def _refuse_nothing_to_serve(settings: Settings) -> None:
    if not settings.model:
        raise SettingsError("nothing to serve: give --model FOLDER_OR_GGUF_OR_HUB_NAME, or SLIMPAJAMA_MODEL")


def _refuse_unusable_certificate(settings: Settings) -> None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    try:
        check_certificate(settings.tls_certificate, settings.tls_key)
    except OSError as error:
        files = f"tls_certificate {settings.tls_certificate} and tls_key {settings.tls_key}"
        raise SettingsError(f"{files} are not a certificate in PEM and its unencrypted private key: {error}") from error


def _make_tracer(settings: Settings) -> Tracer | None:
    """Imports OpenTelemetry only where it is used. Raises SettingsError where it is not installed."""
    if settings.otlp_endpoint is None:
        return None
    try:
        otel = importlib.import_module("service.otel")
    except ModuleNotFoundError as error:
        raise SettingsError(f"otlp_endpoint: {error.name} is missing: pip install 'slimpajama[otel]'") from error
    tracer: Tracer = otel.OtelTracer(
        otel.exporter_to(settings.otlp_endpoint), version=package_version(), sample_ratio=settings.trace_ratio
    )
    return tracer
