"""A decoder divided over ranks says what the whole one says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.compiled_layers import CompiledSparseMLP, compile_layers
from model.decoder import Decoder
from model.errors import CheckpointError
from model.ops import library
from model.parallel import Division

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "granite": lambda: of_kind("granite", residual_multiplier=0.4, mlp_bias=True, attention_bias=True),
    "cohere": lambda: of_kind("cohere", use_qk_norm=True),
    "stablelm": lambda: of_kind("stablelm", qk_layernorm=True, use_qkv_bias=True),
    "apertus": lambda: of_kind("apertus"),
    "falcon": lambda: of_kind("falcon", new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "bloom": lambda: of_kind("bloom", n_head=4, n_layer=2),
    "codegen": lambda: of_kind("codegen", n_embd=32, n_head=4, n_layer=2, n_positions=64, rotary_dim=4),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "shared_expert_intermediate_size": 6,
    "mlp_only_layers": [0],
}  # fmt: skip
RANK = Path(__file__).parent / "rank.py"


def of_kind(model_type: str, **more: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | more))


@pytest.fixture
def make_folder(tmp_path):
    def make(name: str) -> Path:
        torch.manual_seed(4)
        model = MODELS[name]()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(("bias", "norm.weight", ".alpha_p")) or ".norms." in key:
                    parameter.normal_(0, 0.5)  # a bias added twice is to be seen, and a norm of other heads
        folder = tmp_path / name
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_give_the_logits_of_one(name, make_folder, tmp_path):
    folder = make_folder(name)
    ids = torch.arange(20) * 13 % 97
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, str(RANK), str(folder), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(RANK.parents[3])}
    ranks = [subprocess.Popen([*command, str(rank), "2"], env=environment) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    network = load_network(folder)
    layout = PackedLayout(starts=torch.tensor([0, 20], dtype=torch.int32), max_len=20)
    with torch.inference_mode():
        expected = network.logits(network(ids, torch.arange(20), PackedAttend(layout, ReferenceAttention())))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
def test_the_ranks_parts_are_the_whole(name, make_folder):
    folder = make_folder(name)
    whole = load_network(folder)
    assert isinstance(whole, Decoder)
    halves = [Division(whole.config, rank, 2) for rank in range(2)]
    for name, parameter in whole.named_parameters():
        parts = [division.part(name, parameter) for division in halves]
        divided = any(piece.shape != parameter.shape for piece in parts)
        numbers = torch.cat([piece.flatten() for piece in parts]) if divided else parts[0].flatten()
        assert torch.equal(numbers.sort().values, parameter.flatten().sort().values)
        assert divided == any(f".{key}." in name and not name.endswith(("output.bias", "down.bias")) for key in
                              ("query_key_value", "gate_up", "attention.output", "down"))  # fmt: skip


@pytest.mark.parametrize(("size", "what"), [(3, "4 query heads"), (4, "2 key/value heads")])
def test_what_cannot_be_divided_says_so(size, what, make_folder):
    with pytest.raises(CheckpointError, match=what):
        load_network(make_folder("llama"), rank=0, num_ranks=size)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"moe_intermediate_size": 9}, "9 inner values of an expert"),
     ({"shared_expert_intermediate_size": 7}, "7 inner values of the shared expert")],
)  # fmt: skip
def test_experts_that_cannot_be_divided_say_so(changes, what, tmp_path):
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS | changes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=what):
        load_network(tmp_path, rank=0, num_ranks=2)


@pytest.mark.skipif(not library.LOADED, reason="the operators are not compiled here")
@pytest.mark.parametrize(("size", "joins"), [(64, True), (96, False)])
def test_experts_have_their_operator_if_a_ranks_part_of_them_is_of_its_sizes(size, joins, tmp_path):
    """Whole sizes were asked, so that a part that is no multiple of 32 was given to it, which it refuses."""
    changes = {"hidden_size": 64, "moe_intermediate_size": size, "shared_expert_intermediate_size": 128}
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES | EXPERTS | changes)).bfloat16().save_pretrained(tmp_path)
    network = load_network(tmp_path, rank=1, num_ranks=2)
    compile_layers(network, "int8", wide=network.output)
    assert isinstance(network.layers[1].mlp.mlp, CompiledSparseMLP) == joins
