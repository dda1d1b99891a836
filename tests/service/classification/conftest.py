"""The worker's lanes without the worker: tiny random checkpoints of transformers' in this process, behind the API."""

import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.description import describe
from model.tokenizer import Tokenizer
from service.app import create_app
from service.engine.flight import EncodeFlight, EncodeRequest, Flight, GenerateFlight, GenerateRequest
from service.engine.lanes import Lane
from service.engine.loading import load_lane
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import Encode, EncodeResult, Generate, ModelSpec, TokenOutput, WorkerConfig
from service.errors import GenerationFailed
from service.settings import Settings

WORDS = (
    "the a cat dog sat on mat and ran to far hill good bad very film was not this example is sports politics food "
    "positive neutral negative sentiment of text n/a . poison"
).split()
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class Stream:
    """What `GenerationStream` is to the tasks; asking for more makes the lane's steps."""

    def __init__(self, engine: "LaneEngine", lane: Lane, flight: GenerateFlight) -> None:
        self.timings: Flight = flight
        self.outputs: deque[TokenOutput] = deque()
        self.ended = False
        self._engine, self._lane, self._number = engine, lane, flight.number

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        while not self.ended:
            while not self.outputs:
                self._engine.step(self._lane)
            output = self.outputs.popleft()
            if output.error is not None:
                raise GenerationFailed(output.error)
            self.ended = output.finish_reason is not None
            yield output

    def cancel(self, outcome: str = "cancelled") -> None:
        if not self.ended:
            self.ended = True
            self._lane.cancel(self._number)


class LaneEngine:
    """The engine by what tasks and application ask of it; keeps what was asked of the lanes."""

    alive = True

    def __init__(self) -> None:
        self.state = "ready"
        self.models = ModelDirectory()
        self.encoded: list[EncodeRequest] = []
        self.generated: list[GenerateRequest] = []
        self.num_cached: list[int] = []
        self._lanes: dict[str, Lane] = {}
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)

    def load(self, folder: Path, name: str | None = None) -> LoadedModel:
        name = name or folder.name
        spec = ModelSpec(key=f"{name}@1", folder=str(folder), dtype="float32", kv_cache_bytes=1 << 20)
        config = WorkerConfig(models=[], block_size=4)
        self._lanes[spec.key] = load_lane(spec, config, lambda done, total: None, lambda: None)
        self.models[name] = LoadedModel(
            name=name, version="1", spec=spec, description=describe(folder), tokenizer=Tokenizer.load(folder),
            chat_template=None, state="ready",
        )  # fmt: skip
        return self.models[name]

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        return self.models.resolve(name, task)

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]:
        self.encoded.append(request)
        flight = EncodeFlight(request=request, results=[None] * len(request.inputs), **self._common(request))
        lane, message = self._lanes[request.model], flight.message()
        assert isinstance(message, Encode)
        lane.submit(message, time.monotonic())
        while any(result is None for result in flight.results):
            for result in lane.step(time.monotonic()).encoded:
                flight.deliver(result)
        return [result for result in flight.results if result is not None]

    def generate(self, request: GenerateRequest) -> Stream:
        self.generated.append(request)
        flight = GenerateFlight(request=request, **self._common(request))
        lane, message = self._lanes[request.model], flight.message()
        assert isinstance(message, Generate)
        stream = self._streams[flight.number] = Stream(self, lane, flight)
        lane.submit(message, time.monotonic())
        return stream

    def step(self, lane: Lane) -> None:
        for output in lane.step(time.monotonic()).tokens:
            self._streams[output.request_id].outputs.append(output)
            if output.finish_reason is not None:
                self.num_cached.append(output.num_cached_tokens)

    def _common(self, request: GenerateRequest | EncodeRequest) -> dict[str, Any]:
        model = self.models.by_key(request.model)
        return {
            "number": next(self._numbers), "model": model, "task": request.task, "client": "", "priority": 0,
            "cost_tokens": 0, "num_prompt_tokens": 0, "accepted": time.monotonic(), "deadline": request.deadline,
        }  # fmt: skip

    async def start(self) -> None: ...

    async def drain(self, timeout_seconds: float) -> None: ...

    async def stop(self) -> None: ...


@pytest.fixture
def engine() -> LaneEngine:
    return LaneEngine()


@pytest.fixture
async def client(engine: LaneEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(), engine)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words and letters, BERT's special tokens; a limit of 64 tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?!:"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    backend = Backend(
        models.WordPiece({piece: id for id, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


Make = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture
def make_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """make_model(class name, name, **config): a folder and the model that transformers saved there."""

    def make(kind: str, name: str = "tiny", scale: float = 0.2, **config: Any) -> tuple[Path, PreTrainedModel]:
        model_class = getattr(transformers, kind)
        values = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0, **SIZES, **config}
        model = model_class(model_class.config_class(**values)).eval()
        randomize(model, scale)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model

    return make


def randomize(model: torch.nn.Module, scale: float) -> None:
    """Weights large enough that labels differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + 1 if parameter.ndim == 1 and name.endswith("weight") else noise)


@pytest.fixture
def make_classifier(make_model: Make) -> Make:
    """make_classifier(labels, ...): a BERT with a head of these labels."""

    def make(labels: list[str], name: str = "tiny", **config: Any) -> tuple[Path, PreTrainedModel]:
        id2label = dict(enumerate(labels))
        label2id = {label: id for id, label in id2label.items()}
        return make_model("BertForSequenceClassification", name, id2label=id2label, label2id=label2id, **config)

    return make
