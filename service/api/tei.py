"""The routes and shapes of text-embeddings-inference, so that its clients need no change but the address.

Thin: the same tasks answer as under /v1. Where that server guesses, this one does not: token ids of an unknown
tokenizer are refused, multi-label checkpoints get sigmoids, truncation is an error unless asked for, and then told in
a header. Bodies name no checkpoint: the first that can do it answers, or the address says which
(`/embed?model=minilm`). Clients that send no `truncate` may ask for it there, too (`/embed?truncate=true`). HTTP only;
API process.
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from service.api.classify import classify_engine, way_of_address
from service.api.event_stream import until_gone
from service.api.generating import deadline_of
from service.api.native import (
    MAX_ITEMS,
    InputText,
    PromptName,
    TextsOrIds,
    check_numbers,
    encode_engine,
    json_response,
    model_of_address,
    note,
    sparse_vectors,
    tell_truncation,
    truncates_by_address,
    usage_of,
    vectors_response,
    written_one_by_one,
    written_sparse,
)
from service.api.schemas_openai import Strict
from service.api.state import request_record
from service.engine.models import LoadedModel
from service.errors import InvalidRequest
from service.tasks.classification import classify_own
from service.tasks.confidence import Scored, best_first
from service.tasks.embeddings import VectorForm, embed, prompt_of, rerank, similarities
from service.tasks.encoding import EncodedText, EncodeOptions, Text, run_texts, tokenize
from service.tasks.sparse_embeddings import SPARSE_TASK, entries_of

router = APIRouter(tags=["text-embeddings-inference"])

Texts = Annotated[
    Annotated[InputText, Tag("text")]
    | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]


class TeiBody(Strict):
    truncate: bool = False
    truncation_direction: Literal["Right", "Left", "right", "left"] = "Right"
    """At which end texts are cut."""


class EmbedSparseBody(TeiBody):
    inputs: TextsOrIds
    prompt_name: PromptName | None = None


class EmbedBody(EmbedSparseBody):
    normalize: bool = True
    """False: as the checkpoint's modules say."""
    dimensions: int | None = Field(None, ge=1, le=65536)


@router.post("/embed", summary="Vectors, in the shape of text-embeddings-inference")
async def tei_embed(request: Request, body: EmbedBody) -> Response:
    texts = texts_of(body.inputs)
    engine, began = encode_engine(request), time.monotonic()
    model = engine.resolve(model_of_address(request), "embed")
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=None)
    form = VectorForm(dimensions=body.dimensions, normalize=body.normalize or None)
    check_numbers(len(texts), form.final_size(model), param="inputs")
    work = embed(engine, model, texts, _options(request, body, "embed"), prompt=prompt, form=form)
    encoded = await until_gone(request, work)
    _raise_first(encoded, "inputs" if isinstance(body.inputs, str) else "inputs.{}")
    response = await vectors_response([_values(text) for text in encoded])
    return _finished(request, model, response, encoded, texts, began)


class EmbedAllBody(TeiBody):
    inputs: Texts
    prompt_name: PromptName | None = None


@router.post("/embed_all", summary="A vector per token")
async def tei_embed_all(request: Request, body: EmbedAllBody) -> Response:
    texts = texts_of(body.inputs)
    engine, began = encode_engine(request), time.monotonic()
    model = engine.resolve(model_of_address(request), "embed")
    options = _options(request, body, "embed")
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=None)
    encoded = await tokenize(model, texts, room=options.room(), prompt=prompt)
    check_numbers(sum(text.num_tokens for text in encoded), model.description.hidden_size, param="inputs")
    await until_gone(request, run_texts(engine, model, encoded, "token_embeddings", options))
    _raise_first(encoded, "inputs" if isinstance(body.inputs, str) else "inputs.{}")
    response = await vectors_response([_values(text) for text in encoded])
    return _finished(request, model, response, encoded, texts, began)


@router.post("/embed_sparse", summary="Sparse vectors, in the shape of text-embeddings-inference")
async def tei_embed_sparse(request: Request, body: EmbedSparseBody) -> Response:
    texts = texts_of(body.inputs)
    began = time.monotonic()
    model = encode_engine(request).resolve(model_of_address(request), SPARSE_TASK)
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=None)
    options = _options(request, body, SPARSE_TASK)
    encoded = await sparse_vectors(request, model, texts, options, prompt=prompt, param="inputs")
    _raise_first(encoded, "inputs" if isinstance(body.inputs, str) else "inputs.{}")
    rows = await written_sparse(encoded, _sparse_rows)
    return _finished(request, model, json_response(rows), encoded, texts, began)


def _sparse_rows(texts: Sequence[EncodedText]) -> list[msgspec.Raw]:
    vectors = (zip(*entries_of(_values(text)), strict=True) for text in texts)
    return written_one_by_one([{"index": id, "value": weight} for id, weight in vector] for vector in vectors)


TextOrPair = Annotated[list[InputText], Field(min_length=1, max_length=2)]


def one_or_several(value: object) -> str:
    return "several" if isinstance(value, list) and value and isinstance(value[0], list) else "one"


def _kind_of_predict(value: object) -> str:
    return one_or_several(value) if isinstance(value, list) else "text"


class PredictBody(TeiBody):
    inputs: Annotated[
        Annotated[InputText, Tag("text")]
        | Annotated[TextOrPair, Tag("one")]
        | Annotated[list[TextOrPair], Field(min_length=1, max_length=MAX_ITEMS), Tag("several")],
        Discriminator(_kind_of_predict),
    ]
    """A text, a pair (a list of two texts, not two texts), or a list of lists of one or two."""
    raw_scores: bool = False


@router.post("/predict", summary="Labels and scores, in the shape of text-embeddings-inference")
async def tei_predict(request: Request, body: PredictBody) -> Response:
    given = body.inputs
    single = isinstance(given, str) or isinstance(given[0], str)
    rows = [[given] if isinstance(given, str) else given] if single else given
    texts: list[Text] = [_text_or_pair([part for part in row if isinstance(part, str)]) for row in rows]
    engine, began = classify_engine(request), time.monotonic()
    way = way_of_address(request, engine, model_of_address(request))
    work = classify_own(engine, way, texts, _options(request, body, "classify"))
    found = await until_gone(request, work)
    answers: list[msgspec.Raw] = []
    _raise_first(found.scored, "inputs" if single else "inputs.{}")
    for entry in found.scored:
        assert entry.logits is not None
        scores = entry.logits if body.raw_scores else found.judge(entry).scores
        answer = [{"score": float(scores[i]), "label": found.labels[i]} for i in best_first(scores)]
        answers += written_one_by_one([answer])
    num_tokens = sum(entry.num_tokens for entry in found.scored)
    note(request, way.model, {"prompt_tokens": num_tokens})
    num_truncated = sum(entry.num_truncated for entry in found.scored)
    response = tell_truncation(json_response(answers[0] if single else answers), {"truncated_tokens": num_truncated})
    num_characters = sum(len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts)
    times = (began, found.scored[0].tokenized, found.scored[0].started)
    _add_timings(response, way.model, times, num_tokens=num_tokens, num_characters=num_characters)
    return response


class RerankBody(TeiBody):
    query: InputText
    texts: Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS)]
    raw_scores: bool = False
    return_text: bool = False


async def tei_rerank(request: Request, body: RerankBody) -> Response:
    """At `/rerank`, where `roots` tells it from the body with `documents`."""
    engine, began = encode_engine(request), time.monotonic()
    model = engine.resolve(model_of_address(request), "rerank")
    options = _options(request, body, "rerank")
    work = rerank(engine, model, body.query, body.texts, options, scale="logit" if body.raw_scores else "own")
    ranked, read = await until_gone(request, work)
    _raise_first([entry.encoded for entry in ranked], "texts.{}")
    rows = sorted(ranked, key=lambda entry: (-(entry.score or 0.0), entry.index))
    answer = [
        {"index": entry.index, **({"text": body.texts[entry.index]} if body.return_text else {}), "score": entry.score}
        for entry in rows
    ]
    return _finished(request, model, json_response(answer), read, body.texts, began)


class SimilarityInputs(Strict):
    source_sentence: InputText
    sentences: Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS)]


class SimilarityParameters(TeiBody):
    prompt_name: PromptName | None = None


class SimilarityBody(Strict):
    inputs: SimilarityInputs
    parameters: SimilarityParameters = SimilarityParameters()


@router.post("/similarity", summary="Similarities, in the shape of text-embeddings-inference")
async def tei_similarity(request: Request, body: SimilarityBody) -> Response:
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    engine, began = encode_engine(request), time.monotonic()
    model = engine.resolve(model_of_address(request), "embed")
    prompt = prompt_of(model, prompt_name=body.parameters.prompt_name, input_type=None)
    work = embed(engine, model, texts, _options(request, body.parameters, "similarity"), prompt=prompt)
    encoded = await until_gone(request, work)
    _raise_first(encoded[:1], "inputs.source_sentence")
    _raise_first(encoded[1:], "inputs.sentences.{}")
    source = _values(encoded[0])
    scores = [float(similarities(model, source[None], _values(text)[None])[0, 0]) for text in encoded[1:]]
    return _finished(request, model, json_response(scores), encoded, texts, began)


def texts_of(inputs: Any) -> list[str]:
    rows = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(rows[0], str):
        message = "token ids are refused: they may come from another tokenizer. Send text"
        raise InvalidRequest(message, param="inputs")
    return list(rows)


def _text_or_pair(parts: list[str]) -> Text:
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _options(request: Request, body: TeiBody, task: str) -> EncodeOptions:
    truncates = truncates_by_address(request) or body.truncate
    return EncodeOptions(
        task=task,
        truncate=truncates and ("start" if body.truncation_direction in ("Left", "left") else True),
        client=request_record(request).client,
        deadline=deadline_of(request, None),
    )


def _raise_first(entries: Sequence[EncodedText | Scored], param: str) -> None:
    """These shapes have no place for one text's error: the first is the request's, under its place in `param`."""
    for index, entry in enumerate(entries):
        if entry.error is not None:
            entry.error.param = param.format(index)
            raise entry.error


def _values(text: EncodedText) -> Any:
    assert text.values is not None
    return text.values


def _finished(
    request: Request, model: LoadedModel, response: Response, encoded: list[EncodedText], texts: list[str], began: float
) -> Response:
    """With what its headers tell."""
    usage = usage_of(encoded)
    note(request, model, usage)
    tell_truncation(response, usage)
    read = next((text for text in encoded if text.started is not None), encoded[0])
    num_characters = sum(len(text) for text in texts)
    times = (began, read.tokenized, read.started)
    _add_timings(response, model, times, num_tokens=usage["prompt_tokens"], num_characters=num_characters)
    return response


def _add_timings(
    response: Response,
    model: LoadedModel,
    times: tuple[float, float | None, float | None],
    *,
    num_tokens: int,
    num_characters: int,
) -> None:
    """That server's headers, in whole milliseconds. `times`: the request's begin, its ids, its first step."""
    now = time.monotonic()
    began, tokenized, started = times[0], times[1] or now, times[2] or now
    tokenization, total = round((tokenized - began) * 1000), round((now - began) * 1000)
    queue = round((started - began) * 1000) - tokenization
    device = model.loaded.device.partition(":")[0] if model.loaded is not None else "cpu"
    values = {
        "x-compute-type": device,
        "x-compute-time": total - queue,
        "x-compute-characters": num_characters,
        "x-compute-tokens": num_tokens,
        "x-total-time": total,
        "x-tokenization-time": tokenization,
        "x-queue-time": queue,
        "x-inference-time": total - queue - tokenization,
    }
    for name, value in values.items():
        response.headers[name] = str(value)
