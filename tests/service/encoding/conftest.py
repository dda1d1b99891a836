"""Tiny encoders of transformers' and sentence-transformers' in this process, behind the application."""

import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
import transformers
from fastapi import FastAPI
from lane_engine import LaneEngine
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from service.app import create_app
from service.settings import Settings

WORDS = "the a cat dog sat on mat and ran to far hill good bad very film was not query : passage poison".split()
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MAX_TOKENS = 64


def note_threads(monkeypatch: pytest.MonkeyPatch, *functions: tuple[ModuleType, str]) -> list[threading.Thread]:
    """From now on, in which thread each call of these functions (module and name) runs."""
    threads: list[threading.Thread] = []
    for module, name in functions:
        called = getattr(module, name)

        def noted(*args: Any, called: Any = called) -> Any:
            threads.append(threading.current_thread())
            return called(*args)

        monkeypatch.setattr(module, name, noted)
    return threads


@pytest.fixture
def engine() -> LaneEngine:
    return LaneEngine()


@pytest.fixture
def app(engine: LaneEngine) -> FastAPI:
    return create_app(Settings(), engine)  # type: ignore[arg-type]


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


Post = Callable[..., Any]


@pytest.fixture
def post(client: httpx.AsyncClient) -> Post:
    """await post(path, **body): the answer to a request that must succeed."""

    async def send(path: str, **body: Any) -> Any:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text[:500]
        return response.json()

    return send


@pytest.fixture
def refused(client: httpx.AsyncClient) -> Post:
    """await refused(path, **body): the error of a request that is the caller's fault."""

    async def send(path: str, **body: Any) -> dict[str, Any]:
        response = await client.post(path, json=body)
        assert 400 <= response.status_code < 500, (body, response.text[:500])
        error: dict[str, Any] = response.json()["error"]
        return error

    return send


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words and letters, BERT's special tokens; a limit of 64 tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    digits = "01234"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{letter}" for letter in letters), *digits]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=MAX_TOKENS, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that texts differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if parameter.ndim == 1 and name.endswith("weight") else noise)


@pytest.fixture
def make_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """make_model(class name, name, **config): a folder and the model that transformers saved there."""

    def make(kind: str, name: str = "tiny", **config: Any) -> tuple[Path, PreTrainedModel]:
        model_class = getattr(transformers, kind)
        values = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "pad_token_id": 0, **SIZES}
        model = model_class(model_class.config_class(**(values | config))).eval()
        randomize(model)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model

    return make


MakeEmbedder = Callable[..., SentenceTransformer]


@pytest.fixture
def make_embedder(make_model: Any, engine: LaneEngine, tmp_path: Path) -> MakeEmbedder:
    """make_embedder(name, ...): an embedding checkpoint in the engine, and the reference that saved it."""

    def make(name: str = "embedder", *, include_prompt: bool = True, **settings: Any) -> SentenceTransformer:
        folder, _ = make_model("BertModel", f"{name}-base")
        parts: list[torch.nn.Module] = [modules.Transformer(str(folder))]
        parts.append(modules.Pooling(32, pooling_mode="mean", include_prompt=include_prompt))
        if settings.pop("normalize", True):
            parts.append(modules.Normalize())
        reference = SentenceTransformer(modules=parts, device="cpu", **settings)
        reference.save(str(tmp_path / name), create_model_card=False)
        engine.load(tmp_path / name)
        return reference

    return make


@pytest.fixture
def make_sparse(make_model: Any, engine: LaneEngine, tmp_path: Path) -> Callable[..., SparseEncoder]:
    """make_sparse(name, ...): a sparse encoder in the engine, and the reference that saved it."""

    def make(name: str = "sparse", *, pooling_strategy: str = "max", activation_function: str = "relu",
             **settings: Any) -> SparseEncoder:  # fmt: skip
        folder, _ = make_model("BertForMaskedLM", f"{name}-base")
        pooling = SpladePooling(pooling_strategy, activation_function)  # type: ignore[arg-type]
        parts = [modules.Transformer(str(folder), transformer_task="fill-mask"), pooling]
        reference = SparseEncoder(modules=parts, device="cpu", **settings)
        reference.save(str(tmp_path / name), create_model_card=False)
        engine.load(tmp_path / name)
        return reference

    return make


@pytest.fixture
def make_classifier(make_model: Any, engine: LaneEngine) -> Callable[..., PreTrainedModel]:
    """make_classifier(labels, ...): a BERT with a head of these labels, in the engine."""

    def make(labels: list[str], name: str = "classifier", **config: Any) -> PreTrainedModel:
        id2label = dict(enumerate(labels))
        label2id = {label: id for id, label in id2label.items()}
        folder, model = make_model(
            "BertForSequenceClassification", name, id2label=id2label, label2id=label2id, **config
        )
        engine.load(folder)
        return model

    return make


@pytest.fixture
def make_reranker(make_model: Any, engine: LaneEngine) -> Callable[..., Path]:
    """make_reranker(): a cross-encoder of one label in the engine, and its folder."""

    def make(name: str = "reranker", **config: Any) -> Path:
        folder, _ = make_model("BertForSequenceClassification", name, num_labels=1, **config)
        engine.load(folder)
        return folder

    return make
