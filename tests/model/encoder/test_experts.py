"""Mixtures of experts that make vectors: their experts are chosen as where the same network generates."""

from pathlib import Path

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeModel

from model.compiled_layers import CompiledSparseMLP, Quantization
from model.encode_network import load_encode_network
from model.ops import library

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 101, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_what_chooses_experts_stays_in_float32(quantization: Quantization, tmp_path: Path) -> None:
    """It was rounded to the network's 16 bits, and in 8 bits refused by the operator."""
    if quantization != "none" and not library.LOADED:
        pytest.skip("the operators are not compiled here")
    torch.manual_seed(8)
    model = Glm4MoeModel(Glm4MoeConfig(**SIZES))
    layer = model.layers[1]
    bias = layer.mlp.gate.e_score_correction_bias.normal_().clone()
    model.bfloat16()
    layer.mlp.gate.e_score_correction_bias = bias
    model.save_pretrained(tmp_path)
    network = load_encode_network(tmp_path, dtype=torch.bfloat16, quantization=quantization)
    mlp = network.get_submodule("network.layers.1.mlp")
    assert isinstance(mlp, CompiledSparseMLP) == (quantization != "none")
    assert torch.equal(mlp.selection_bias, bias)
    assert not torch.equal(bias, bias.bfloat16().float())
