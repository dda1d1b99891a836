"""How its weights are stored does not matter to a family: any of them, fused or not, reads quantized ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from model.checkpoint import load_network
from model.encode_network import load_encode_network
from tests.model.quantized.conftest import Store

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "phi3": (AutoModelForCausalLM, {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt_neox": (AutoModelForCausalLM, SIZES),
    "glm4": (AutoModelForCausalLM, {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}),
    "codegen": (AutoModelForCausalLM, {"vocab_size": 90, "n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}),
    "falcon": (AutoModelForCausalLM, {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen3": (AutoModelForCausalLM, {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "qwen3_moe": (AutoModelForCausalLM, {**SIZES, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral": (AutoModelForCausalLM, {**SIZES, **EXPERTS, "num_local_experts": 4}),
    "bert": (AutoModelForSequenceClassification, SIZES),
    "distilbert": (AutoModelForSequenceClassification, {"vocab_size": 90, "dim": 32, "n_heads": 4, "n_layers": 2}),
    "t5": (AutoModelForSeq2SeqLM, {"vocab_size": 90, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4}),
    "bart": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 90, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64},
    ),
}
NOT_PROJECTIONS = ("embed", "shared", "relative_attention_bias", "lm_head", "classifier")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_quantized_weights_as_those_that_they_stand_for(
    store: Store, tmp_path: Path, family: str
) -> None:
    auto, sizes = FAMILIES[family]
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved").to_dict()
    plain = load_file(tmp_path / "saved" / "model.safetensors")
    quantized = dict(plain)
    for name, tensor in plain.items():
        if tensor.dim() == 2 and name.endswith(".weight") and not any(part in name for part in NOT_PROJECTIONS):
            scales = tensor.abs().amax(1, keepdim=True) / 448
            quantized[name] = (tensor / scales).to(torch.float8_e4m3fn)
            quantized[f"{name}_scale"] = scales
            plain[name] = quantized[name].float() * scales
    assert len(quantized) > len(plain) + 6
    load = load_encode_network if auto is AutoModelForSequenceClassification else load_network
    expected = dict(load(store(plain, config=config, folder="plain")).named_parameters())
    found = dict(load(store(quantized, config=config, quant_method="fp8")).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
