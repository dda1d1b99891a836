"""Factories of the encoder tests: tiny random checkpoints made by transformers, and our runner over their folders."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers import BertTokenizerFast, PreTrainedModel

from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend
from model.attention.reference import ReferenceAttention
from model.encode_network import EncodeOutput, load_encode_network
from model.encoder_runner import EncodeItem, EncoderRunner

SMALL = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {**SMALL, "max_position_embeddings": 80}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "bert": ("Bert", WIDE),
    "roberta": ("Roberta", {**WIDE, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {**WIDE, "type_vocab_size": 1}),
    "camembert": ("Camembert", {**WIDE, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 90, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 80},
    ),
    "mpnet": ("MPNet", {**WIDE, "max_position_embeddings": 320, "relative_attention_num_buckets": 32}),
    "albert": (
        "Albert",
        {**WIDE, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "modernbert": ("ModernBert", {**WIDE, "num_hidden_layers": 4, "local_attention": 10, "pad_token_id": 0}),
    "deberta-v2": (
        "DebertaV2",
        {
            **WIDE,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": "p2c|c2p",
            "position_biased_input": False,
            "layer_norm_eps": 1e-7,
        },
    ),
    "deberta": (
        "Deberta",
        {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "eurobert": (
        "EuroBert",
        {
            **WIDE,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "mask_token_id": 3,
        },
    ),
    "electra": ("Electra", {**WIDE, "embedding_size": 16}),
    "ernie": ("Ernie", {**WIDE, "use_task_id": True}),
    "data2vec-text": ("Data2VecText", {**WIDE, "type_vocab_size": 1}),
    "megatron-bert": ("MegatronBert", WIDE),
    "rembert": ("RemBert", {**WIDE, "input_embedding_size": 16}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {**WIDE, "type_vocab_size": 1}),
    "xlm-roberta-xl": ("XLMRobertaXL", {**WIDE, "type_vocab_size": 1}),
    "roformer": ("RoFormer", {**WIDE, "embedding_size": 16}),
    "nomic-bert": ("NomicBert", WIDE),
    "gte": ("Gte", {**WIDE, "type_vocab_size": 2}),
    "jina-embeddings-v3": ("JinaEmbeddingsV3", WIDE),
}
WORDS = "the a cat dog sat on mat and ran to far hill good bad very film was not query : passage represent this".split()


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part of the network shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # a table of sines
                continue
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise + 1 if is_norm_weight else noise)


MakeModel = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    """save_model(model): its folder, once its weights are random."""

    def save(model: PreTrainedModel) -> Path:
        randomize(model)
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def make_model(save_model: Callable[[PreTrainedModel], Path]) -> MakeModel:
    """make_model(family, suffix, **config): a folder and the model that transformers saved there."""

    def make(family: str, suffix: str = "Model", **changes: object) -> tuple[Path, PreTrainedModel]:
        prefix, values = FAMILIES[family]
        if not hasattr(transformers, f"{prefix}{suffix}"):
            pytest.skip(f"transformers has no {prefix}{suffix}")
        config = getattr(transformers, f"{prefix}Config")(**{**values, **changes})
        model = getattr(transformers, f"{prefix}{suffix}")(config).eval()
        return save_model(model), model

    return make


@pytest.fixture(params=[ReferenceAttention, CpuAttention], ids=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    made: AttentionBackend = request.param()
    return made


MakeRunner = Callable[[Path], EncoderRunner]


@pytest.fixture
def make_runner(backend: AttentionBackend) -> MakeRunner:
    """make_runner(folder); packed weights go with the fast attention, plain ones with the reference."""
    packed = isinstance(backend, CpuAttention)
    return lambda folder: EncoderRunner(load_encode_network(folder, packed=packed), backend)


Run = Callable[..., list[NDArray[np.float32]]]


@pytest.fixture
def run(make_runner: MakeRunner) -> Run:
    """run(folder, texts, output): the arrays of one packed forward over all texts; any fault fails the test."""

    def run_folder(
        folder: Path,
        texts: Sequence[Sequence[int]],
        output: EncodeOutput = "token_embeddings",
        type_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[NDArray[np.float32]]:
        types = type_ids or [() for _ in texts]
        items = [EncodeItem(ids=ids, type_ids=kinds, output=output) for ids, kinds in zip(texts, types, strict=True)]
        results = make_runner(folder).run(items)
        faults = [result for result in results if isinstance(result, str)]
        assert not faults
        return [result for result in results if not isinstance(result, str)]

    return run_folder


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def texts() -> list[list[int]]:
    """Ids of texts of very different lengths, none of them special."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 90, (length,), generator=generator).tolist() for length in (5, 61, 1, 17, 2, 40, 17)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    """A word-piece tokenizer of 90 words and letters, with BERT's special tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(vocabulary[:90]))
    return BertTokenizerFast(vocab_file=str(path), model_max_length=64)
