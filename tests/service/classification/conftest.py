"""The worker's lanes without the worker: tiny random checkpoints of transformers' in this process, behind the API."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from lane_engine import LaneEngine
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from service.app import create_app
from service.settings import Settings

WORDS = (
    "the a cat dog sat on mat and ran to far hill good bad very film was not this example is sports politics food "
    "positive neutral negative sentiment of text n/a . poison"
).split()
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


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
