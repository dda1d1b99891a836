"""`POST /v1/tokenize` and `/v1/detokenize`: a checkpoint's own view of a text, with where each token lies in it.

The answers have vLLM's fields beside our own, so that its clients read them, too. HTTP only. Runs in the API process;
long texts are tokenized in a thread.
"""

import asyncio

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from model.tokenizer import TokenizerError
from service.api.generating import note_task
from service.api.schemas_chat import DetokenizeBody, TokenizeBody
from service.api.state import request_state
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ModelNotFound
from service.tasks.chat import Conversation, chat_prompt
from service.tasks.prompts import INLINE_CHARS
from service.tasks.sampling import context_limit

router = APIRouter(prefix="/v1", tags=["tokens"])


class TokenizeAnswer(BaseModel):
    model: str
    model_version: str
    count: int
    context_length: int
    max_model_len: int
    """Tokens that a prompt and its completion may have together here, by vLLM's name."""
    tokens: list[int]
    pieces: list[str | None] | None
    """The vocabulary's own spelling of each token; null unless asked for."""
    token_strs: list[str | None] | None
    """The same by vLLM's name; null unless asked for by that."""
    offsets: list[tuple[int, int]] | None
    """Where each token's text begins and ends, in characters; null for messages."""


class DetokenizeAnswer(BaseModel):
    model: str
    model_version: str
    text: str
    prompt: str
    """The same by vLLM's name."""


@router.post("/tokenize", summary="The tokens of a text or a conversation", response_model=TokenizeAnswer)
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    model = _resolve(request, body.model)
    note_task(request, "tokenize", model, body.text)
    if (body.text is None) == (body.messages is None):
        raise InvalidRequest("give either text or messages", param="text" if body.text is None else "messages")
    offsets: list[tuple[int, int]] | None = None
    if body.messages is not None:
        ids = await chat_prompt(model, _conversation(body))
    else:
        ids, offsets = await _encode(model, body.text or "", add_special_tokens=body.add_special_tokens is not False)
    work = (model, body, ids, offsets)
    content = await asyncio.to_thread(_written, *work) if len(ids) > INLINE_CHARS else _written(*work)
    return Response(content, media_type="application/json")


def _written(model: LoadedModel, body: TokenizeBody, ids: list[int], offsets: list[tuple[int, int]] | None) -> bytes:
    pieces = [model.tokenizer.token(id) for id in ids] if body.return_tokens or body.return_token_strs else None
    answer = TokenizeAnswer.model_construct(
        model=model.name,
        model_version=model.version,
        count=len(ids),
        context_length=model.description.context_length,
        max_model_len=context_limit(model),
        tokens=ids,
        pieces=pieces if body.return_tokens else None,
        token_strs=pieces if body.return_token_strs else None,
        offsets=offsets if body.return_offsets else None,
    )
    return msgspec.json.encode(dict(answer))


@router.post("/detokenize", summary="The text of token ids")
async def detokenize(request: Request, body: DetokenizeBody) -> DetokenizeAnswer:
    model = _resolve(request, body.model)
    note_task(request, "detokenize", model, None)
    is_long = len(body.tokens) > INLINE_CHARS
    text = await asyncio.to_thread(_decode, model, body) if is_long else _decode(model, body)
    return DetokenizeAnswer(model=model.name, model_version=model.version, text=text, prompt=text)


def _decode(model: LoadedModel, body: DetokenizeBody) -> str:
    try:
        model.tokenizer.check_ids(body.tokens, vocab_size=max(model.description.vocab_size, model.tokenizer.vocab_size))
        return model.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    except TokenizerError as error:
        raise InvalidRequest(f"tokens: {error}", param="tokens") from error


async def _encode(
    model: LoadedModel, text: str, *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    encode = model.tokenizer.encode_with_offsets
    try:
        if len(text) > INLINE_CHARS:
            found = await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)
        else:
            found = encode(text, add_special_tokens=add_special_tokens)
    except TokenizerError as error:
        raise InvalidRequest(f"text: {error}", param="text") from error
    return found.ids, found.offsets


def _conversation(body: TokenizeBody) -> Conversation:
    return Conversation(
        messages=[message.model_dump(exclude_none=True) for message in body.messages or []],
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_variables=body.chat_template_kwargs,
    )


def _resolve(request: Request, name: str | None) -> LoadedModel:
    """Any checkpoint has a tokenizer, whatever its tasks; without a name it is the first loaded."""
    models = request_state(request).engine.models
    if name is not None:
        return models.named(name)
    if not models:
        raise ModelNotFound("no checkpoint is loaded", param="model")
    return models.offered()[0]
