"""From settings to an engine: finds the checkpoints, describes them, and says what the worker shall be.

The one place where `Settings` are taken apart for the engine. Reads small files and may download large ones, so that
`load_directory` runs on a thread. API process only.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from model.adapters.folder import find_base, joined
from model.chat_template import ChatTemplate
from model.description import CheckpointDescription, describe
from model.gguf.folder import unpack
from model.hub import resolve
from model.languages import Languages, read_languages
from model.temporary_folder import remove_abandoned
from model.text_messages import check_template
from model.tokenizer import Tokenizer
from service.admission import QueueLimits
from service.engine.accounting import Accounting
from service.engine.adapters import load_adapter
from service.engine.client import EngineClient
from service.engine.deployment import Deployment
from service.engine.draft_models import with_draft
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import ModelSpec, WorkerConfig
from service.engine.supervisor import SupervisorLimits
from service.metrics import Metrics
from service.model_source import ModelSource
from service.settings import Settings


def make_engine(settings: Settings, metrics: Metrics) -> EngineClient:
    limits = QueueLimits(settings.max_queue_requests, settings.max_queue_tokens)
    return EngineClient(
        partial(load_directory, settings),
        _worker_config(settings),
        _supervisor_limits(settings),
        accounting=Accounting(metrics, limits, time.monotonic()),
        prepare=partial(prepare_model, settings),
    )


def load_directory(settings: Settings) -> ModelDirectory:
    """Every configured checkpoint, found (downloaded where need be), described and given its tokenizer.

    Raises:
        CheckpointError: one cannot be found or is not what it should be.
    """
    remove_abandoned()
    directory = ModelDirectory(other_names=settings.aliases)
    for source in settings.model:
        model = load_model(source, settings)
        directory[model.key if model.name in directory else model.name] = model
    for source in settings.adapter:
        model = load_adapter(source, settings, directory)
        directory[model.key if model.name in directory else model.name] = model
    return directory


def load_model(source: ModelSource, settings: Settings) -> LoadedModel:
    """Raises: CheckpointError, if it cannot be found or is not what it should be."""
    found = resolve(source.location, revision=settings.revision, cache_dir=settings.cache_dir, offline=settings.offline)
    unpacked = unpack(found)
    try:
        model = _read_model(source, found if unpacked is None else unpacked.folder, settings)
        draft = settings.drafts.get(source.name)
        model = model if draft is None else with_draft(model, draft, settings)
    except BaseException:
        if unpacked is not None:
            unpacked.remove()
        raise
    return replace(model, unpacked=unpacked)


def _read_model(source: ModelSource, folder: Path, settings: Settings) -> LoadedModel:
    base = find_base(folder, cache_dir=settings.cache_dir, offline=settings.offline)
    with joined(folder, base) as whole:
        description = describe(whole, settings.max_model_len)
        tokenizer, chat_template = Tokenizer.load(whole), ChatTemplate.load(whole)
        languages = languages_of(description, tokenizer)
    description = replace(description, folder=folder)
    version = source.version or description.version
    if description.embedding is not None and description.embedding.messages is not None:
        pairs = description.head == "cross_encoder"
        check_template(description.embedding.messages, chat_template, pairs=pairs)
    return LoadedModel(
        name=source.name,
        version=version,
        spec=_spec(f"{source.name}@{version}", folder, base, settings),
        description=description,
        tokenizer=tokenizer,
        chat_template=chat_template,
        languages=languages,
        asked_for=source.location,
    )


def prepare_model(settings: Settings, name: str, deployment: Deployment, served: ModelDirectory) -> LoadedModel:
    """A checkpoint that is to be served later, beside those that are; what the deployment leaves open is as configured.

    Raises:
        CheckpointError, ValueError: it cannot be found, or is not what it should be.
    """
    source = ModelSource.parse(f"{deployment.source}={name}" + (f"@{deployment.version}" if deployment.version else ""))
    if source.name != name:
        raise ValueError(f"'{name}' is no name to serve under: letters, digits, '.', '_', '/' or '-'")
    draft = deployment.draft
    wanted = {
        "draft": (ModelSource(draft, name),) if draft else () if draft is not None else None,
        "dtype": deployment.dtype,
        "quantization": deployment.quantization,
        "kv_cache_memory": deployment.kv_cache_memory,
        "kv_cache_dtype": deployment.kv_cache_dtype,
        "max_model_len": deployment.max_model_len,
    }
    given = {field: value for field, value in wanted.items() if value is not None}
    if deployment.adapter:
        if given:
            raise ValueError(f"{', '.join(given)}: an adapter has its base's")
        return load_adapter(source, settings, served)
    return load_model(source, settings.model_copy(update=given))


def languages_of(description: CheckpointDescription, tokenizer: Tokenizer) -> Languages | None:
    """A translating checkpoint's languages; None for any other, and where its files name none."""
    if "translate" not in description.tasks or description.network != "encoder_decoder":
        return None
    eos_id = next(iter(description.eos_ids), tokenizer.eos_id)
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return read_languages(description.folder, description.raw, vocabulary, eos_id)


def _spec(key: str, folder: Path, base: Path | None, settings: Settings) -> ModelSpec:
    return ModelSpec(
        key=key,
        folder=str(folder),
        base=None if base is None else str(base),
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_bytes=None if settings.kv_cache_memory is None else int(settings.kv_cache_memory),
        kv_cache_dtype=settings.kv_cache_dtype,
        max_model_len=settings.max_model_len,
    )


def _worker_config(settings: Settings) -> WorkerConfig:
    return WorkerConfig(
        models=[],
        device=settings.device,
        num_threads=settings.worker_threads,
        block_size=settings.block_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        max_step_stretch=settings.max_step_stretch,
        speculative_tokens=settings.speculative_tokens,
        kv_cache_fraction=settings.kv_cache_fraction,
        grammar_timeout_seconds=settings.grammar_timeout,
        prefix_caching=settings.prefix_caching,
        deterministic=settings.deterministic,
        overlap=settings.overlap,
        num_ranks=settings.tensor_parallel_size,
        log_format=settings.log_format,
        log_level=settings.log_level,
    )


def _supervisor_limits(settings: Settings) -> SupervisorLimits:
    return SupervisorLimits(
        restart_budget=settings.restart_budget,
        restart_window_seconds=settings.restart_window,
        step_timeout_seconds=settings.step_timeout,
    )
