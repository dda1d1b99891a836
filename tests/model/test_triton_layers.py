"""The kernels between matrix products against the plain layers, on a GPU or in Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.attention.attend import CachedAttend, PackedAttend
from model.attention.interface import PackedLayout, PagedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.fp8_linear import DTYPE, LARGEST, LEAST_SCALE
from model.fp8_linear import quantize_rows as plain_quantize
from model.gpu_network import convert
from model.kv_cache import KVCache
from model.layers import gelu_tanh, rotate
from model.one_row_layers import OneRowLayer
from tests.model.decoder.conftest import CASES as DECODERS
from tests.model.decoder.conftest import randomize

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from model import triton_layers, triton_one_row  # noqa: E402 - needs Triton

DEVICE = "cpu" if INTERPRETED else "cuda"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("adds", [True, False])
def test_a_sum_and_its_norm(dtype, size, offset, adds):
    x, delta, weight = random(5, size, dtype=dtype), random(5, size, seed=1, dtype=dtype), random(size, dtype=dtype)
    summed, normed = triton_layers.add_rms_norm(x, delta if adds else None, weight, 1e-5, offset)
    expected = x + delta if adds else x
    # The interpreter cuts bfloat16 off where a GPU rounds: a unit in the last place.
    tolerance = {"rtol": 2**-7, "atol": 1e-5} if INTERPRETED and dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(summed, expected, **tolerance)
    wide = F.rms_norm(summed.float(), (size,), weight.float() + offset, 1e-5)
    torch.testing.assert_close(normed, wide.to(dtype))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_a_gate(name):
    x = random(3, 2 * 1100)
    gate, up = x.chunk(2, dim=1)
    activation = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}[name]
    torch.testing.assert_close(triton_layers.gated(x, name), activation(gate) * up, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotated", [0, 8, 24])
@pytest.mark.parametrize("tokens", [4, 1030])
def test_heads_are_normed_and_turned(normed, rotated, tokens):
    num_heads, num_kv_heads, size = 3, 2, 24
    heads = random(tokens, num_heads + 2 * num_kv_heads, size)[:, : num_heads + num_kv_heads]
    angles = random(tokens, 1, rotated // 2, seed=4) if rotated else None
    rotation = None
    if angles is not None:
        cos, sin = angles.cos(), angles.sin()
        rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    weights = random(size, seed=2), random(size, seed=3)
    norm = (*weights, 1e-6, 1.0) if normed else None
    expected = heads
    if normed:
        parts = heads[:, :num_heads], heads[:, num_heads:]
        expected = torch.cat(
            [F.rms_norm(part, (size,), weight + 1.0, 1e-6) for part, weight in zip(parts, weights, strict=True)], dim=1
        )
    if rotation is not None:
        expected = rotate(expected, rotation)
    torch.testing.assert_close(triton_layers.turn_heads(heads, rotation, norm, num_heads), expected)


def test_keys_and_values_go_to_their_slots_and_nowhere_else():
    fused = random(3, 4 + 2 * 2, 12)
    key, value = fused[:, 4:6], fused[:, 6:]
    caches = [torch.zeros((5, 4, 2, 12), device=DEVICE) for _ in range(2)]
    slots = torch.tensor([17, 2, 9], device=DEVICE)
    assert triton_layers.stores(key, value, *caches)
    triton_layers.store(key, value, *caches, slots)
    for cache, given in zip(caches, (key, value), strict=True):
        expected = torch.zeros_like(cache)
        expected.flatten(0, 1)[slots] = given
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotated", [0, 8])
@pytest.mark.parametrize("tokens", [4, 1030])
def test_heads_are_turned_on_their_way_to_the_cache(normed, rotated, tokens):
    num_heads, num_kv_heads, size = 3, 2, 24
    fused = random(tokens, num_heads + 2 * num_kv_heads, size)
    angles = random(tokens, 1, rotated // 2, seed=4)
    rotation = None
    if rotated:
        cos, sin = angles.cos(), angles.sin()
        rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    norm = (random(size, seed=2), random(size, seed=3), 1e-6, 1.0) if normed else None
    expected = triton_layers.turn_heads(fused[:, : num_heads + num_kv_heads], rotation, norm, num_heads)
    slots = torch.randperm(4 * 300, generator=torch.Generator().manual_seed(6))[:tokens].to(DEVICE)
    caches = [torch.zeros((300, 4, num_kv_heads, size), device=DEVICE) for _ in range(2)]
    query = triton_layers.turn_and_store(fused, rotation, norm, num_heads, *caches, slots)
    assert torch.equal(query, expected[:, :num_heads])
    for cache, given in zip(caches, (expected[:, num_heads:], fused[:, num_heads + num_kv_heads :]), strict=True):
        wanted = torch.zeros_like(cache)
        wanted.flatten(0, 1)[slots] = given
        assert torch.equal(cache, wanted)


def test_rows_are_quantized_as_the_definition_says():
    x = random(4, 300, dtype=torch.bfloat16)
    x[2] = 0
    found, scales = triton_layers.quantize_rows(x, DTYPE, LARGEST, LEAST_SCALE)
    expected, expected_scales = plain_quantize(x.cpu())
    torch.testing.assert_close(scales.cpu(), expected_scales)
    got, wanted = found.cpu().float(), expected.float()
    off = (got - wanted).abs()
    close = off <= (torch.maximum(got.abs(), wanted.abs()) / 8).clamp(min=2**-9)
    if INTERPRETED:
        # Triton's interpreter forgets to carry where rounding up reaches the next power of two (125.9 becomes 64).
        carried = (wanted.abs().frexp().mantissa == 0.5) & ((x.cpu().float() / expected_scales).abs() < wanted.abs())
        assert carried.float().mean() < 0.05
        close |= carried
    else:
        assert (off > 0).float().mean() < 0.01
    assert close.all()


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=6, query_pre_attn_scalar=7)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_network_with_the_kernels_is_the_network_without(name, tmp_path):
    torch.manual_seed(2)
    MODELS[name]().save_pretrained(tmp_path)
    network = load_network(tmp_path, DEVICE)
    starts = torch.tensor([0, 7, 12], dtype=torch.int32, device=DEVICE)
    ids = torch.arange(12, device=DEVICE) * 7 % 97
    positions = torch.tensor([*range(7), *range(5)], device=DEVICE)
    results = []
    for _ in range(2):
        attend = PackedAttend(PackedLayout(starts=starts, max_len=7), ReferenceAttention())
        with torch.inference_mode():
            results.append(network.logits(network(ids, positions, attend)))
        convert(network)
    kinds = {type(module).__name__ for module in network.modules()}
    assert {"FusedRMSNorm", "FusedGatedMLP"} <= kinds
    assert "RMSNorm" not in kinds
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert any(isinstance(layer, OneRowLayer) for layer in network.layers) == (name in ("llama", "qwen3"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("gate", ["", "silu", "gelu", "gelu_tanh"])
def test_one_row_is_normed_and_projected(gate, adds, bias):
    size, outputs = 72, 2 * 45
    x, delta, gain = random(1, size), random(1, size, seed=1), random(size, seed=2)
    weight, offsets = random(outputs, size, seed=3) / 10, random(outputs, seed=4) if bias else None
    summed, found = triton_one_row.norm_project(x, delta if adds else None, (gain, 1e-5, 1.0), weight, offsets, gate)
    whole = x + delta if adds else x
    expected = F.linear(F.rms_norm(whole, (size,), gain + 1.0, 1e-5), weight, offsets)
    if gate:
        first, second = expected.chunk(2, dim=1)
        expected = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}[gate](first) * second
    torch.testing.assert_close(summed, whole)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_one_row_is_projected_in_chunks(bias, monkeypatch):
    monkeypatch.setattr(triton_one_row, "CHUNK", 32)
    x, weight, offsets = random(1, 72), random(45, 72, seed=3), random(45, seed=4) if bias else None
    found = triton_one_row.project(x, weight, offsets)
    torch.testing.assert_close(found, F.linear(x, weight, offsets), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_one_row_of_a_network_is_that_row_among_others(name, tmp_path):
    torch.manual_seed(2)
    MODELS[name]().save_pretrained(tmp_path)
    network = load_network(tmp_path, DEVICE)
    convert(network)
    ids = torch.tensor([5, 9], device=DEVICE)
    found = []
    for count in (1, 2):
        starts = torch.arange(count + 1, dtype=torch.int32, device=DEVICE)
        attend = PackedAttend(PackedLayout(starts=starts, max_len=1), ReferenceAttention())
        with torch.inference_mode():
            found.append(network.logits(network(ids[:count], torch.zeros_like(ids[:count]), attend))[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


SEVERAL = (
    *("llama", "qwen3", "gemma2", "smollm3", "granite", "hunyuan", "ministral3", "olmo", "exaone4", "glm4", "apertus"),
    *("stablelm 2", "cohere", "gptj", "falcon", "bloom", "opt"),
)
"""Of each choice that the kernels have, and of each that they leave alone."""


@pytest.mark.parametrize("case", SEVERAL)
def test_a_network_with_the_kernels_continues_a_cached_text_as_without(case, tmp_path):
    """A prompt in one step, then a token in each: all rows of a step, and one alone."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**DECODERS[case]))
    randomize(model)
    model.save_pretrained(tmp_path)
    network = load_network(tmp_path, DEVICE)
    ids = [5, 9, 40, 3, 77, 8, 1, 60, 2]
    found = []
    for _ in range(2):
        config = network.config
        cache = KVCache(
            config.num_layers, 4, block_size=4, num_kv_heads=config.num_kv_heads, head_size=config.head_size,
            dtype=torch.float32, device=DEVICE,
        )  # fmt: skip
        logits = []
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            layout = PagedLayout(
                query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
                context_lens=torch.tensor([end], dtype=torch.int32, device=DEVICE),
                block_tables=torch.tensor([[2, 0, 3]], dtype=torch.int32, device=DEVICE),
                slots=torch.tensor([[2, 0, 3][at // 4] * 4 + at % 4 for at in range(begin, end)], device=DEVICE),
                max_query_len=end - begin,
                max_context_len=end,
            )
            with torch.inference_mode():
                hidden = network(
                    torch.tensor(ids[begin:end], device=DEVICE),
                    torch.arange(begin, end, device=DEVICE),
                    CachedAttend(cache, layout, ReferenceAttention()),
                )
                logits.append(network.logits(hidden))
        found.append(torch.cat(logits))
        convert(network)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
