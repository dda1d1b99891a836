"""What is read of an adapter's folder is what a checkpoint has that was merged by hand, whatever the family."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from model.adapters.folder import joined
from model.adapters.merging import open_weights
from model.architectures.mapping import WeightMap
from model.description import read_architecture
from tests.model.adapters.conftest import Store, logits, pair, parameters
from tests.model.quantized.conftest import RECORDED as QUANTIZED
from tests.model.quantized.conftest import read_recording

FAMILIES = {
    "llama": (AutoModelForCausalLM, ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")),
    "gpt2": (AutoModelForCausalLM, ("c_attn", "c_proj", "c_fc")),
    "three-classes": (AutoModelForSequenceClassification, ("query", "value", "dense")),
    "t5": (AutoModelForSeq2SeqLM, ("q", "v", "o", "wi")),
}
ATTENTION = "model.layers.0.self_attn"


@torch.no_grad()
def merge_by_hand(model: PreTrainedModel, targets: tuple[str, ...], dora: bool, scale: float) -> dict[str, Tensor]:
    """Merges random adapters into the model's own modules; returns them as PEFT would save them."""
    saved: dict[str, Tensor] = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if name.rpartition(".")[2] not in targets or not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # [out, in]
        parts = pair(name, *weight.shape, seed=seed)
        a, b = parts.values()
        merged = weight + scale * (b @ a)
        if dora:
            lengths = torch.rand(weight.shape[0], generator=torch.Generator().manual_seed(seed)) + 0.5
            parts[f"base_model.model.{name}.lora_magnitude_vector"] = lengths
            merged = lengths[:, None] * merged / merged.norm(dim=1, keepdim=True)
        module.weight.copy_(merged.T if isinstance(module, Conv1D) else merged)
        saved |= parts
    assert len(saved) > 6
    return saved


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_its_merged_checkpoint(store: Store, tmp_path: Path, family: str, kind: str) -> None:
    auto, targets = FAMILIES[family]
    model = auto.from_pretrained(make(family, tmp_path / "base"), dtype=torch.float32)
    scale = 3 / 2**0.5 if kind == "rslora" else 3 / 2
    tensors = merge_by_hand(model, targets, kind == "dora", scale)
    model.save_pretrained(tmp_path / "merged")
    folder = store(tensors, fan_in_fan_out=family == "gpt2", use_rslora=kind == "rslora", use_dora=kind == "dora")
    expected, found = parameters(tmp_path / "merged"), parameters(folder)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(folder), logits(tmp_path / "merged"), rtol=1e-4, atol=1e-4)


def test_the_sum_is_made_before_it_is_rounded(store: Store, tmp_path: Path) -> None:
    """In bfloat16 B A was rounded, and so was the sum."""
    base = make("llama", tmp_path / "base")
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(narrow, base / "model.safetensors")
    parts = pair(f"{ATTENTION}.q_proj", 8, 8)
    a, b = parts.values()
    found = parameters(store({name: tensor.bfloat16() for name, tensor in parts.items()}))
    exact = narrow[f"{ATTENTION}.q_proj.weight"].double() + 1.5 * b.bfloat16().double() @ a.bfloat16().double()
    query = found["layers.0.attention.query_key_value.weight"][:8]
    assert query.dtype == torch.bfloat16
    assert torch.equal(query, exact.float().bfloat16())


def test_the_dtype_is_the_bases(store: Store) -> None:
    """Embeddings that an adapter has whole, in 16 bits, made the whole network one of 16 bits."""
    name = "base_model.model.model.embed_tokens.weight"
    found = parameters(store({name: torch.zeros(170, 8, dtype=torch.bfloat16)}, base="llama-tied"))
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}
    assert found["output.weight"].shape == (170, 8)


def test_a_tensor_is_merged_once_however_often_it_is_read(store: Store, tmp_path: Path) -> None:
    """What is read may be the file's own mapping: a sum made in place was added to again."""
    make("llama-tied", tmp_path / "base")
    embedding = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    module, (num_tokens, width) = "base_model.model.model.embed_tokens", embedding.shape
    a, b = torch.randn(2, num_tokens), torch.randn(width, 2)
    tensors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    folder = store(tensors, ensure_weight_tying=True)
    with joined(folder, tmp_path / "base") as both, open_weights(both, _llama_map(both)) as stored:
        header = stored.tensors["model.embed_tokens.weight"]
        first, second = stored.read(header), stored.read(header)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, embedding + 1.5 * (b @ a).T, rtol=1e-6, atol=1e-6)
    found = parameters(folder)
    assert torch.equal(found["output.weight"], found["embedding.weight"])


@pytest.mark.parametrize("ties", [True, False])
def test_a_tie_that_is_kept_holds_for_a_base_that_stores_both_names(store: Store, tmp_path: Path, ties: bool) -> None:
    weights = make("llama-tied", tmp_path / "base") / "model.safetensors"
    tensors = load_file(weights)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, weights)
    name = "base_model.model.model.embed_tokens.weight"
    found = parameters(store({name: embedding + 1}, ensure_weight_tying=ties))
    assert torch.equal(found["embedding.weight"], embedding + 1)
    assert torch.equal(found["output.weight"], embedding + 1 if ties else embedding)


def _llama_map(folder: Path) -> WeightMap:
    raw, _, architecture = read_architecture(folder)
    return architecture.weights(architecture.configure(raw, None))


@pytest.mark.parametrize("path", QUANTIZED, ids=[path.stem for path in QUANTIZED])
def test_a_quantized_base_is_made_plain_first(store: Store, tmp_path: Path, path: Path) -> None:
    quantized = read_recording(path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(quantized.config))
    save_file(quantized.tensors, base / "model.safetensors")
    parts = pair(f"{ATTENTION}.q_proj", 64, 32)
    a, b = parts.values()
    name = "layers.0.attention.query_key_value.weight"
    before, found = (parameters(folder, dtype=torch.float32)[name] for folder in (base, store(parts)))
    torch.testing.assert_close(found[:64], before[:64] + 1.5 * b @ a, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[64:], before[64:])


def test_a_base_without_the_prefix_of_its_family_is_found(store: Store, tmp_path: Path) -> None:
    """The bare network was saved: the adapter's `transformer.h.0` is its `h.0`."""
    base = make("gpt2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, base / "model.safetensors"
    )
    parts = pair("transformer.h.0.mlp.c_proj", 16, 64)
    a, b = parts.values()
    found = parameters(store(parts, fan_in_fan_out=True))["layers.0.mlp.down.weight"]
    expected = tensors["transformer.h.0.mlp.c_proj.weight"].T + 1.5 * b @ a
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_rank_has_its_part_of_the_merged_weights(store: Store, tmp_path: Path) -> None:
    base = make("gpt2", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    folder = store(merge_by_hand(model, ("c_attn", "c_proj"), False, 1.5), fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "merged")
    for rank in (0, 1):
        part = {"rank": rank, "num_ranks": 2}
        expected, found = parameters(tmp_path / "merged", **part), parameters(folder, **part)
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-6)
