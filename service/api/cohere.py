"""`/v1/embed` and `/v2/embed`: vectors in the shapes of Cohere's two versions; its rerank is in `service.api.rerank`.

Thin: the embeddings task answers. Texts are cut as that service cuts them, at their end unless told otherwise, and what
was cut is told in a header; one text's error is the request's, since the shapes have no place for it. HTTP only. Runs
in the API process, on the event loop.
"""

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import Field
from starlette.responses import Response

from service.api import native
from service.api.chat import named_as
from service.api.event_stream import until_gone
from service.api.generating import deadline_of, new_id, priority_of
from service.api.native import (
    MAX_ITEMS,
    FilledText,
    check_numbers,
    encode_engine,
    json_response,
    note,
    tell_truncation,
    usage_of,
    written_one_by_one,
)
from service.api.schemas_chat import TextPart
from service.api.schemas_openai import INT32, Name, Strict
from service.api.state import request_record
from service.engine.models import LoadedModel
from service.errors import InvalidRequest
from service.tasks.embeddings import InputType, VectorForm, embed, prompt_of
from service.tasks.encoding import EncodedText, EncodeOptions, Truncation

router = APIRouter(tags=["embeddings"])

Vector = NDArray[np.float32]
EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
TRUNCATIONS: dict[str, Truncation] = {"NONE": False, "START": "start", "END": True}
INPUT_TYPES: dict[str, InputType] = {"search_query": "query", "search_document": "document"}
"""The others are names of prompts, where a checkpoint has such."""


def signed_bytes(vector: Vector) -> NDArray[np.int8]:
    """Each number as a share of the vector's greatest, in 127ths: cosines stay (nearly) as they are, lengths do not.

    Worked example: [0.1, -0.4, 0.2] becomes [32, -127, 64].
    """
    greatest = float(np.abs(vector).max(initial=0.0)) or 1.0
    shares: NDArray[np.int8] = np.rint(vector * (127.0 / greatest)).astype(np.int8)
    return shares


def packed_bits(vector: Vector) -> NDArray[np.uint8]:
    """A bit for each number, 1 where it is above 0, eight to a byte, the first the highest; as sentence-transformers'
    `quantize_embeddings` does."""
    return np.packbits(vector > 0)


FORMS: dict[EmbeddingType, Callable[[Vector], Any]] = {
    "float": lambda vector: vector.tolist(),
    "int8": lambda vector: signed_bytes(vector).tolist(),
    "uint8": lambda vector: (signed_bytes(vector).astype(np.int16) + 128).tolist(),
    "binary": lambda vector: (packed_bits(vector).astype(np.int16) - 128).tolist(),
    "ubinary": lambda vector: packed_bits(vector).tolist(),
    "base64": lambda vector: base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode(),
}


class CohereBody(Strict):
    model: Name | None = None
    """None: the first loaded checkpoint that can do it."""
    input_type: Literal["search_document", "search_query", "classification", "clustering"] | None = None
    truncate: Literal["NONE", "START", "END"] = "END"
    priority: int = Field(0, ge=0, le=999, description="0 comes first: the other way round than elsewhere")


Texts = Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS)]
EmbeddingTypes = Annotated[list[EmbeddingType], Field(min_length=1, max_length=len(FORMS))]


class FirstEmbedBody(CohereBody):
    texts: Texts
    embedding_types: EmbeddingTypes | None = Field(None, description="absent: the floats alone, as a list")


@router.post("/v1/embed", summary="Vectors, in the shape of Cohere's first version")
async def create_first_embed(request: Request, body: FirstEmbedBody) -> Response:
    model, encoded = await _embedded(request, body, body.texts, "texts.{}", VectorForm())
    found = await _formed(encoded, body.embedding_types or ["float"])
    if body.embedding_types is None:
        return _answer(request, model, encoded, "1", "embeddings_floats", found["float"], body.texts)
    return _answer(request, model, encoded, "1", "embeddings_by_type", found, body.texts)


class EmbedInput(Strict):
    content: Annotated[list[TextPart], Field(min_length=1, max_length=MAX_ITEMS)]


class EmbedBody(CohereBody):
    texts: Texts | None = None
    inputs: Annotated[list[EmbedInput], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        None, description="in place of `texts`: parts that are read as one text, a line each"
    )
    embedding_types: EmbeddingTypes = Field(["float"])
    output_dimension: int | None = Field(None, ge=1, le=65536)
    max_tokens: int | None = Field(None, ge=1, le=INT32, description="cut texts to so many tokens")


@router.post("/v2/embed", summary="Vectors, in the shape of Cohere's second version")
async def create_embed(request: Request, body: EmbedBody) -> Response:
    if (body.texts is None) == (body.inputs is None):
        raise InvalidRequest("give either texts or inputs", param="texts" if body.texts is None else "inputs")
    texts = body.texts or [_joined(entry, index) for index, entry in enumerate(body.inputs or ())]
    place = "texts.{}" if body.texts else "inputs.{}"
    form = VectorForm(dimensions=body.output_dimension)
    with named_as({"^dimensions": "output_dimension"}):
        model, encoded = await _embedded(request, body, texts, place, form, max_tokens=body.max_tokens)
    found = await _formed(encoded, body.embedding_types)
    return _answer(request, model, encoded, "2", "embeddings_by_type", found, texts)


def _joined(entry: EmbedInput, index: int) -> str:
    """Raises: InvalidRequest for an input without a character, as a text without one is refused."""
    if not any(part.text for part in entry.content):
        raise InvalidRequest("the input has no text: give at least 1 character", param=f"inputs.{index}")
    return "\n".join(part.text for part in entry.content)


async def _embedded(
    request: Request,
    body: FirstEmbedBody | EmbedBody,
    texts: list[str],
    place: str,
    form: VectorForm,
    *,
    max_tokens: int | None = None,
) -> tuple[LoadedModel, list[EncodedText]]:
    """Raises: the first text's error, with its `place`."""
    engine = encode_engine(request)
    model = engine.resolve(body.model, "embed")
    size = form.final_size(model)
    check_numbers(len(texts) * len(body.embedding_types or "1"), size, param=place.partition(".")[0])
    options = EncodeOptions(
        task="embed",
        truncate=TRUNCATIONS[body.truncate],
        max_tokens=max_tokens,
        client=request_record(request).client,
        priority=priority_of(request, -body.priority),
        deadline=deadline_of(request, None),
    )
    work = embed(engine, model, texts, options, prompt=_prompt(model, body.input_type), form=form)
    encoded = await until_gone(request, work)
    for index, text in enumerate(encoded):
        if text.error is not None:
            text.error.param = place.format(index)
            raise text.error
    return model, encoded


def _prompt(model: LoadedModel, input_type: str | None) -> str:
    if input_type in INPUT_TYPES:
        return prompt_of(model, prompt_name=None, input_type=INPUT_TYPES[input_type])
    embedding = model.description.embedding
    has_prompt = embedding is not None and input_type in embedding.prompts
    return prompt_of(model, prompt_name=input_type if has_prompt else None, input_type=None)


async def _formed(encoded: Sequence[EncodedText], types: Sequence[EmbeddingType]) -> dict[str, list[msgspec.Raw]]:
    vectors = [text.values for text in encoded if text.values is not None]
    if sum(vector.size for vector in vectors) * len(types) > native.INLINE_NUMBERS:
        return await asyncio.to_thread(_written, vectors, types)
    return _written(vectors, types)


def _written(vectors: Sequence[Vector], types: Sequence[EmbeddingType]) -> dict[str, list[msgspec.Raw]]:
    return {name: written_one_by_one(map(FORMS[name], vectors)) for name in types}


def _answer(
    request: Request,
    model: LoadedModel,
    encoded: list[EncodedText],
    version: str,
    kind: str,
    embeddings: Any,
    texts: list[str],
) -> Response:
    usage = usage_of(encoded)
    note(request, model, usage)
    counted = {"input_tokens": usage["prompt_tokens"]}
    answer = {
        "id": new_id("embed"), "response_type": kind, "embeddings": embeddings, "texts": texts,
        "meta": {"api_version": {"version": version}, "billed_units": counted, "tokens": counted},
    }  # fmt: skip
    return tell_truncation(json_response(answer), usage)
