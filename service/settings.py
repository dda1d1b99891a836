"""Every setting of the service: its unit, range, default and one line of explanation.

The one place that reads environment, YAML and flags together (`load_settings`). `Settings` is frozen; whoever needs a
value is passed that value. `serve --help` and the README's table are made from the fields below. API process only.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from service.auth import read_key
from service.model_source import ModelSource, parse_alias
from service.settings_sources import ENV_PREFIX, SettingsError, from_environment, from_yaml


def _split(value: object) -> object:
    """The environment has no lists: there, entries are separated by commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _parse_models(value: object) -> object:
    entries = _split(value)
    if not isinstance(entries, list | tuple):
        return entries
    return tuple(ModelSource.parse(entry) if isinstance(entry, str) else entry for entry in entries)


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _setting(group: str, default: object, text: str, **bounds: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"group": group}, **bounds)


def _check_address(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", value):
        raise ValueError('must be like "http://host:4318"')
    return value


def _check_key(value: SecretStr) -> SecretStr:
    read_key(value.get_secret_value())
    return value


def _check_aliases(entries: tuple[str, ...]) -> tuple[str, ...]:
    aliases = [parse_alias(entry)[0] for entry in entries]
    for alias in aliases:
        if aliases.count(alias) > 1:
            raise ValueError(f"the alias '{alias}' is given twice")
    return entries


Models = Annotated[tuple[ModelSource, ...], BeforeValidator(_parse_models)]
TextList = Annotated[tuple[str, ...], BeforeValidator(_split)]
Aliases = Annotated[TextList, AfterValidator(_check_aliases)]
Device = Annotated[str, AfterValidator(_check_device)]
HttpAddress = Annotated[str, AfterValidator(_check_address)]
ApiKey = Annotated[SecretStr, AfterValidator(_check_key)]
CacheMemory = Annotated[ByteSize, Field(gt=0, le=1 << 50)]
ContextLength = Annotated[int, Field(ge=1, le=1 << 31)]

SECRETS = frozenset({"api_key"})
"""Settings whose values no message shows."""


class Settings(BaseSettings):
    """Flags beat environment, environment beats YAML, YAML beats these defaults."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    config: Path | None = _setting("Server", None, "YAML file with settings, named as here but with underscores")
    host: str = _setting("Server", "127.0.0.1", "address to listen on", min_length=1)
    port: int = _setting("Server", 8000, "TCP port; 0 takes a free one", ge=0, le=65535)
    tls_certificate: FilePath | None = _setting(
        "Server", None, "PEM file with the certificate chain: serve HTTPS; read again on change"
    )
    tls_key: FilePath | None = _setting("Server", None, "PEM file with the certificate's private key")
    cors_origins: TextList = _setting("Server", (), "origins that browsers may call from; none: CORS is off")
    drain_timeout: float = _setting("Server", 30.0, "seconds that accepted requests get after SIGTERM", ge=0, le=86400)

    model: Models = _setting("Models", (), "FOLDER_OR_GGUF_OR_HUB_NAME[=SERVED_NAME][@VERSION]; may be repeated")
    adapter: Models = _setting(
        "Models",
        (),
        "FOLDER_OR_HUB_NAME[=SERVED_NAME][@VERSION]: a LoRA adapter over the weights of a --model; may be repeated",
    )
    draft: Models = _setting(
        "Models",
        (),
        "FOLDER_OR_GGUF_OR_HUB_NAME=SERVED_NAME: a smaller checkpoint that guesses a --model's next tokens, for it to "
        "check in one step; on CPUs; may be repeated",
    )
    alias: Aliases = _setting("Models", (), "ALIAS=SERVED_NAME: another name for a checkpoint; may be repeated")
    revision: str | None = _setting("Models", None, "hub revision (branch, tag or commit) of every hub model")
    offline: bool = _setting("Models", False, "take hub models from the cache alone")
    cache_dir: Path | None = _setting("Models", None, "where hub models are kept; unset: where huggingface_hub does")
    device: Device = _setting("Models", "auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "Models",
        "auto",
        "type of the weights; float32 by name is multiplied in all its bits, auto in 16 of them on AMX",
    )
    quantization: Literal["none", "int8", "int4", "fp8"] = _setting(
        "Models",
        "none",
        "quantize the weights while loading; int8 on CPUs, int4 too (generating checkpoints; the others get int8), fp8 "
        "on GPUs from Hopper on",
    )
    max_model_len: ContextLength | None = _setting(
        "Models", None, "tokens of context; unset: what each checkpoint says"
    )

    worker_threads: int | None = _setting("Worker", None, "CPU threads of the worker; unset: one per core", ge=1)
    block_size: int = _setting("Worker", 16, "tokens per KV block; on CPUs multiples of 16 are fast", ge=1, le=1024)
    kv_cache_memory: CacheMemory | None = _setting(
        "Worker",
        None,
        'KV cache of each model, like "2GiB"; unset: 1GiB on a CPU, kv_cache_fraction on a GPU, shared by all',
    )
    kv_cache_dtype: Literal["auto", "int8"] = _setting(
        "Worker", "auto", "keys and values; auto: as activations; int8: half the memory (CPUs, with bfloat16)"
    )
    kv_cache_fraction: float = _setting("Worker", 0.9, "share of the GPU's memory that may be used", gt=0, lt=1)
    max_batch_tokens: int = _setting(
        "Worker",
        512,
        "tokens computed in one step; 512 suits CPUs, 8192 GPUs; on CPUs small encoders alone take up to 4096",
        ge=1,
    )
    max_sequences: int = _setting("Worker", 128, "sequences in one step", ge=1)
    max_step_stretch: float = _setting(
        "Worker", 2.2, "on CPUs, how many times as long a decoding step may take for the prompts in it", ge=1
    )
    speculative_tokens: Annotated[int, Field(ge=0, le=32)] | None = _setting(
        "Worker",
        None,
        "on CPUs, how many next tokens to guess (by a --draft, else from a request's own text) and check in one step; "
        "unset: 5 with a draft, else 0",
    )
    prefix_caching: bool = _setting("Worker", True, "share the KV blocks of equal beginnings")
    deterministic: bool = _setting("Worker", False, "bitwise the same answer alone and in a crowd (slower; on CPUs)")
    overlap: Literal["auto", "on", "off"] = _setting(
        "Worker", "auto", "make the next step while the device runs this one; auto: on a GPU"
    )
    tensor_parallel_size: int = _setting(
        "Worker", 1, "devices (or, on CPUs, processes) that decoders are divided over", ge=1, le=64
    )
    step_timeout: float = _setting("Worker", 60.0, "seconds a step may take before the worker counts as stuck", gt=0)
    restart_budget: int = _setting("Worker", 5, "worker restarts within restart_window before giving up", ge=0)
    restart_window: float = _setting("Worker", 600.0, "seconds over which restarts are counted", gt=0)

    max_queue_requests: int = _setting(
        "Limits", 1024, "requests that may wait beyond those being computed; more get 429", ge=0
    )
    max_queue_tokens: int = _setting("Limits", 1_000_000, "tokens that may wait; more get 429", ge=1)
    max_request_timeout: float = _setting("Limits", 600.0, "seconds after which any request ends with 504", gt=0)
    max_priority: int | None = _setting(
        "Limits", None, "highest priority that a request may ask for; unset: 0 where there are API keys", ge=-1000
    )
    grammar_timeout: float = _setting("Limits", 10.0, "seconds that compiling a grammar may take", gt=0)
    max_body_bytes: Annotated[ByteSize, Field(gt=0)] = _setting("Limits", "8MiB", "largest request body")
    max_header_bytes: Annotated[ByteSize, Field(ge=1024)] = _setting(
        "Limits", "32KiB", "largest request line and headers together"
    )
    max_json_depth: int = _setting("Limits", 64, "deepest nesting of a JSON body", ge=1, le=500)
    max_connections: int = _setting("Limits", 4096, "open connections; further ones get 503", ge=1)
    header_timeout: float = _setting("Limits", 10.0, "seconds a client has to send its request's headers", gt=0)
    body_timeout: float = _setting("Limits", 30.0, "seconds a client has to send its request's body", gt=0)
    write_timeout: float = _setting("Limits", 60.0, "seconds a client may stop reading before it is dropped", gt=0)
    keep_alive_timeout: float = _setting("Limits", 75.0, "seconds an idle connection is kept", gt=0)
    stream_keep_alive: float = _setting(
        "Limits", 15.0, "seconds after which a stream that has nothing to say sends a comment; 0: never", ge=0
    )
    rate_limit_requests: int | None = _setting("Limits", None, "requests per minute for each API key", ge=1)
    rate_limit_tokens: int | None = _setting("Limits", None, "tokens (in and out) per minute for each API key", ge=1)

    api_keys_file: FilePath | None = _setting("Access", None, "file with a key a line: name:key or name:sha256:hex")
    api_key: ApiKey | None = _setting(
        "Access", None, "one key more, or sha256:hex; others see a flag in the list of processes: use the variable"
    )
    admin_keys_file: FilePath | None = _setting("Access", None, "the same for /admin; unset: no management by HTTP")
    no_auth: bool = _setting("Access", False, "listen beyond this machine without any API key")
    metrics_public: bool = _setting("Access", False, "/metrics needs no key, even where there are API keys")

    log_format: Literal["text", "json"] = _setting("Logging", "text", "text or json")
    log_level: Literal["debug", "info", "warning", "error"] = _setting("Logging", "info", "least severe level logged")
    log_prompts: bool = _setting("Logging", False, "write prompts into the access line")
    otlp_endpoint: HttpAddress | None = _setting(
        "Logging", None, 'trace to this OpenTelemetry collector, like "http://collector:4318"; needs slimpajama[otel]'
    )
    trace_ratio: float = _setting(
        "Logging", 1.0, "share traced of the requests that bring no traceparent with a decision", ge=0, le=1
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        fields = settings_cls.model_fields
        environment = from_environment(os.environ, fields)
        config = init_settings().get("config", environment.get("config"))
        yaml_values = from_yaml(Path(config), fields) if config is not None else {}
        sources = (InitSettingsSource(settings_cls, values) for values in (environment, yaml_values))
        return init_settings, *sources

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: one of them is missing")
        if self.no_auth and self.has_keys:
            given = "api_key" if self.api_keys_file is None else "api_keys_file"
            raise ValueError(f"no_auth and {given} contradict each other: drop one")
        if self.overlap == "on" and self.tensor_parallel_size > 1:
            raise ValueError("overlap is not to be had with tensor_parallel_size above 1: leave it at auto")
        if self.overlap == "on" and self.speculative_tokens:
            raise ValueError("overlap is not to be had with speculative_tokens: leave it at auto")
        if self.adapter and self.tensor_parallel_size > 1:
            raise ValueError("adapter is not to be had with tensor_parallel_size above 1: give it as a model, merged")
        self._check_drafts()
        seen: set[tuple[str, str | None]] = set()
        for source in (*self.model, *self.adapter):
            if (source.name, source.version) in seen:
                raise ValueError(f"model name '{source.name}' is given twice; tell them apart with =NAME or @VERSION")
            seen.add((source.name, source.version))
        for name in {source.name for source in self.model} & {source.name for source in self.adapter}:
            raise ValueError(f"'{name}' is the name of a checkpoint and of an adapter; tell them apart with =NAME")
        self._check_targets()
        return self

    def _check_drafts(self) -> None:
        if self.draft and self.tensor_parallel_size > 1:
            raise ValueError("draft is not to be had with tensor_parallel_size above 1: drop one")
        if self.draft and self.overlap == "on":
            raise ValueError("overlap is not to be had with draft: leave it at auto")
        if self.draft and self.speculative_tokens == 0:
            raise ValueError("draft and speculative_tokens 0 contradict each other: drop one")
        names = [source.name for source in self.model]
        for source in self.draft:
            if source.version is not None:
                raise ValueError(f"draft '{source}': it goes with all versions of a name; leave out @{source.version}")
            if source.name not in names:
                raise ValueError(
                    f"draft '{source.location}': there is no checkpoint '{source.name}' that it could guess for; write "
                    f"{source.location}=SERVED_NAME; served: {', '.join(names) or 'none'}"
                )
        if len(self.drafts) < len(self.draft):
            raise ValueError("a name has two drafts: one is all that it can have")

    def _check_targets(self) -> None:
        sources = (*self.model, *self.adapter)
        names = {source.name for source in sources}
        versions = {f"{source.name}@{source.version}" for source in sources if source.version is not None}
        for alias, name in self.aliases.items():
            if alias in names:
                raise ValueError(f"alias '{alias}' is the name of a checkpoint")
            if name not in names | versions:
                served = ", ".join(sorted(names | versions)) or "none"
                raise ValueError(f"alias '{alias}': there is no checkpoint '{name}'; served: {served}")

    @property
    def aliases(self) -> dict[str, str]:
        """Which served name each other name stands for."""
        return dict(parse_alias(entry) for entry in self.alias)

    @property
    def drafts(self) -> dict[str, str]:
        """Where the draft of each served name is that has one."""
        return {source.name: source.location for source in self.draft}

    @property
    def has_keys(self) -> bool:
        return self.api_keys_file is not None or self.api_key is not None

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach us."""
        if self.host == "localhost":
            return False
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:
            return True


@dataclass(frozen=True, slots=True)
class SettingLine:
    """One setting as help texts and tables show it."""

    field: str
    group: str
    description: str
    default: str
    choices: tuple[str, ...]
    is_switch: bool
    is_list: bool

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.field.upper()


def setting_lines() -> list[SettingLine]:
    """All settings in the order of the fields above."""
    lines = []
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), name
        choices = get_args(field.annotation) if isinstance(field.default, str) else ()
        lines.append(
            SettingLine(
                field=name,
                group=str(extra["group"]),
                description=field.description or "",
                default=_shown(field.default),
                choices=tuple(choice for choice in choices if isinstance(choice, str)),
                is_switch=isinstance(field.default, bool),
                is_list=isinstance(field.default, tuple),
            )
        )
    return lines


def _shown(default: object) -> str:
    if default is None or default == ():
        return "unset"
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def load_settings(flags: Mapping[str, object]) -> Settings:
    """The settings from all sources; `flags` is what the command line gave, by field name.

    Raises SettingsError, whose message names the setting, the value and the limit.
    """
    try:
        values: dict[str, Any] = dict(flags)
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_advice(fault) for fault in error.errors())) from error


def _advice(fault: Mapping[str, Any]) -> str:
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    name = str(fault["loc"][0])
    flag, variable = "--" + name.replace("_", "-"), ENV_PREFIX + name.upper()
    value = "..." if name in SECRETS else repr(fault["input"])
    return f"{name} = {value}: {message} (set by {flag}, {variable} or `{name}:` in the YAML file)"
