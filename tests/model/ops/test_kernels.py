"""Every compiled operator against float64, and the networks that run on them against the plain ones."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from model.checkpoint import load_network
from model.compiled_layers import CompiledLinear, Int4Linear, Int8Linear, Quantization, compile_layers
from model.errors import CheckpointError
from model.layers import Linear
from model.ops import library

pytestmark = [
    pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)"),
    pytest.mark.usefixtures("instructions"),
]


def random_bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_rms_norm_adds_the_residual_and_norms() -> None:
    x, residual, weight = random_bf16(9, 70), random_bf16(9, 70, seed=1), random_bf16(70, seed=2)
    expected_sum = x + residual
    found = torch.ops.slimpajama.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(x, expected_sum)
    wide = expected_sum.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative_error(found, expected) < 0.005


@pytest.mark.parametrize("size", [33, 48])
def test_silu_mul_is_the_gated_product(size: int) -> None:
    gate_up = random_bf16(5, 2 * size)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert relative_error(torch.ops.slimpajama.silu_mul(gate_up), F.silu(gate) * up) < 0.005


@pytest.mark.parametrize("size", [64, 32])
def test_rotate_turns_pairs_of_halves_in_place(size: int) -> None:
    fused = random_bf16(6, 5, 64)
    angles = torch.rand(6, size // 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    first, second = fused[:, :3, : size // 2].double(), fused[:, :3, size // 2 : size].double()
    c, s = cos.double()[:, None], sin.double()[:, None]
    expected = torch.cat((first * c - second * s, second * c + first * s, fused[:, :3, size:].double()), dim=-1)
    kept = fused[:, 3:].clone()
    torch.ops.slimpajama.rotate(fused[:, :3], torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    assert relative_error(fused[:, :3], expected) < 0.005
    assert torch.equal(fused[:, 3:], kept)


@pytest.mark.parametrize(("block_size", "size"), [(16, 32), (48, 64), (8, 32), (16, 24)])
def test_store_puts_each_token_into_its_slot(block_size: int, size: int) -> None:
    fused = random_bf16(3, 6, size)
    shape = (4, block_size, 2, size)
    keys, values = torch.zeros(shape).bfloat16(), torch.zeros(shape).bfloat16()
    slots = torch.tensor([4 * block_size - 1, 0, 17])
    torch.ops.slimpajama.store(fused[:, 2:4], fused[:, 4:], keys, values, slots)
    if block_size % 16 == 0 and size % 32 == 0:  # strips of 16 slots, as `paged_layout.h` has them
        keys = keys.view(-1, 2, size // 2, 16, 2).permute(0, 3, 1, 2, 4)
        values = values.view(-1, 2, size // 16, 8, 16, 2).permute(0, 3, 5, 1, 2, 4)
    keys, values = keys.reshape(-1, 2, size), values.reshape(-1, 2, size)
    assert torch.equal(keys[slots], fused[:, 2:4])
    assert torch.equal(values[slots], fused[:, 4:])
    assert int((keys.abs().sum((1, 2)) > 0).sum()) == int((values.abs().sum((1, 2)) > 0).sum()) == 3


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def test_compiling_replaces_every_projection_and_leaves_the_tied_embedding(tiny_llama: Path) -> None:
    network = load_network(tiny_llama)
    embedding = network.embedding.weight.clone()
    compile_layers(network, wide=network.output)
    assert not [name for name, module in network.named_modules() if isinstance(module, Linear)]
    assert isinstance(network.output, CompiledLinear)
    assert network.output.wide
    assert torch.equal(network.embedding.weight, embedding)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_are_refused_where_they_cannot_be_had(tiny_llama: Path, quantization: Quantization) -> None:
    network = load_network(tiny_llama, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=f"{quantization} needs"):
        compile_layers(network, quantization)


@pytest.mark.parametrize(("quantization", "expected"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_all_weights_are_quantized_and_those_of_the_logits_in_8_bits_at_least(
    tiny_llama: Path, quantization: Quantization, expected: type[CompiledLinear]
) -> None:
    network = load_network(tiny_llama)
    compile_layers(network, quantization, wide=network.output)
    assert {type(module) for module in network.layers.modules() if isinstance(module, CompiledLinear)} == {expected}
    assert isinstance(network.output, Int8Linear)
    assert network.output.wide


def test_weights_in_4_bits_take_that_and_a_float16_for_every_32(tiny_llama: Path) -> None:
    linear = Int4Linear(load_network(tiny_llama).layers[0].mlp.gate_up)
    assert (linear.num_outputs, linear.num_inputs) == (192, 64)
    assert linear.num_bytes == 192 * (64 // 2 + 64 // 32 * 2 + 4)  # and a total for each output
