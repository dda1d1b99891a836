"""Every way a checkpoint can be broken or hostile is a CheckpointError that names the file and the tensor."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import load_network
from model.errors import CheckpointError, UnsupportedArchitectureError

Write = Callable[..., Path]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_network(folder)
    return caught.value


def test_a_missing_tensor_is_named(write: Write, tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    del tensors[name]
    error = refusal(write(tensors))
    assert error.tensor == name
    assert name in str(error)


def test_an_extra_tensor_is_named_with_its_file(write: Write, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(2)
    error = refusal(write(tensors))
    assert (error.file, error.tensor) == (SINGLE, "model.layers.2.mlp.up_proj.weight")


def test_a_renamed_tensor_is_missing_rather_than_guessed(write: Write, tensors: dict[str, Tensor]) -> None:
    tensors["model.normal.weight"] = tensors.pop("model.norm.weight")
    assert refusal(write(tensors)).tensor == "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (51, 32)),
        ("model.layers.0.self_attn.q_proj.weight", (24, 32)),
        ("model.layers.0.self_attn.v_proj.weight", (32, 32)),
        ("model.layers.1.mlp.up_proj.weight", (40, 31)),
        ("model.layers.1.mlp.down_proj.weight", (32, 40, 1)),
        ("model.norm.weight", ()),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    write: Write, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> None:
    expected = list(tensors[name].shape)
    tensors[name] = torch.ones(shape)
    error = refusal(write(tensors))
    assert (error.file, error.tensor) == (SINGLE, name)
    assert str(list(shape)) in str(error)
    assert str(expected) in str(error)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64])
def test_weights_of_another_type_are_refused(write: Write, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    assert refusal(write(tensors)).tensor == "model.norm.weight"


def test_the_same_tensor_twice_is_refused(write: Write, tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    error = refusal(write(tensors))
    assert "mean the same" in str(error)


@pytest.mark.parametrize("kept", [0, 5, 8, 300, -1])
def test_a_truncated_file_is_named(write: Write, tensors: dict[str, Tensor], kept: int) -> None:
    folder = write(tensors)
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:kept])
    assert refusal(folder).file == SINGLE


def test_a_truncated_shard_is_named(write: Write, tensors: dict[str, Tensor]) -> None:
    folder = write(tensors, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    assert refusal(folder).file == shard.name


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"not json",
        b'{"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 999999]}}',
        b'{"model.norm.weight": {"dtype": "F32", "shape": [-32], "data_offsets": [0, 128]}}',
        b'{"model.norm.weight": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 128]}}',
        b'{"model.norm.weight": {"dtype": "F99", "shape": [32], "data_offsets": [0, 128]}}',
    ],
)
def test_a_hostile_header_is_refused(write: Write, tensors: dict[str, Tensor], header: bytes) -> None:
    folder = write(tensors)
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 128)
    refusal(folder)


def test_a_header_that_claims_to_be_enormous_is_refused(write: Write, tensors: dict[str, Tensor]) -> None:
    folder = write(tensors)
    (folder / SINGLE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert refusal(folder).file == SINGLE


class Bomb:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_opened_whatever_it_is_called(
    write: Write, tensors: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    folder = write(tensors)
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    error = refusal(folder)
    assert error.file == name
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_alone_get_the_advice_to_convert_them(write: Write, tensors: dict[str, Tensor]) -> None:
    folder = write(tensors)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert "convert it to safetensors" in str(refusal(folder))


def test_a_folder_without_weights_says_so(write: Write, tensors: dict[str, Tensor]) -> None:
    folder = write(tensors)
    (folder / SINGLE).unlink()
    assert "neither model.safetensors nor" in str(refusal(folder))


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "shards/model.safetensors",
        "..\\secret.safetensors/../x.safetensors",
        "model.bin",
        "",
        ".",
        "..",
        7,
        None,
    ],
)
def test_an_index_cannot_point_out_of_its_folder(
    write: Write, tensors: dict[str, Tensor], tmp_path: Path, file: Any
) -> None:
    folder = write(tensors, shards=2)
    (tmp_path / "secret.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    error = refusal(folder)
    assert (error.file, error.tensor) == (INDEX, "model.norm.weight")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 100_000, "\xff"])
def test_a_nonsense_index_is_named(write: Write, tensors: dict[str, Tensor], text: str) -> None:
    folder = write(tensors, shards=2)
    (folder / INDEX).write_text(text, encoding="latin-1")
    assert refusal(folder).file == INDEX


def test_an_index_that_names_an_absent_shard_is_refused(write: Write, tensors: dict[str, Tensor]) -> None:
    folder = write(tensors, shards=2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert refusal(folder).file == "model-00001-of-00002.safetensors"


def test_an_index_that_lies_about_a_shard_is_refused(write: Write, tensors: dict[str, Tensor]) -> None:
    folder = write(tensors, shards=2)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    true = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = files[1 - files.index(true)]
    (folder / INDEX).write_text(json.dumps(index))
    assert refusal(folder).tensor == "model.norm.weight"


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": None},
        {"hidden_size": -1},
        {"num_hidden_layers": 1 << 40},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"hidden_act": "mystery"},
        {"rms_norm_eps": "small"},
        {"tie_word_embeddings": "yes"},
        {"architectures": "LlamaForCausalLM"},
    ],
)
def test_a_wrong_config_names_its_file(write: Write, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    assert refusal(write(tensors, **config)).file == "config.json"


def test_an_unknown_architecture_is_answered_with_the_known_ones(write: Write, tensors: dict[str, Tensor]) -> None:
    error = refusal(write(tensors, architectures=["MambaForCausalLM"]))
    assert isinstance(error, UnsupportedArchitectureError)
    assert "MambaForCausalLM" in str(error)
    assert "LlamaForCausalLM" in str(error)


def test_a_folder_without_config_or_no_folder_at_all_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).file == "config.json"
    assert "not a folder" in str(refusal(tmp_path / "none"))
