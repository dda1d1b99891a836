"""An adapter that cannot be merged, or is not what it should be, is refused with the name of what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError, UnsupportedArchitectureError
from tests.model.adapters.conftest import Store, pair, parameters

QUERY = "model.layers.0.self_attn.q_proj"
NAMED = f"base_model.model.{QUERY}"


@pytest.mark.parametrize(
    "kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "IA3", "XLORA", "ADALORA", "LOHA", "OFT"]
)
def test_another_kind_of_adapter_is_refused_by_name(store: Store, kind: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"kind {kind} cannot be merged"):
        parameters(store(pair(QUERY, 8, 8), peft_type=kind))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "aLoRA"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"use_qalora": True}, "QALoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_a_variant_that_adds_otherwise_is_refused_by_name(store: Store, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=named):
        parameters(store(pair(QUERY, 8, 8), **settings))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": None}, "peft_type"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"r": 0}, "'r'"),
        ({"r": "two"}, "'r'"),
        ({"lora_alpha": []}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": -1e308}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 1e39}}, "q_proj"),
        ({"use_dora": 1}, "use_dora"),
        ({"rank_pattern": {"q_proj": -1}}, "q_proj"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
        ({"revision": 3}, "revision"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(store: Store, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named.replace("(", r"\(")):
        parameters(store(pair(QUERY, 8, 8), **settings))


def changed(change: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A sound adapter of one module with some tensors put in or (None) left out."""
    tensors = pair(QUERY, 8, 8) | change
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 8)}, "layers.7.*no place"),
        ({"base_model.model.model.layers.0.mlp.extra.lora_A.weight": torch.ones(2, 8)}, "mlp.extra.*no place"),
        ({"base_model.model.prompt_embeddings": torch.ones(2, 8)}, "prompt_embeddings.*no place"),
        ({f"{NAMED}.lora_B.weight": None}, "lora_A.weight' lacks its lora_B"),
        ({f"{NAMED}.lora_A.weight": None}, "lora_B.weight' lacks its lora_A"),
        ({f"{NAMED}.lora_A.weight": torch.ones(3, 8)}, r"lora_A.*shape \[3, 8\]; its rank should be 2"),
        ({f"{NAMED}.lora_B.weight": torch.ones(8, 3)}, r"lora_B.*shape \[8, 3\]; its rank should be 2"),
        ({f"{NAMED}.lora_A.weight": torch.ones(2, 8, 1, 1)}, "lora_A.*its rank should be"),
        ({f"{NAMED}.lora_B.weight": torch.ones(24, 2)}, r"makes \[24, 8\].*q_proj.weight' is \[8, 8\]"),
        ({f"{NAMED}.lora_A.weight": torch.ones(2, 8).int()}, "lora_A.*not stored as"),
        ({f"{NAMED}.lora_A.default.weight": torch.ones(2, 8)}, "mean the same"),
        ({f"{NAMED}.lora_magnitude_vector": torch.ones(8)}, "use_dora"),
        ({f"{NAMED}.lora_B.bias": torch.ones(8)}, "lora_B.bias.*no place"),
        ({f"{NAMED}.bias": torch.ones(8)}, "q_proj.bias.*no place"),
        ({"base_model.model.model.norm.weight": torch.ones(7)}, r"norm.weight' has shape \[7\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(store: Store, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parameters(store(changed(change)))
    assert caught.value.file == "adapter_model.safetensors"
    assert caught.value.tensor is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "lacks its lora_magnitude_vector"),
        ({f"{NAMED}.lora_magnitude_vector": torch.ones(7)}, r"shape \[7\]; its module has 8 outputs"),
    ],
)
def test_lengths_that_do_not_fit_are_named(store: Store, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parameters(store(changed(change), use_dora=True))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{", "adapter_model.safetensors"),
        ("adapter_config.json", b"{", "not valid JSON"),
        ("adapter_config.json", b"[]", "expected a JSON object"),
    ],
)
def test_a_broken_file_is_named(store: Store, name: str, data: bytes, message: str) -> None:
    folder = store(pair(QUERY, 8, 8))
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        parameters(folder)


@pytest.mark.parametrize("name", ["", "base_model.model.model.original_module.norm.weight"])
def test_an_adapter_that_changes_nothing_is_refused(store: Store, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"adapter/adapter_model\.safetensors holds no tensors"):
        parameters(store({name: torch.ones(1)} if name else {}))


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("base/model.safetensors", "base/model.safetensors"),
        ("base/tokenizer_config.json", "base/tokenizer_config.json"),
        ("base/generation_config.json", "base/generation_config.json"),
        ("adapter/generation_config.json", "adapter/generation_config.json"),
    ],
)
def test_an_error_names_the_users_files(store: Store, tmp_path: Path, broken: str, named: str) -> None:
    """It named a temporary folder, which was gone by then."""
    folder = store(pair(QUERY, 8, 8))
    (tmp_path / broken).write_bytes(b"{")
    with pytest.raises(CheckpointError) as caught:
        parameters(folder)
    assert "slimpajama-adapter" not in str(caught.value)
    assert str(tmp_path / named) in str(caught.value)
    assert caught.value.file == Path(broken).name


def test_a_pickle_is_not_read(store: Store) -> None:
    folder = store(pair(QUERY, 8, 8))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle"):
        parameters(folder)


def test_a_base_without_what_is_added_to_is_refused(store: Store, tmp_path: Path) -> None:
    folder = store(pair("bert.pooler.dense", 32, 32), base="three-classes")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "pooler.dense.weight" not in name}
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"adds to 'bert\.pooler\.dense\.weight', which the base does not have"):
        parameters(folder)


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [("lora_B", 15, r"lora_B.bias' cannot be added.*shape \[16\]"), ("lora_A", 16, "lora_A.bias' cannot be added")],
)
def test_a_bias_that_does_not_fit_is_named(store: Store, part: str, size: int, message: str) -> None:
    name = f"base_model.model.transformer.h.0.mlp.c_proj.{part}.bias"
    with pytest.raises(CheckpointError, match=message):
        parameters(store({name: torch.ones(size)}, base="gpt2"))
