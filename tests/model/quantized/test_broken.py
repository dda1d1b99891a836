"""Every way a quantized weight can be broken, or be of another kind, is a CheckpointError that says which and where."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.raw import RawConfig
from model.checkpoint import load_network
from model.errors import CheckpointError, UnsupportedArchitectureError
from model.quantized.config import METHODS, CompressedTensors, read_quantization
from tests.model.quantized.conftest import RECORDED, Recording, Store, read_recording, read_weight

LAYER = "model.layers.0.mlp.down_proj"
BY_NAME = {path.stem: path for path in RECORDED}
STATE = "weight.quant_state.bitsandbytes__nf4"
COMPRESSED_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}


def refusal(store: Store, recording: Recording, **quantization: Any) -> CheckpointError:
    config = recording.config | {"quantization_config": recording.quantization | quantization}
    with pytest.raises(CheckpointError) as caught:
        load_network(store(recording.tensors, config=config))
    return caught.value


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("fp8-blocks", "weight"),
        ("fp8-blocks", "weight_scale_inv"),
        ("compressed-int8-channel", "weight"),
        ("compressed-int8-channel", "weight_scale"),
        ("compressed-int8-tensor-zeros", "weight_zero_point"),
        ("compressed-packed4-group-zeros", "weight_packed"),
        ("compressed-packed4-group-zeros", "weight_scale"),
        ("compressed-packed4-group-zeros", "weight_shape"),
        ("compressed-packed4-group-zeros", "weight_zero_point"),
        ("gptq-4", "qweight"),
        ("gptq-4", "qzeros"),
        ("gptq-4", "scales"),
        ("awq", "qweight"),
        ("awq", "qzeros"),
        ("awq", "scales"),
        ("bitsandbytes-int8", "weight"),
        ("bitsandbytes-int8", "SCB"),
        ("bitsandbytes-nf4", "weight"),
        ("bitsandbytes-nf4", "weight.absmax"),
        ("bitsandbytes-nf4", "weight.quant_map"),
        ("bitsandbytes-nf4", STATE),
        ("bitsandbytes-nf4-nested", "weight.nested_absmax"),
        ("bitsandbytes-nf4-nested", "weight.nested_quant_map"),
    ],
)
def test_a_missing_part_is_named(store: Store, case: str, part: str) -> None:
    recording = read_recording(BY_NAME[case])
    del recording.tensors[f"{LAYER}.{part}"]
    error = refusal(store, recording)
    assert (error.file, error.tensor) == ("model.safetensors", f"{LAYER}.{part}")
    assert "is missing" in str(error)


@pytest.mark.parametrize(
    ("case", "part", "changed"),
    [
        ("fp8-blocks", "weight", torch.zeros(32, 64, 1).to(torch.float8_e4m3fn)),
        ("fp8-blocks", "weight", torch.zeros(32, 64, dtype=torch.int8)),
        ("fp8-blocks", "weight_scale_inv", torch.ones(2, 3)),
        ("fp8-blocks", "weight_scale_inv", torch.ones(2, 4, dtype=torch.int32)),
        ("compressed-fp8-channel", "weight_scale", torch.ones(1, 32)),
        ("compressed-int8-channel", "weight", torch.zeros(32, 64).to(torch.float8_e4m3fn)),
        ("compressed-packed4-group-zeros", "weight_packed", torch.zeros(32, 9, dtype=torch.int32)),
        ("compressed-packed4-group-zeros", "weight_scale", torch.ones(32, 5)),
        ("compressed-packed4-group-zeros", "weight_shape", torch.tensor([-32, 64])),
        ("compressed-packed4-group-zeros", "weight_shape", torch.tensor([32, 64, 1])),
        ("compressed-packed4-group-zeros", "weight_zero_point", torch.zeros(32, 4, dtype=torch.int32)),
        ("gptq-4", "qweight", torch.zeros(8, dtype=torch.int32)),
        ("gptq-4", "qweight", torch.zeros(8, 32, dtype=torch.int64)),
        ("gptq-4", "qzeros", torch.zeros(4, 5, dtype=torch.int32)),
        ("gptq-4", "scales", torch.ones(3, 32)),
        ("gptq-4", "g_idx", torch.zeros(65, dtype=torch.int32)),
        ("gptq-4", "g_idx", torch.full((64,), 4, dtype=torch.int32)),
        ("gptq-4", "g_idx", torch.full((64,), -2, dtype=torch.int32)),
        ("awq", "qzeros", torch.zeros(4, 3, dtype=torch.int32)),
        ("awq", "scales", torch.ones(32, 4)),
        ("bitsandbytes-int8", "SCB", torch.ones(64)),
        ("bitsandbytes-nf4", "weight", torch.zeros(1000, 1, dtype=torch.uint8)),
        ("bitsandbytes-nf4", "weight.absmax", torch.ones(31)),
        ("bitsandbytes-nf4", "weight.quant_map", torch.ones(17)),
        ("bitsandbytes-nf4", STATE, torch.zeros(5, dtype=torch.uint8)),
        ("bitsandbytes-nf4-nested", "weight.nested_absmax", torch.ones(2)),
    ],
)
def test_a_misshapen_part_is_named(store: Store, case: str, part: str, changed: Tensor) -> None:
    recording = read_recording(BY_NAME[case])
    assert f"{LAYER}.{part}" in recording.tensors
    recording.tensors[f"{LAYER}.{part}"] = changed
    error = refusal(store, recording)
    assert error.file == "model.safetensors"
    assert LAYER in str(error.tensor)


def test_a_quantized_weight_of_another_size_than_the_network_is_named(store: Store) -> None:
    recording = read_recording(BY_NAME["gptq-4"])
    for part in ("qweight", "qzeros", "scales"):
        tensor = recording.tensors[f"{LAYER}.{part}"]
        recording.tensors[f"{LAYER}.{part}"] = torch.cat((tensor, tensor), 1)
    error = refusal(store, recording)
    assert error.tensor == f"{LAYER}.weight"
    assert "has shape [64, 64]; config.json asks for [32, 64]" in str(error)


def test_an_extra_quantized_weight_is_named(store: Store) -> None:
    recording = read_recording(BY_NAME["awq"])
    for part in ("qweight", "qzeros", "scales"):
        recording.tensors[f"model.layers.7.up.{part}"] = recording.tensors[f"{LAYER}.{part}"].clone()
    assert refusal(store, recording).tensor == "model.layers.7.up.weight"


def test_a_weight_that_is_there_plain_too_is_refused(store: Store) -> None:
    recording = read_recording(BY_NAME["gptq-4"])
    recording.tensors[f"{LAYER}.weight"] = torch.ones(32, 64)
    error = refusal(store, recording)
    assert error.tensor == f"{LAYER}.weight"
    assert "mean the same" in str(error)


def test_a_bias_of_zeros_beside_a_quantized_weight_adds_nothing_and_another_is_left_over(store: Store) -> None:
    """AutoGPTQ wrote biases for projections that have none."""
    recording = read_recording(BY_NAME["gptq-4"])
    recording.tensors[f"{LAYER}.bias"] = torch.zeros(32)
    load_network(store(recording.tensors, config=recording.config, folder="zeros"))
    recording.tensors[f"{LAYER}.bias"][3] = 0.5
    assert refusal(store, recording).tensor == f"{LAYER}.bias"


def test_a_module_that_the_config_leaves_out_must_not_be_stored_quantized(store: Store) -> None:
    recording = read_recording(BY_NAME["compressed-int8-channel"])
    error = refusal(store, recording, ignore=["lm_head", f"re:.*{LAYER}"])
    assert LAYER in str(error.tensor)
    assert "names no scheme for its module" in str(error)


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        "{",
        "{}",
        '{"shape": [32, 64]}',
        '{"shape": [Infinity, 64], "blocksize": 64}',
        '{"shape": [32, -64], "blocksize": 64}',
        '{"shape": [2048], "blocksize": 64}',
        '{"shape": [32, 64], "blocksize": 0}',
        "[" * 100_000,
    ],
)
def test_a_hostile_state_is_refused(store: Store, state: str) -> None:
    recording = read_recording(BY_NAME["bitsandbytes-nf4"])
    recording.tensors[f"{LAYER}.{STATE}"] = torch.tensor(list(state.encode()), dtype=torch.uint8)
    refusal(store, recording)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gguf"}, "gguf"),
        ({"bits": 4}, "an unknown method"),
        ({"quant_method": "gptq", "bits": 3}, "gptq, 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq in the format marlin"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "gptq in the format marlin"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "other settings for some modules"),
        ({"quant_method": "awq", "bits": 8}, "awq, 8 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq in the format gemv"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "awq in the format llm-awq"),
        ({"config_groups": {"a": COMPRESSED_GROUP}, "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (
            {"config_groups": {"a": {"targets": [], "weights": {"type": "float"}}}, "format": "pack-quantized"},
            "of floats",
        ),
        ({"config_groups": {}, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"config_groups": {}, "transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
    ],
)
def test_what_is_not_read_is_named_beside_what_is(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        read_quantization(RawConfig({"quantization_config": config}))
    assert named in str(caught.value)
    assert all(method in str(caught.value) for method in METHODS)
    assert caught.value.file == "config.json"


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": 8},
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 0},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, float("inf")]},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"W8A8": ["Linear"]}},
        {"config_groups": {"a": COMPRESSED_GROUP}, "format": "int-quantized", "ignore": ["re:("]},
        {
            "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "group"}}},
            "format": "int-quantized",
        },
    ],
    ids=json.dumps,
)
def test_a_config_that_makes_no_sense_names_its_file(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_quantization(RawConfig({"quantization_config": config}))
    assert caught.value.file == "config.json"
    assert not isinstance(caught.value, UnsupportedArchitectureError)


def test_a_scheme_of_one_module_is_not_that_of_the_others() -> None:
    named = {"group_0": COMPRESSED_GROUP | {"targets": ["lm_head", "re:.*down"]}}
    config = {"quantization_config": {"config_groups": named, "format": "int-quantized"}}
    quantization = read_quantization(RawConfig(config))
    assert isinstance(quantization, CompressedTensors)
    assert quantization.scheme("lm_head") is quantization.scheme("layers.0.down") is quantization.schemes[0]
    assert quantization.scheme("layers.0.up") is None


def test_the_older_key_and_methods_without_a_name_are_known(store: Store) -> None:
    group = {"group_0": COMPRESSED_GROUP}
    tensors = {"m.weight": torch.full((2, 3), 4, dtype=torch.int8), "m.weight_scale": torch.full((2, 1), 0.5)}
    folder = store(tensors, config={"compression_config": {"config_groups": group, "format": "int-quantized"}})
    assert read_weight(folder).tolist() == [[2.0] * 3] * 2
    tensors = {"m.weight": torch.full((2, 3), 127, dtype=torch.int8), "m.SCB": torch.full((2,), 0.5)}
    assert read_weight(store(tensors, folder="8", load_in_8bit=True)).tolist() == [[0.5] * 3] * 2
