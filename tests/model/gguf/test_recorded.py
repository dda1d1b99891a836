"""Files of llama.cpp's converter are read as what they were made from: numbers, networks, tokenizers."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.decoder import Decoder
from model.description import describe
from model.gguf.blocks import FORMS
from model.gguf.container import GgufFile
from model.gguf.facts import Facts
from model.gguf.families import read_config
from model.gguf.folder import unpacked
from model.gguf.kinds import READ
from model.gguf.tensors import GgufTensors
from model.gguf.vocabularies import write_tokenizer
from model.tokenizer import Tokenizer
from tests.model.gguf.conftest import RECORDED, Expected, Unzip

IDS = [3, 17, 5, 24, 30, 12, 9, 31, 2, 28, 30, 7]
NETWORKS = (
    "llama",
    "llama-q8",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "gpt2",
    "mixtral",
    "qwen2moe",
    "qwen3moe-q8",
    "olmoe",
    "bpe-smollm",
    "bert",
    "smollm3",
    "granite",
    "arcee",
    "seed_oss",
    "ernie4_5",
    "glm4",
    "exaone4",
    "olmo",
    "olmo3",
    "starcoder2",
    "stablelm",
    "phi",
    "cohere",
    "cohere2",
    "cohere-plus",
    "nemotron",
    "gpt_neox",
    "gpt_bigcode",
    "bloom",
    "mpt",
    "nomic-bert",
)
VOCABULARIES = (
    "bpe-smollm",
    "bpe-gpt-2",
    "bpe-qwen2",
    "bpe-llama",
    "bpe-glm4",
    "bpe-seed",
    "bpe-bloom",
    "spm-llama",
    "spm-gemma2",
    "bert",
    "nomic-bert",
)


def output(network: torch.nn.Module) -> Tensor:
    """Logits of a decoder, states of an encoder: [T, V] or [T, E]."""
    layout = PackedLayout(starts=torch.tensor([0, len(IDS)], dtype=torch.int32), max_len=len(IDS))
    attend = PackedAttend(layout, ReferenceAttention())
    ids, positions = torch.tensor(IDS), torch.arange(len(IDS))
    with torch.inference_mode():
        if isinstance(network, Decoder):
            return network.logits(network(ids, positions, attend))
        found: Tensor = network(ids, torch.zeros_like(ids), positions, attend)
        return found


@pytest.fixture
def folder(request: pytest.FixtureRequest, unzip: Unzip) -> Iterator[Path]:
    with unpacked(unzip(request.param)) as found:
        yield found


def test_everything_that_was_recorded_is_tested() -> None:
    assert {path.name.partition(".")[0] for path in RECORDED.iterdir()} == {
        *NETWORKS,
        *VOCABULARIES,
        "types",
        "expected",
    }


@pytest.mark.parametrize("kind", READ)
def test_values_of_each_type_are_exactly_those_of_the_gguf_package(kind: str, unzip: Unzip, expected: Expected) -> None:
    assert set(FORMS) == {name for name in READ if name not in ("F32", "F16", "BF16")}
    path = unzip("types")
    with GgufTensors(path.parent) as stored:
        found = stored.read(stored.tensors[kind]).float()
    assert torch.equal(found, expected.tensors[f"types.{kind}"])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_transformers_computes_of_the_original(
    name: str, unzip: Unzip, expected: Expected
) -> None:
    path = unzip(name)
    with GgufFile(path) as file:
        (path.parent / "config.json").write_text(json.dumps(read_config(Facts([file]))))
    network = load_network(path.parent, dtype=torch.float32)
    torch.testing.assert_close(output(network)[-2:], expected.tensors[f"{name}.output"], rtol=1e-4, atol=1e-4)


def tokenizer_of(path: Path) -> Tokenizer:
    with GgufFile(path) as file:
        facts = Facts([file])
        (path.parent / "config.json").write_text(json.dumps({"model_type": facts.architecture.replace("-", "_")}))
        (path.parent / "tokenizer_config.json").write_text(json.dumps(write_tokenizer(facts, path.parent)))
    return Tokenizer.load(path.parent)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_tokenizer_gives_the_ids_of_the_original(name: str, unzip: Unzip, expected: Expected) -> None:
    tokenizer = tokenizer_of(unzip(name))
    assert {text: tokenizer.encode(text) for text in expected.ids[name]} == expected.ids[name]


@pytest.mark.parametrize("name", [name for name in VOCABULARIES if "bert" not in name])
def test_what_was_encoded_is_decoded_again(name: str, unzip: Unzip, expected: Expected) -> None:
    tokenizer = tokenizer_of(unzip(name))
    for text, ids in expected.ids[name].items():
        if "<" not in text and "\u0301" not in text:
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("folder", ["bert", "nomic-bert"], indirect=True)
def test_an_embedder_pools_as_its_file_says(folder: Path) -> None:
    description = describe(folder)
    assert description.embedding is not None
    assert [type(step).__name__ for step in description.embedding.steps] == ["Pooling", "Normalize"]
    assert description.embedding.steps[0].modes == ("cls",)  # type: ignore[union-attr]
    assert "embed" in description.tasks


@pytest.mark.parametrize("folder", ["bpe-smollm"], indirect=True)
def test_a_language_model_stops_and_chats_as_its_file_says(folder: Path) -> None:
    description = describe(folder)
    assert description.eos_ids == (2, 0)  # <|im_end|>, and <|endoftext|>, which is an end by its name
    assert {"generate", "chat"} <= set(description.tasks)


def test_a_large_tensor_is_read_in_parts_as_if_whole(unzip: Unzip, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unzip("types")
    with GgufTensors(path.parent) as stored, GgufFile(path) as file:
        whole = {name: stored.read(tensor) for name, tensor in stored.tensors.items()}
        monkeypatch.setattr("model.gguf.tensors.PART_BYTES", 220)
        for name, tensor in stored.tensors.items():
            assert torch.equal(stored.read(tensor), whole[name])
        assert max(info.num_bytes for info in file.tensors.values()) > 220
        assert np.isfinite(whole["Q4_K"].numpy()).all()
