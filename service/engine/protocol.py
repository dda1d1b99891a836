"""The messages between the API process and the worker, and how they are framed.

Both sides import this file and nothing of each other. A frame is a 4-byte little-endian length and a msgpack body;
the transport is one Unix socket pair that the supervisor makes and the worker inherits.
Times are `time.monotonic()` seconds, which processes of one machine share.
"""

from typing import Literal

import msgspec

from model.batch import FinishReason, SamplingParams, TokenLogprobs

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 30
"""What a step's inputs are chosen for: a frame is held whole, on both sides."""
MAX_BATCH_ITEMS = 1024
"""Inputs of one step of single-pass work."""
ENTRY_BYTES = 8
"""Of a sparse vector: an id and a weight."""
Quantization = Literal["none", "int8", "int4", "fp8"]
CacheDtype = Literal["auto", "int8"]
"""Of keys and values; auto: as the activations."""
Blame = Literal["context", "request", "grammar"]
"""What of a request is at fault that cannot be run: its length, its grammar, or something else of it."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that the worker shall hold. `key` is `name@version`, unique in the worker."""

    key: str
    folder: str
    base: str | None = None
    """The folder of the checkpoint that an adapter in `folder` was trained on."""
    shares: str | None = None
    """An adapter that is computed beside its base: the key of that, whose weights, cache and queue it shares."""
    draft: str | None = None
    """The folder of a smaller checkpoint that guesses its next tokens, which it checks."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization = "none"
    kv_cache_bytes: int | None = None
    kv_cache_dtype: CacheDtype = "auto"
    max_model_len: int | None = None


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, tag="config"):
    """The first message to a new worker: what it shall be."""

    models: list[ModelSpec]
    device: str = "cpu"
    num_threads: int | None = None
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    max_step_stretch: float | None = None
    speculative_tokens: int | None = None
    """None: as many as are usual where a draft guesses them, else none."""
    kv_cache_fraction: float = 0.9
    grammar_timeout_seconds: float = 10.0
    prefix_caching: bool = True
    deterministic: bool = False
    overlap: Literal["auto", "on", "off"] = "auto"
    num_ranks: int = 1
    log_format: Literal["text", "json"] = "text"
    log_level: str = "info"


class Generate(msgspec.Struct, kw_only=True, tag="generate"):
    """Continue `prompt_ids + output_ids`. `output_ids` is what was delivered before a worker died (else empty)."""

    request_id: int
    model: str
    prompt_ids: list[int]
    sampling: SamplingParams
    output_ids: list[int] = []
    encoder_ids: list[int] = []
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    cache_salt: str = ""
    adapter: str = ""
    """The key of an adapter that shares `model`'s weights; empty: those alone."""


class EncodeInput(msgspec.Struct, kw_only=True):
    """One text (or pair) of a single-pass request, with its special tokens."""

    ids: list[int]
    type_ids: list[int] = []
    skip_pooling: int = 0
    """Leading prompt tokens that pooling leaves out (`include_prompt: false`)."""


EncodeOutput = Literal["embedding", "sparse_embedding", "token_embeddings", "logits", "token_logits", "span_logits"]


class Encode(msgspec.Struct, kw_only=True, tag="encode"):
    """One pass over each input; results come back input by input, in any order."""

    request_id: int
    model: str
    output: EncodeOutput
    inputs: list[EncodeInput]
    head: str = ""
    """Which of the checkpoint's task heads gives the logits; empty: its own."""
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None


class Cancel(msgspec.Struct, tag="cancel"):
    request_id: int


class Load(msgspec.Struct, tag="load"):
    """Load a further checkpoint beside those that run."""

    spec: ModelSpec


class Unload(msgspec.Struct, tag="unload"):
    """Free a checkpoint, or an adapter of one; its remaining requests fail."""

    model: str


class Shutdown(msgspec.Struct, tag="shutdown"):
    pass


ToWorker = WorkerConfig | Generate | Encode | Cancel | Load | Unload | Shutdown


class Loading(msgspec.Struct, tag="loading"):
    model: str
    done_bytes: int
    total_bytes: int


class Loaded(msgspec.Struct, kw_only=True, tag="loaded"):
    """A checkpoint is ready. The block numbers are zero where it has no KV cache, its base's where it shares that one's
    (`kv_cache_bytes`, which it adds, is zero then)."""

    model: str
    dtype: str
    device: str
    weight_bytes: int
    quantization: Quantization = "none"
    """Of the weights as they are kept, which may be less than was asked for."""
    num_blocks: int = 0
    block_size: int = 0
    kv_cache_bytes: int = 0
    kv_cache_dtype: str | None = None
    """What keys and values are kept in; None where there are none."""
    max_step_tokens: int = 0
    """Of single-pass work: a step's tokens when nothing else is to be done. Zero where it generates."""
    load_seconds: float = 0.0


class LoadFailed(msgspec.Struct, tag="load_failed"):
    model: str
    message: str


class Unloaded(msgspec.Struct, tag="unloaded"):
    model: str


class TokenOutput(msgspec.Struct, kw_only=True):
    """What a step gave one generating request."""

    request_id: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    blame: Blame | None = None
    """Of an error: None where it is not the request's fault."""


def max_batch_items(sparse_size: int | None) -> int:
    """The most inputs of a step: so many that its results fill half a frame at most, even where no entry of a sparse
    vector of `sparse_size` is zero. None: the checkpoint gives no such vectors.

    Worked example: of 120,000 entries, which take 960,000 bytes, 559.
    """
    if sparse_size is None:
        return MAX_BATCH_ITEMS
    return min(MAX_BATCH_ITEMS, MAX_FRAME_BYTES // (2 * ENTRY_BYTES * sparse_size))


class EncodeResult(msgspec.Struct, kw_only=True):
    """One input's result: float32 little-endian `data` of `shape`, or the input's own fault.

    A sparse embedding is [2, N]: the ids of the vocabulary's entries that are not zero, then their weights.
    """

    request_id: int
    index: int
    shape: list[int] = []
    data: bytes = b""
    started: float | None = None
    error: str | None = None
    reason: Literal["cancelled", "deadline", "error"] | None = None


class LaneStats(msgspec.Struct, kw_only=True):
    """One checkpoint's gauges and what its last step did."""

    num_waiting: int = 0
    num_running: int = 0
    kv_cache_usage: float = 0.0
    step_tokens: int = 0
    step_sequences: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    num_preempted: int = 0
    """Preemptions in this step."""
    num_drafted: int = 0
    """Tokens that were guessed, and how many of them were right."""
    num_confirmed: int = 0


class Step(msgspec.Struct, kw_only=True, tag="step"):
    """All that one step of one checkpoint's lane delivers, in one frame."""

    model: str
    started_ids: list[int] = []
    """Requests that this step touched for the first time."""
    tokens: list[TokenOutput] = []
    encoded: list[EncodeResult] = []
    stats: LaneStats = msgspec.field(default_factory=LaneStats)


FromWorker = Loading | Loaded | LoadFailed | Unloaded | Step

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def take_frames(buffer: bytearray) -> list[bytes]:
    """The bodies of the whole frames at the start of `buffer`, which loses them."""
    bodies: list[bytes] = []
    position = 0
    with memoryview(buffer) as view:
        while len(view) - position >= HEADER_BYTES:
            body = position + HEADER_BYTES
            end = body + int.from_bytes(view[position:body], "little")
            if len(view) < end:
                break
            bodies.append(bytes(view[body:end]))
            position = end
    if position:
        del buffer[:position]
    return bodies


def read_to_worker(body: bytes | bytearray | memoryview) -> ToWorker:
    return _to_worker.decode(body)


def read_from_worker(body: bytes | bytearray | memoryview) -> FromWorker:
    return _from_worker.decode(body)
