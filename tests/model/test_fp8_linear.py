"""fp8 projections against their own definition and against bfloat16; where they are refused; what is left alone."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model import fp8_linear
from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.compiled_layers import compile_layers, weight_bytes
from model.decoder import Decoder
from model.errors import CheckpointError
from model.fp8_linear import Fp8Linear, convert, quantize_rows
from model.layers import Linear


@pytest.fixture
def make_linear():
    def make(in_size: int, out_size: int, *, bias: bool = True) -> Linear:
        generator = torch.Generator().manual_seed(3)
        linear = Linear(in_size, out_size, bias=bias)
        for name, parameter in list(linear.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator).bfloat16()
            setattr(linear, name, torch.nn.Parameter(values, requires_grad=False))
        return linear

    return make


@pytest.fixture
def llama(tmp_path) -> Decoder:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    network = load_network(tmp_path, dtype=torch.bfloat16)
    assert isinstance(network, Decoder)
    return network


def logits_of(network: Decoder) -> torch.Tensor:
    ids = torch.arange(20) % 97
    layout = PackedLayout(starts=torch.tensor([0, 20], dtype=torch.int32), max_len=20)
    with torch.inference_mode():
        return network.logits(network(ids, torch.arange(20), PackedAttend(layout, ReferenceAttention())))


def product_of_eighths(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """The definition, in float64."""
    quantized, scales = quantize_rows(x)
    weight, weight_scales = quantize_rows(linear.weight)
    product = (quantized.double() * scales) @ (weight.double() * weight_scales).t()
    return product if linear.bias is None else product + linear.bias.double()


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_scaled_eighths(make_linear, rows, bias):
    linear = make_linear(64, 32, bias=bias)
    x = torch.randn((rows, 64), generator=torch.Generator().manual_seed(rows)).bfloat16()
    torch.testing.assert_close(Fp8Linear(linear)(x).double(), product_of_eighths(x, linear), rtol=0.01, atol=0.05)


def test_a_number_is_off_by_a_sixteenth_of_itself_at_most_where_its_row_allows():
    """Three bits after the leading one; numbers down to 2^-15 of the row's largest keep all of them."""
    x = torch.randn((6, 500), generator=torch.Generator().manual_seed(2))
    quantized, scales = quantize_rows(x)
    error = (quantized.float() * scales - x).abs()
    assert (error <= x.abs() / 16 + scales * 2**-10).all()


def test_large_rows_and_large_outputs_leave_the_small_ones_their_accuracy(make_linear):
    linear = make_linear(64, 32, bias=False)
    x = torch.randn((4, 64), generator=torch.Generator().manual_seed(2)).bfloat16()
    small = Fp8Linear(linear)(x)
    scaled_x, scaled = x.clone(), make_linear(64, 32, bias=False)
    scaled_x[1] *= 1024
    scaled.weight[5] *= 1024
    found = Fp8Linear(scaled)(scaled_x)
    rows, outputs = [0, 2, 3], [index for index in range(32) if index != 5]
    torch.testing.assert_close(found[rows][:, outputs], small[rows][:, outputs])


def test_rows_of_zeros_give_the_bias(make_linear):
    linear = make_linear(64, 32)
    found = Fp8Linear(linear)(torch.zeros((2, 64), dtype=torch.bfloat16))
    assert torch.equal(found, linear.bias.expand(2, -1))


def test_a_network_in_fp8_says_nearly_the_same_in_half_the_bytes(llama):
    expected, before = logits_of(llama), weight_bytes(llama)
    assert convert(llama, kept=llama.output) == 2 * 4
    found = logits_of(llama)
    assert torch.cosine_similarity(found, expected, dim=1).min() > 0.995
    assert not torch.equal(found, expected)
    kept = 2 * 2 * 97 * 64
    assert weight_bytes(llama) - kept < 0.6 * (before - kept)
    assert isinstance(llama.output, Linear)


def test_odd_sizes_stay_as_they_are(make_linear):
    holder = torch.nn.ModuleDict({"odd": make_linear(60, 32), "even": make_linear(64, 32)})
    assert convert(holder) == 1
    assert isinstance(holder["odd"], Linear)


def test_a_cpu_refuses_fp8(llama):
    with pytest.raises(CheckpointError, match="fp8 needs a GPU"):
        compile_layers(llama, "fp8", wide=llama.output)


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((8, 0), torch.bfloat16, r"capability 9\.0 \(Hopper\) or later; this one has 8\.0"),
        ((9, 0), torch.float16, "needs dtype bfloat16 .* is float16"),
        ((9, 0), torch.bfloat16, None),
        ((10, 0), torch.bfloat16, None),
    ],
)
def test_a_gpu_that_cannot_says_why(monkeypatch, capability, dtype, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = fp8_linear.fault(torch.device("cuda"), dtype)
    assert (found is None) == (message is None)
    assert message is None or re.search(message, found or "")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)
def test_a_gpu_multiplies_the_scaled_eighths(make_linear):
    linear = make_linear(256, 128)
    x = torch.randn((40, 256), generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = Fp8Linear(linear.cuda())
    found = layer(x.cuda())
    # Of what was quantized there: a GPU divides a little differently, and a tie may round the other way.
    rows, scales = quantize_rows(x.cuda())
    expected = (rows.double() * scales) @ (layer.weight.double() * layer.scales.t()).t() + linear.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.05)
