"""`/generate`, `/generate_stream` and `/hf/text-generation`: completions in the shapes of text-generation-inference.

Thin: each request becomes one of /v1/completions, and is told token by token as that server's clients read it: the id
that ends a text is a token too, a stop string is part of the text, and what is not sampled is greedy. The bodies name
no checkpoint, at most an adapter (`adapter_id`): else the first that generates answers, or the one in the address
(`/generate?model=NAME`). HTTP only. Runs in the API process, on the event loop.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from model.batch import TokenLogprobs
from service.api.answers_openai import UsageAnswer
from service.api.chat import named_as
from service.api.completions import start_completion
from service.api.generating import respond
from service.api.native import FilledText, checked, model_of_address
from service.api.schemas_openai import INT32, INT64, MAX_LOGPROBS, MAX_STOPS, CompletionBody, StopText, Strict
from service.api.state import request_state
from service.api.token_logprobs import finite, token_text
from service.errors import InvalidRequest
from service.tasks.generation import Delta, Generation

router = APIRouter(tags=["text-generation-inference"])

DEFAULT_MAX_NEW_TOKENS = 100
"""That server's."""
PLACES = {
    r"^prompt$": "inputs",
    r"^max_tokens": "parameters.max_new_tokens",
    r"^truncate_prompt_tokens": "parameters.truncate",
    r"^prompt_logprobs": "parameters.decoder_input_details",
    r"^logprobs": "parameters.top_n_tokens",
    r"^(guided_json|regex)": "parameters.grammar.value",
    r"^(temperature|top_k|top_p|seed|stop|repetition_penalty|frequency_penalty)": r"parameters.\1",
}
FinishReason = Literal["length", "eos_token", "stop_sequence"]


class GrammarParameter(Strict):
    type: Literal["json", "regex"]
    value: dict[str, Any] | Annotated[str, Field(min_length=1)]
    """A JSON schema, or the text of one; or an expression."""


class GenerateParameters(Strict):
    max_new_tokens: Annotated[int, Field(ge=1, le=INT32)] = DEFAULT_MAX_NEW_TOKENS
    do_sample: bool = Field(default=False, description="also where a temperature, top_k or top_p is given")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=0, le=INT32)
    top_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=INT64)
    stop: list[StopText] = Field(default=[], max_length=MAX_STOPS)
    truncate: int | None = Field(default=None, ge=1, le=INT32, description="keep so many of the prompt's last tokens")
    grammar: GrammarParameter | None = None
    return_full_text: bool = Field(default=False, description="the prompt before the text")
    details: bool = Field(default=False, description="tokens, log-probabilities and why it ended")
    decoder_input_details: bool = Field(default=False, description="with details: the prompt's tokens, too")
    top_n_tokens: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="with details: the likeliest of each place"
    )
    adapter_id: str | None = Field(default=None, description="an adapter that shares its base, by its name")
    best_of: Literal[1] | None = None
    watermark: Literal[False] = False

    @property
    def is_sampled(self) -> bool:
        return self.do_sample or any(value is not None for value in (self.temperature, self.top_k, self.top_p))

    def fields(self, *, stream: bool) -> dict[str, Any]:
        """By their names under /v1/completions."""
        temperature = 1.0 if self.temperature is None else self.temperature
        fields: dict[str, Any] = {
            "max_tokens": self.max_new_tokens, "temperature": temperature if self.is_sampled else 0.0,
            "top_k": self.top_k, "top_p": self.top_p, "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty, "seed": self.seed, "stop": self.stop,
            "truncate_prompt_tokens": self.truncate, "include_stop_str_in_output": True,
            "logprobs": (self.top_n_tokens or 0) if self.details or stream else None,
            "prompt_logprobs": 0 if self.details and self.decoder_input_details else None,
            "stream": stream,
        }  # fmt: skip
        if self.grammar is not None:
            fields["guided_json" if self.grammar.type == "json" else "regex"] = self.grammar.value
        return fields


class GenerateBody(Strict):
    inputs: FilledText
    parameters: GenerateParameters = GenerateParameters()
    stream: bool = False


class TokenAnswer(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool


class PrefillAnswer(BaseModel):
    id: int
    text: str
    logprob: float | None
    """None for the first, which nothing predicts."""


class DetailsAnswer(BaseModel):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillAnswer]
    tokens: list[TokenAnswer]
    top_tokens: list[list[TokenAnswer]] | None = Field(default=None, exclude_if=lambda value: value is None)


class GenerateAnswer(BaseModel):
    generated_text: str
    details: DetailsAnswer | None = Field(default=None, exclude_if=lambda value: value is None)


class StreamDetailsAnswer(BaseModel):
    finish_reason: FinishReason
    generated_tokens: int
    input_length: int
    seed: int | None


class StreamAnswer(BaseModel):
    """One token; the last has the whole text."""

    index: int
    token: TokenAnswer
    top_tokens: list[TokenAnswer] | None = Field(default=None, exclude_if=lambda value: value is None)
    generated_text: str | None = None
    details: StreamDetailsAnswer | None = None


@router.post("/generate", response_model=GenerateAnswer, summary="Continue a prompt, as text-generation-inference does")
async def generate(request: Request, body: GenerateBody) -> Response:
    return await _answer(request, body, stream=False)


@router.post("/generate_stream", summary="The same as a stream of tokens")
async def generate_stream(request: Request, body: GenerateBody) -> Response:
    return await _answer(request, body, stream=True)


@router.post("/hf/text-generation", summary="As InferenceClient.text_generation reads it, whole or as a stream")
async def text_generation(request: Request, body: GenerateBody) -> Response:
    return await _answer(request, body, stream=body.stream)


async def _answer(request: Request, body: GenerateBody, *, stream: bool) -> Response:
    options = body.parameters.fields(stream=stream)
    fields = {**options, "prompt": body.inputs, "model": _model(request, body.parameters.adapter_id)}
    with named_as(PLACES):
        asked = checked(CompletionBody, fields)
        generation = await start_completion(request, asked)
        return await respond(request, generation, GenerateWriter(body, generation), asked)


def _model(request: Request, adapter_id: str | None) -> str | None:
    """The adapter, or what the address names. Raises: InvalidRequest for an adapter that is not there."""
    named = model_of_address(request)
    if adapter_id is None:
        return named
    models = request_state(request).engine.models.names()
    if adapter_id not in models or models[adapter_id].base is None or named not in (None, adapter_id):
        adapters = ", ".join(name for name, model in models.items() if model.base is not None) or "none"
        raise InvalidRequest(
            f"there is no adapter '{adapter_id[:160]}', or the address names another model; adapters: {adapters}",
            param="parameters.adapter_id",
        )
    return adapter_id


class GenerateWriter:
    """Tells tokens, each with the text that it has added."""

    def __init__(self, body: GenerateBody, generation: Generation) -> None:
        self._inputs, self._parameters = body.inputs, body.parameters
        self._generation = generation
        self._tokenizer = generation.model.tokenizer
        self._text = ""
        self._num_told = 0
        """Characters of the text that tokens have been told with."""
        self._tokens: list[TokenAnswer] = []
        self._top_tokens: list[list[TokenAnswer]] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens behind the first."""
        self._finish_reason: FinishReason = "length"

    def chunk(self, delta: Delta) -> bytes:
        first = len(self._tokens)
        self.add(delta)
        events = [
            StreamAnswer(index=index + 1, token=self._tokens[index], top_tokens=self._top_of(index))
            for index in range(first, len(self._tokens))
        ]
        if delta.finish_reason is not None:
            if not events:
                events = [StreamAnswer(index=len(self._tokens), token=self._last_again())]
            events[-1].generated_text = self._whole_text
            events[-1].details = self._stream_details() if self._parameters.details else None
        return b"".join(b"data:" + event.model_dump_json().encode() + b"\n\n" for event in events)

    def end(self, usage: UsageAnswer) -> bytes:  # noqa: ARG002 - the last token's event has told all
        return b""

    def add(self, delta: Delta) -> None:
        self._prompt_logprobs += delta.prompt_logprobs
        self._text += delta.text
        starts = [self._num_told, *delta.offsets[1:]]
        ends = [*delta.offsets[1:], len(self._text)]
        for token, start, end in zip(delta.tokens, starts, ends, strict=False):
            self._take(token, self._text[start:end])
            self._num_told = end
        if delta.end_token is not None:
            self._take(delta.end_token, "")
        if delta.finish_reason is not None:
            self._finish_reason = _reason(delta)

    def answer(self, usage: UsageAnswer) -> GenerateAnswer:
        found = GenerateAnswer(generated_text=self._whole_text)
        if self._parameters.details:
            found.details = DetailsAnswer(
                finish_reason=self._finish_reason,
                generated_tokens=usage.completion_tokens,
                seed=self._parameters.seed,
                prefill=self._read_prompt() if self._parameters.decoder_input_details else [],
                tokens=self._tokens,
                top_tokens=self._top_tokens if self._parameters.top_n_tokens else None,
            )
        return found

    @property
    def _whole_text(self) -> str:
        return self._inputs + self._text if self._parameters.return_full_text else self._text

    def _take(self, token: TokenLogprobs, text: str) -> None:
        self._tokens.append(self._told(token.token_id, token.logprob, text))
        if self._parameters.top_n_tokens:
            top = zip(token.top_ids, token.top_logprobs, strict=True)
            self._top_tokens.append([self._told(id, logprob, token_text(self._tokenizer, id)) for id, logprob in top])

    def _told(self, id: int, logprob: float, text: str) -> TokenAnswer:
        special = self._tokenizer.is_special(id)
        shown = token_text(self._tokenizer, id) if special else text
        return TokenAnswer(id=id, text=shown, logprob=finite(logprob), special=special)

    def _last_again(self) -> TokenAnswer:
        """For an end that comes by itself, after a worker's death, say: with the text that nobody has told."""
        return self._tokens[-1].model_copy(update={"text": self._text[self._num_told :]})

    def _top_of(self, index: int) -> list[TokenAnswer] | None:
        return self._top_tokens[index] if self._parameters.top_n_tokens else None

    def _read_prompt(self) -> list[PrefillAnswer]:
        """All of the prompt's tokens, the first, which may be the only one, without a value."""
        found: list[tuple[int, float | None]] = [(self._generation.prompts[0].ids[0], None)]
        found += [(token.token_id, finite(token.logprob)) for token in self._prompt_logprobs]
        return [PrefillAnswer(id=id, text=token_text(self._tokenizer, id), logprob=value) for id, value in found]

    def _stream_details(self) -> StreamDetailsAnswer:
        usage = self._generation.usage
        return StreamDetailsAnswer(
            finish_reason=self._finish_reason,
            generated_tokens=usage.completion_tokens,
            input_length=usage.prompt_tokens,
            seed=self._parameters.seed,
        )


def _reason(delta: Delta) -> FinishReason:
    if delta.finish_reason != "stop":
        return "length"
    return "stop_sequence" if isinstance(delta.stop_reason, str) else "eos_token"
