"""Projections that are packed while a checkpoint is read: as packed afterwards, and no plain weight outlives it."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from model import compiled_layers
from model.checkpoint import load_network
from model.compiled_layers import CompiledLinear, Packing, Quantization, compile_layers
from model.decoder import Decoder
from model.layers import Linear
from model.ops import library

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101,
}  # fmt: skip
MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "with biases": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "experts": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
        )
    ),
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.bfloat16().save_pretrained(tmp_path)
    return tmp_path


def packed_tensors(network: nn.Module) -> dict[str, list[Tensor]]:
    return {name: module.tensors for name, module in network.named_modules() if isinstance(module, CompiledLinear)}


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_packed_as_it_is_read_a_network_is_as_packed_afterwards(
    folder: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    afterwards = load_network(folder)
    assert isinstance(afterwards, Decoder)
    compile_layers(afterwards, quantization, wide=afterwards.output)
    monkeypatch.setattr(compiled_layers, "SLICE", 32)  # several slices, the last of them not whole
    packing, before, plain_left = Packing(quantization), [], 0

    def finished(name: str, module: nn.Module) -> nn.Module:
        nonlocal plain_left
        if not isinstance(module, Linear):
            return module
        plain_left = max(plain_left, sum(weight() is not None for weight in before))
        if name != "output":  # whose weight may be the embedding's
            before.append(weakref.ref(module.weight))
        return packing.packed(module, wide=name == "output")

    as_read = load_network(folder, finished=finished)
    assert isinstance(as_read, Decoder)
    assert plain_left == 0
    compile_layers(as_read, quantization, wide=as_read.output)
    found, expected = packed_tensors(as_read), packed_tensors(afterwards)
    assert found.keys() == expected.keys()
    assert len(before) >= 2 * 4
    for name, tensors in found.items():
        assert all(map(torch.equal, tensors, expected[name])), name
