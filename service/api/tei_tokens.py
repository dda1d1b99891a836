"""`/tokenize`, `/decode` and `/info` of text-embeddings-inference: what is known of a checkpoint without its network.

HTTP only; API process. Long texts, and many ids, are looked at in a thread.
"""

import asyncio
import io
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from model.description import CheckpointDescription
from model.embedding_config import Pooling
from model.tokenizer import Encoding, TokenizerError
from service.api.classify import classify_engine
from service.api.native import MAX_ITEMS, PromptName, TokenIds, json_response, model_of_address
from service.api.schemas_openai import Strict
from service.api.state import request_state
from service.api.tei import Texts, one_or_several, texts_of
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, Unavailable
from service.tasks.embeddings import prompt_of
from service.tasks.encoding import max_input_tokens
from service.tasks.prompts import INLINE_CHARS

router = APIRouter(tags=["text-embeddings-inference"])


class TokenizeBody(Strict):
    inputs: Texts
    add_special_tokens: bool = True
    prompt_name: PromptName | None = None


async def tei_tokenize(request: Request, body: TokenizeBody) -> Response:
    """At `/tokenize`, where `roots` tells it from the bodies with `prompt` or `messages`."""
    model = first_encoder(request)
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=None) if body.prompt_name else ""
    texts = [prompt + text for text in texts_of(body.inputs)]
    work = (model, texts, body.add_special_tokens)
    is_long = sum(map(len, texts)) > INLINE_CHARS
    content = await asyncio.to_thread(_tokenized, *work) if is_long else _tokenized(*work)
    return Response(content, media_type="application/json")


def _tokenized(model: LoadedModel, texts: Sequence[str], add_special_tokens: bool) -> bytes:
    """The texts' tokens as JSON, written one by one: as Python's objects they would take several times the memory."""
    out, tokenizer = io.BytesIO(), model.tokenizer
    for nth, text in enumerate(texts):
        out.write(b"],[" if nth else b"[[")
        found = _encode(model, text, add_special_tokens)
        for place, id in enumerate(found.ids):
            start, stop = found.offsets[place]
            special = bool(found.special_tokens_mask[place])
            row = {"id": id, "text": tokenizer.token(id), "special": special, "start": start, "stop": stop}
            out.write(b"," if place else b"")
            out.write(msgspec.json.encode(row))
    out.write(b"]]")
    return out.getvalue()


def _encode(model: LoadedModel, text: str, add_special_tokens: bool) -> Encoding:
    try:
        return model.tokenizer.encode_with_offsets(text, add_special_tokens=add_special_tokens)
    except TokenizerError as error:
        raise InvalidRequest(f"inputs: {error}", param="inputs") from error


class DecodeBody(Strict):
    ids: Annotated[
        Annotated[TokenIds, Tag("one")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ITEMS), Tag("several")],
        Discriminator(one_or_several),
    ]
    skip_special_tokens: bool = True


@router.post("/decode", summary="Texts of token ids, in the shape of text-embeddings-inference")
async def tei_decode(request: Request, body: DecodeBody) -> Response:
    model = first_encoder(request)
    rows = [row for row in body.ids if isinstance(row, list)] or [[id for id in body.ids if isinstance(id, int)]]
    is_long = sum(map(len, rows)) > INLINE_CHARS
    work = (model, rows, body.skip_special_tokens)
    return json_response(await asyncio.to_thread(_decoded, *work) if is_long else _decoded(*work))


def _decoded(model: LoadedModel, rows: Sequence[list[int]], skip_special_tokens: bool) -> list[str]:
    vocab_size = max(model.description.vocab_size, model.tokenizer.vocab_size)
    try:
        for row in rows:
            model.tokenizer.check_ids(row, vocab_size=vocab_size)
    except TokenizerError as error:
        raise InvalidRequest(str(error), param="ids") from error
    return [model.tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


@router.get("/info", summary="What is served, in the shape of text-embeddings-inference")
async def tei_info(request: Request) -> Response:
    state, model = request_state(request), first_encoder(request)
    description, settings = model.description, state.settings
    kinds: dict[str, Any] = {
        "embedding": {"pooling": _pooling(description)},
        "sparse_embedding": {"pooling": "splade"},
        "cross_encoder": {},
    }
    names = {"embedding": "embedding", "sparse_embedding": "embedding", "cross_encoder": "reranker"}
    kind = names.get(description.head, "classifier")
    details = kinds.get(description.head, {"id2label": dict(enumerate(description.labels))})
    return json_response(
        {
            "model_id": model.name,
            "model_sha": model.version,
            "served_model_name": model.name,
            "model_dtype": model.loaded.dtype if model.loaded is not None else None,
            "model_type": {kind: details},
            "max_concurrent_requests": settings.max_queue_requests,
            "max_input_length": max_input_tokens(model),
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": MAX_ITEMS,
            "auto_truncate": False,
            "version": state.version,
            "sha": None,
            "docker_label": None,
        }
    )


def _pooling(description: CheckpointDescription) -> str:
    """That server's names of the ways of pooling; several are joined."""
    embedding = description.embedding
    steps = embedding.steps if embedding is not None else ()
    modes = [mode for step in steps if isinstance(step, Pooling) for mode in step.modes]
    return "+".join("last_token" if mode == "lasttoken" else mode for mode in modes)


def first_encoder(request: Request) -> LoadedModel:
    """The checkpoint of routes that name no task: the address's, or the first that is not a language model."""
    directory, name = classify_engine(request).models, model_of_address(request)
    if name is not None:
        return directory.named(name)
    models = list(directory.values())
    if not models:
        raise Unavailable("no checkpoint is loaded yet")
    return next((model for model in models if model.description.head != "language_model"), models[0])
