"""`/hf/{task}`: the shapes that `huggingface_hub.InferenceClient` sends and reads, with a route's address as its model.

Thin: each request becomes one of /v1 (or of text-embeddings-inference) and its answer is written down as that client
parses it, which is not always as its schemas say. The bodies name no checkpoint: the first that can do it answers, or
the address says which (`/hf/text-classification?model=encoder&head=sentiment`). What was cut, where that was asked for,
is told in a header. HTTP only; runs in the API process, on the event loop.
"""

from collections.abc import Awaitable, Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from service.api.answer import AnswerBody, create_answer
from service.api.classify import ClassifyBody, create_classification, in_address
from service.api.native import (
    MAX_ITEMS,
    Body,
    InputText,
    checked,
    json_response,
    of_address,
    tell_truncation,
    truncates_by_address,
)
from service.api.schemas_openai import Strict
from service.api.summarize import SummarizeBody, create_summary
from service.api.tag import TagBody, create_tags
from service.api.tei import EmbedBody, SimilarityBody, tei_embed, tei_similarity
from service.api.translate import TranslateBody, create_translation
from service.errors import GenerationFailed, InvalidRequest, ServiceError
from service.tasks.classification import LabelsOpen
from service.tasks.confidence import activated, best_first
from service.tasks.tagging import Aggregation

router = APIRouter(prefix="/hf", tags=["huggingface_hub"])

Texts = Annotated[
    Annotated[InputText, Tag("text")]
    | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]
Truncation = Literal["do_not_truncate", "longest_first", "only_first", "only_second"]
RENAMED = {
    "max_new_tokens": "max_tokens", "max_length": "max_tokens", "min_new_tokens": "min_tokens",
    "min_length": "min_tokens",
}  # fmt: skip
"""Names of `generate` that are others under /v1; `min_length` and `max_length` count the start token, ours do not."""
SHORTER = ("max_length", "min_length")
GENERATE_PLACE = "parameters.generate_parameters"


class TextClassificationParameters(Strict):
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None


class TextClassificationBody(Strict):
    inputs: Texts
    parameters: TextClassificationParameters = TextClassificationParameters()


@router.post("/text-classification", summary="As InferenceClient.text_classification reads it")
async def text_classification(request: Request, body: TextClassificationBody) -> Response:
    """Rows of labels, also for one text: the client takes the first."""
    wanted = body.parameters.function_to_apply
    places = {"input": "inputs"}
    fields = {
        "input": body.inputs, "raw_scores": wanted is not None, "truncate": truncates_by_address(request),
        **_of_address(request, "model", "head"),
    }  # fmt: skip
    asked = _made(ClassifyBody, fields, places)
    try:
        found, usage = await _answered(create_classification(request, asked), places)
    except LabelsOpen as error:
        raise in_address(request, error) from None
    rows = [entry["labels"] for entry in found["data"]]
    if wanted is not None:
        rows = [_reactivated(row, wanted) for row in rows]
    return tell_truncation(json_response([row[: body.parameters.top_k] for row in rows]), usage)


def _reactivated(row: list[dict[str, Any]], wanted: Literal["sigmoid", "softmax", "none"]) -> list[dict[str, Any]]:
    scores = activated(np.array([entry["score"] for entry in row]), wanted)
    return [{"label": row[place]["label"], "score": float(scores[place])} for place in best_first(scores)]


class TokenClassificationParameters(Strict):
    aggregation_strategy: Aggregation = "none"
    ignore_labels: list[str] = Field(default_factory=lambda: ["O"])
    stride: Literal[0] | None = None
    """Tokens that windows share: there are none, a text must fit."""


class TokenClassificationBody(Strict):
    inputs: Annotated[str, Field(min_length=1, max_length=2_000_000)]
    parameters: TokenClassificationParameters = TokenClassificationParameters()


@router.post("/token-classification", summary="As InferenceClient.token_classification reads it")
async def token_classification(request: Request, body: TokenClassificationBody) -> Response:
    parameters = body.parameters
    fields = {
        "input": body.inputs, "aggregation": parameters.aggregation_strategy,
        "ignore_labels": parameters.ignore_labels, "truncate": truncates_by_address(request),
        **_of_address(request, "model"),
    }  # fmt: skip
    places = {"input": "inputs"}
    found, usage = await _answered(create_tags(request, _made(TagBody, fields, places)), places)
    name = "entity" if parameters.aggregation_strategy == "none" else "entity_group"
    parts = found["data"][0]["parts"]
    answer = [{name: part["label"], **{key: part[key] for key in ("score", "word", "start", "end")}} for part in parts]
    return tell_truncation(json_response(answer), usage)


class ZeroShotParameters(Strict):
    candidate_labels: list[str] = Field(min_length=1)
    hypothesis_template: str | None = None
    multi_label: bool = False


class ZeroShotBody(Strict):
    inputs: InputText
    parameters: ZeroShotParameters


@router.post("/zero-shot-classification", summary="As InferenceClient.zero_shot_classification reads it")
async def zero_shot_classification(request: Request, body: ZeroShotBody) -> Response:
    """One flat list of labels, not the pipeline's `{sequence, labels, scores}`."""
    parameters = body.parameters
    fields = {
        "input": body.inputs, "labels": parameters.candidate_labels, "multi_label": parameters.multi_label,
        "hypothesis_template": parameters.hypothesis_template, "truncate": truncates_by_address(request),
        **_of_address(request, "model"),
    }  # fmt: skip
    places = {
        "input": "inputs", "labels": "parameters.candidate_labels",
        "hypothesis_template": "parameters.hypothesis_template",
    }  # fmt: skip
    found, usage = await _answered(create_classification(request, _made(ClassifyBody, fields, places)), places)
    return tell_truncation(json_response(found["data"][0]["labels"]), usage)


class FeatureExtractionBody(EmbedBody):
    encoding_format: Literal["float"] = "float"


@router.post("/feature-extraction", summary="As InferenceClient.feature_extraction reads it")
async def feature_extraction(request: Request, body: FeatureExtractionBody) -> Response:
    return await tei_embed(request, body)


@router.post("/sentence-similarity", summary="As InferenceClient.sentence_similarity reads it")
async def sentence_similarity(request: Request, body: SimilarityBody) -> Response:
    return await tei_similarity(request, body)


class GenerateParameters(Strict):
    """What is served of the parameters of `generate` in `transformers`; their values are looked at as /v1 does."""

    max_new_tokens: Any = None
    max_length: Any = None
    min_new_tokens: Any = None
    min_length: Any = None
    do_sample: bool | None = None
    num_beams: Any = None
    length_penalty: Any = None
    early_stopping: Any = None
    no_repeat_ngram_size: Any = None
    repetition_penalty: Any = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    seed: Any = None

    def fields(self) -> dict[str, Any]:
        """By their names under /v1. Raises InvalidRequest where two are given that are one there."""
        found: dict[str, Any] = {}
        for name, value in self.model_dump(exclude_unset=True, exclude={"do_sample"}).items():
            own = RENAMED.get(name, name)
            if own in found:
                place = f"{GENERATE_PLACE}.{name}"
                raise InvalidRequest(f"{place}: another name for the same limit is given as well", param=place)
            found[own] = _counted(name, value)
        if self.do_sample is not None:
            found["temperature"] = found.get("temperature", 1.0) if self.do_sample else 0.0
        return found

    def places(self) -> dict[str, str]:
        return {RENAMED.get(name, name): f"{GENERATE_PLACE}.{name}" for name in self.model_fields_set}


class WritingParameters(Strict):
    """`clean_up_tokenization_spaces` is of no effect: texts come as the tokenizer decodes them."""

    clean_up_tokenization_spaces: bool | None = None
    truncation: Truncation = "do_not_truncate"
    generate_parameters: GenerateParameters = GenerateParameters()

    def fields(self) -> dict[str, Any]:
        return {**self.generate_parameters.fields(), "truncate": self.truncation != "do_not_truncate"}

    def places(self) -> dict[str, str]:
        places = {"input": "inputs", "source": "parameters.src_lang", "target": "parameters.tgt_lang"}
        return places | self.generate_parameters.places()


def _counted(name: str, value: Any) -> Any:
    return value - 1 if name in SHORTER and isinstance(value, int) and value > 1 else value


class SummarizationBody(Strict):
    inputs: Texts
    parameters: WritingParameters = WritingParameters()


@router.post("/summarization", summary="As InferenceClient.summarization reads it")
async def summarization(request: Request, body: SummarizationBody) -> Response:
    places = body.parameters.places()
    fields = {**body.parameters.fields(), "input": body.inputs, **_of_address(request, "model")}
    found, usage = await _answered(create_summary(request, _made(SummarizeBody, fields, places)), places)
    return tell_truncation(json_response([{"summary_text": entry["summary"]} for entry in found["data"]]), usage)


class TranslationParameters(WritingParameters):
    src_lang: str | None = None
    tgt_lang: str | None = None


class TranslationBody(Strict):
    inputs: Texts
    parameters: TranslationParameters = TranslationParameters()


@router.post("/translation", summary="As InferenceClient.translation reads it")
async def translation(request: Request, body: TranslationBody) -> Response:
    languages = {"source": body.parameters.src_lang, "target": body.parameters.tgt_lang}
    places = body.parameters.places()
    fields = {**body.parameters.fields(), **languages, "input": body.inputs, **_of_address(request, "model")}
    found, usage = await _answered(create_translation(request, _made(TranslateBody, fields, places)), places)
    return tell_truncation(
        json_response([{"translation_text": entry["translation"]} for entry in found["data"]]), usage
    )


class QuestionInputs(Strict):
    question: InputText
    context: InputText


class QuestionParameters(Strict):
    """`max_question_len` is of no effect, as in the pipeline with the tokenizers that there are today."""

    top_k: int | None = None
    max_question_len: Annotated[int, Field(ge=1)] | None = None
    doc_stride: int | None = None
    max_answer_len: int | None = None
    max_seq_len: int | None = None
    handle_impossible_answer: bool | None = None
    align_to_words: bool | None = None


class QuestionBody(Strict):
    inputs: QuestionInputs
    parameters: QuestionParameters = QuestionParameters()


@router.post("/question-answering", summary="As InferenceClient.question_answering reads it")
async def question_answering(request: Request, body: QuestionBody) -> Response:
    """An object for one answer, a list where several are asked for."""
    given = body.parameters.model_dump(exclude_none=True, exclude={"max_question_len"})
    places = {name: f"parameters.{name}" for name in given} | {
        "question": "inputs.question",
        "context": "inputs.context",
    }
    fields = {**given, **body.inputs.model_dump(), "method": "extractive", **_of_address(request, "model")}
    found, _ = await _answered(create_answer(request, _made(AnswerBody, fields, places)), places)
    answers = [
        {name: entry[name] for name in ("answer", "score", "start", "end")} for entry in found["data"][0]["answers"]
    ]
    return json_response(answers if (body.parameters.top_k or 1) > 1 else answers[0])


def _of_address(request: Request, *names: str) -> dict[str, str]:
    """What the address asks for; the bodies have no place for it."""
    found = {name: of_address(request, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _made(kind: type[Body], fields: Mapping[str, Any], places: Mapping[str, str]) -> Body:
    """The request of /v1 that is meant. Raises: InvalidRequest as its own endpoint would."""
    try:
        return checked(kind, fields)
    except ServiceError as error:
        raise _renamed(error, places) from error


async def _answered(work: Awaitable[Response], places: Mapping[str, str]) -> tuple[Any, dict[str, int]]:
    """The endpoint's answer as data, and its usage.

    These shapes have no place for one text's error, so the first is the request's.
    """
    try:
        response = await work
    except ServiceError as error:
        raise _renamed(error, places) from error
    found = msgspec.json.decode(response.body)
    for entry in found["data"]:
        if "error" in entry:
            kind = GenerationFailed if entry["error"]["type"] == ServiceError.type else InvalidRequest
            raise kind(entry["error"]["message"], param=f"inputs.{entry['index']}")
    return found, found["usage"]


def _renamed(error: ServiceError, places: Mapping[str, str]) -> ServiceError:
    """The field at fault by the name that it has here."""
    if error.param is not None:
        first, dot, rest = error.param.partition(".")
        error.param = places.get(first, first) + dot + rest
    return error
