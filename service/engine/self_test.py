"""Whether a version that has just been loaded does what it should, before anybody is served by it.

A warm-up is one tiny request. A golden request is one whose answer is stored with the checkpoint, in `golden.json`: an
object or a list of them, `{"prompt_ids": [...] or "input": "text", "expected_ids": [...]}` for what generates
(greedily), `{"input": "text", "embedding" or "logits": [...], "tolerance": 0.01}` for what reads; a sparse encoder's
embedding is as long as its vocabulary. API process only.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from model.batch import SamplingParams
from service.engine.flight import EncodeRequest, GenerateRequest
from service.engine.models import LoadedModel
from service.engine.protocol import EncodeInput, EncodeOutput, EncodeResult, TokenOutput
from service.errors import ServiceError, SwapFailed

TASK = "self_test"
GOLDEN_FILE = "golden.json"
MAX_GOLDEN_BYTES = 1 << 24
WARM_UP_TEXT = "warm up"
WARM_UP_TOKENS = 2
OUTPUTS: dict[str, EncodeOutput] = {
    "embedding": "embedding",
    "sparse_embedding": "sparse_embedding",
    "token_classification": "token_logits",
    "question_answering": "span_logits",
}


class Golden(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One stored request and its answer."""

    input: str | None = None
    prompt_ids: list[int] | None = None
    expected_ids: list[int] | None = None
    embedding: list[float] | None = None
    logits: list[float] | None = None
    tolerance: float = 0.01


class SelfTestEngine(Protocol):
    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenOutput]: ...

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]: ...


def read_golden(folder: Path) -> list[Golden]:
    """The stored requests; none where the checkpoint has no such file. Raises SwapFailed if it cannot be read."""
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return []
    try:
        if path.stat().st_size > MAX_GOLDEN_BYTES:
            raise SwapFailed(f"{GOLDEN_FILE} has more than {MAX_GOLDEN_BYTES:,} bytes")
        found = msgspec.json.decode(path.read_bytes(), type=Golden | list[Golden])
    except (OSError, msgspec.DecodeError) as error:
        raise SwapFailed(f"{GOLDEN_FILE} cannot be read: {error}") from error
    return found if isinstance(found, list) else [found]


async def warm_up(engine: SelfTestEngine, model: LoadedModel) -> None:
    """Raises SwapFailed if a tiny request fails."""
    try:
        await _answer(engine, model, _ids(model, Golden(input=WARM_UP_TEXT)), WARM_UP_TOKENS)
    except ServiceError as error:
        raise SwapFailed(f"the warm-up failed: {error.message}") from error


async def check_golden(engine: SelfTestEngine, model: LoadedModel, golden: Golden) -> None:
    """Raises SwapFailed, with what differs, if the checkpoint does not give the stored answer."""
    expected = golden.expected_ids or golden.embedding or golden.logits
    if expected is None or (golden.expected_ids is None) == (model.description.head == "language_model"):
        wanted = "expected_ids" if model.description.head == "language_model" else "embedding or logits"
        raise SwapFailed(f"{GOLDEN_FILE}: a checkpoint of this kind needs {wanted}", param=GOLDEN_FILE)
    try:
        found = await _answer(engine, model, _ids(model, golden), len(expected))
    except ServiceError as error:
        raise SwapFailed(f"the golden request failed: {error.message}") from error
    if golden.expected_ids is not None:
        if found != golden.expected_ids:
            at = next(
                (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(found)
            )
            raise SwapFailed(f"the golden request's answer differs from token {at} on")
    elif len(found) != len(expected):
        raise SwapFailed(f"the golden request gave {len(found):,} numbers; {len(expected):,} are expected")
    else:
        worst = float(np.max(np.abs(np.asarray(found) - np.asarray(expected))))
        if not worst <= golden.tolerance:
            raise SwapFailed(f"the golden request's answer is off by {worst:.4g}; {golden.tolerance:g} is allowed")


def _ids(model: LoadedModel, golden: Golden) -> list[int]:
    if golden.prompt_ids is not None:
        return golden.prompt_ids
    return list(model.tokenizer.encode_batch([golden.input or ""])[0].ids)


async def _answer(
    engine: SelfTestEngine, model: LoadedModel, ids: list[int], num_tokens: int
) -> list[int] | list[float]:
    """New ids, greedily; or the one vector that comes of the input."""
    if model.description.head != "language_model":
        return await _encoded(engine, model, ids)
    encodes = model.description.network == "encoder_decoder"
    start_id = model.description.decoder_start_id
    request = GenerateRequest(
        model=model.key,
        prompt_ids=[start_id if start_id is not None else 0] if encodes else ids,
        encoder_ids=ids if encodes else [],
        sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
        task=TASK,
    )
    found: list[int] = []
    async for output in engine.generate(request):
        found += output.token_ids
    return found


async def _encoded(engine: SelfTestEngine, model: LoadedModel, ids: list[int]) -> list[float]:
    output = OUTPUTS.get(model.description.head, "logits")
    request = EncodeRequest(model=model.key, output=output, inputs=[EncodeInput(ids=ids)], task=TASK)
    (result,) = await engine.encode(request)
    if result.error is not None:
        raise SwapFailed(result.error)
    values = np.frombuffer(result.data, dtype="<f4")
    if output == "sparse_embedding":
        entries, values = values.reshape(result.shape), np.zeros(model.description.vocab_size, np.float32)
        values[entries[0].astype(np.int64)] = entries[1]
    return [float(value) for value in values]
