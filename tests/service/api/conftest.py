"""An engine that speaks by script over a real tokenizer, the application around it, and clients of both kinds."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model.batch import SamplingParams, TokenLogprobs
from model.chat_template import ChatTemplate
from model.description import CheckpointDescription
from model.tokenizer import Tokenizer, TokenizerConfig
from service.api.state import app_state
from service.app import create_app
from service.engine.flight import GenerateFlight, GenerateRequest
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import ModelSpec, TokenOutput
from service.errors import ServiceError
from service.settings import Settings

TEMPLATES = Path(__file__).parents[2] / "model" / "chat_templates"
OWN_TEMPLATES = Path(__file__).parent / "chat_templates"
"""Short ones, with the markers of templates that are long."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<tool_call>", "</tool_call>"]


@functools.cache
def byte_tokenizer(special: tuple[str, ...] = ()) -> Tokenizer:
    """A token for each byte, so that many characters are several tokens; then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={piece: id for id, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return Tokenizer(backend, TokenizerConfig(special_tokens={"eos_token": "<|im_end|>", "pad_token": SPECIAL[0]}))


@functools.cache
def chat_template(name: str) -> ChatTemplate:
    own = OWN_TEMPLATES / f"{name}.jinja"
    path = own if own.is_file() else TEMPLATES / own.name
    return ChatTemplate(path.read_text(), byte_tokenizer().special_tokens)


def describe(**changes: Any) -> CheckpointDescription:
    values: dict[str, Any] = {
        "folder": Path("tiny"),
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "network": "decoder",
        "head": "language_model",
        "tasks": ("generate", "chat"),
        "context_length": 2048,
        "vocab_size": 264,
        "version": "v1",
        "eos_ids": (258,),
    }
    return CheckpointDescription(**(values | changes))


@functools.cache
def word_tokenizer() -> Tokenizer:
    """Words with their leading spaces, as SentencePiece has them; a text's own first space is dropped."""
    vocabulary = {"▁one": 0, "▁two": 1, "<s>": 2}
    backend = Backend(models.WordLevel(vocabulary, unk_token="▁one"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_tokens([AddedToken("<s>", special=True, normalized=False)])
    return Tokenizer(backend, TokenizerConfig(special_tokens={"bos_token": "<s>"}))


def loaded_model(
    name: str, template: str | None = "qwen2.5", *, tokenizer: Tokenizer | None = None, **changes: Any
) -> LoadedModel:
    return LoadedModel(
        name=name,
        version="v1",
        spec=ModelSpec(key=f"{name}@v1", folder=name),
        description=describe(**changes),
        tokenizer=tokenizer or byte_tokenizer(),
        chat_template=None if template is None else chat_template(template),
        state="ready",
    )


class ScriptedStream:
    """What `GenerationStream` is to the tasks; its tokens are known beforehand."""

    def __init__(self, engine: "ScriptedEngine", request: GenerateRequest, ids: list[int]) -> None:
        model = engine.models[request.model.partition("@")[0]]
        self.request, self._engine, self._ids = request, engine, ids
        self.outcome: str | None = None
        self.timings = GenerateFlight(
            number=len(engine.streams), model=model, task=request.task, client=request.client, priority=0,
            cost_tokens=0, num_prompt_tokens=len(request.prompt_ids), accepted=time.monotonic(),
            deadline=request.deadline, request=request,
        )  # fmt: skip

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        sampling = self.request.sampling
        prompt_logprobs = self._prompt_logprobs(sampling)
        if sampling.max_tokens == 0:
            self.outcome = "length"
            yield TokenOutput(request_id=0, prompt_logprobs=prompt_logprobs, finish_reason="length")
            return
        for count, id in enumerate(self._ids, start=1):
            if self._engine.fails(self.timings.number, count):
                self.outcome = "error"
                raise self._engine.failure
            await self._engine.step(count)
            if self.outcome is not None:
                return
            reason = "stop" if id in sampling.stop_ids and count > sampling.min_tokens else None
            if reason is None and count == sampling.max_tokens:
                reason = "length"
            self.outcome = reason
            yield TokenOutput(
                request_id=0,
                token_ids=[id],
                logprobs=[] if sampling.logprobs is None else [self._logprob(id, sampling.logprobs)],
                prompt_logprobs=prompt_logprobs if count == 1 else [],
                finish_reason=reason,
                num_cached_tokens=self._engine.num_cached_tokens + 10 * (self.timings.number % 2),
            )
            if reason is not None:
                return
        raise AssertionError("the script has no end")

    def cancel(self, outcome: str = "cancelled") -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._engine.cancelled.append(outcome)
            self._engine.changed.set()

    async def aclose(self) -> None:
        self.cancel()

    def _prompt_logprobs(self, sampling: SamplingParams) -> list[TokenLogprobs]:
        if sampling.prompt_logprobs is None:
            return []
        return [self._logprob(id, sampling.prompt_logprobs) for id in self.request.prompt_ids[1:]]

    @staticmethod
    def _logprob(id: int, count: int) -> TokenLogprobs:
        top = tuple((id + n) % 256 for n in range(count))
        return TokenLogprobs(id, -0.5, top, tuple(-0.5 - n for n in range(count)))


class ScriptedEngine:
    """Answers each request with `reply` (text, or a function of the request), then the end of text."""

    alive = True

    def __init__(self) -> None:
        self.state = "ready"
        self.models = ModelDirectory(
            {
                "tiny": loaded_model("tiny"),
                "llama": loaded_model("llama", "llama-3.1"),
                "thinker": loaded_model("thinker", "qwen3"),
                "opener": loaded_model("opener", "opens-thoughts"),
                "special-opener": loaded_model(
                    "special-opener", "opens-thoughts", tokenizer=byte_tokenizer(("<think>", "</think>"))
                ),
                "special-thinker": loaded_model(
                    "special-thinker", "qwen3", tokenizer=byte_tokenizer(("<think>", "</think>"))
                ),
                "mistral": loaded_model("mistral", "mistral-7b-v0.3"),
                "mistral-11": loaded_model(
                    "mistral-11", "mistral-11", tokenizer=byte_tokenizer(("[TOOL_CALLS]", "[ARGS]"))
                ),
                "coder": loaded_model("coder", "qwen3-coder"),
                "plain": loaded_model("plain", None, tasks=("generate",)),
                "phi": loaded_model("phi", "phi-3"),
                "gemma": loaded_model("gemma", "gemma-2"),
                "words": loaded_model("words", None, tokenizer=word_tokenizer()),
                "encoder": loaded_model("encoder", None, tasks=("embed", "similarity"), head="embedding"),
            },
            other_names={"gpt-4o": "tiny", "gpt-4o-mini": "llama@v1", "gone": "unloaded"},
        )
        self.reply: str | Callable[[GenerateRequest], str] = "Hello, wörld 🦙!"
        self.refusal: ServiceError | None = None
        self.fail_after: int | None = None
        self.failing_stream: int | None = None
        """The one stream that fails after `fail_after` tokens; None: every one does."""
        self.failure: ServiceError = ServiceError("the step failed")
        self.num_cached_tokens = 0
        self.streams: list[ScriptedStream] = []
        self.cancelled: list[str] = []
        self.hold_after: int | None = None
        self.released = asyncio.Event()
        self.changed = asyncio.Event()

    @property
    def requests(self) -> list[GenerateRequest]:
        return [stream.request for stream in self.streams]

    def fails(self, stream: int, count: int) -> bool:
        return self.fail_after is not None and count > self.fail_after and self.failing_stream in (None, stream)

    async def step(self, count: int) -> None:
        await asyncio.sleep(0)
        if self.hold_after is not None and count > self.hold_after:
            await self.released.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        return self.models.resolve(name, task)

    def generate(self, request: GenerateRequest) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        model = self.resolve(request.model, request.task)
        text = self.reply if isinstance(self.reply, str) else self.reply(request)
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        self.streams.append(ScriptedStream(self, request, [*ids, 258, *([97] * 4096)]))
        self.changed.set()
        return self.streams[-1]

    async def start(self) -> None: ...

    async def drain(self, timeout_seconds: float) -> None: ...

    async def stop(self) -> None: ...


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def app(engine: ScriptedEngine) -> FastAPI:
    return create_app(Settings(), engine)  # type: ignore[arg-type]


@pytest.fixture
def impatient(app: FastAPI) -> None:
    """Streams give signs of life almost at once."""
    state = app_state(app)
    state.settings = state.settings.model_copy(update={"stream_keep_alive": 0.01})


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
