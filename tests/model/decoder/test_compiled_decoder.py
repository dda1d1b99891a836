"""Layers joined into one operator give what they give one by one, to a bit; others stay apart."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from model.adapters.low_rank import AdapterWeights, Run, StepAdapters
from model.attention.attend import CachedAttend
from model.attention.cpu import CpuAttention
from model.attention.interface import PagedLayout
from model.checkpoint import load_network
from model.compiled_decoder import JoinedLayers, join_layers
from model.compiled_layers import Quantization, compile_layers, weight_bytes
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.ops import library

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators are not compiled here")

SIZES = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "head_dim": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], pad_token_id=0)
    ),
    "granite": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, residual_multiplier=0.22, attention_multiplier=0.1)
    ),
    "glm": lambda: transformers.GlmForCausalLM(transformers.GlmConfig(**SIZES, pad_token_id=0)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=9)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32)
    ),
    "granitemoe": lambda: transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(**SIZES, residual_multiplier=0.4, num_local_experts=5)
    ),
    "glm4_moe": lambda: transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(**SIZES, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=64)
    ),
}
QUERIES, CONTEXTS = (1, 7, 1, 20), (1, 7, 30, 41)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = FAMILIES[request.param]()
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter)
    network.bfloat16().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, quantization: Quantization, *, joined: bool) -> Decoder:
    network = load_network(folder)
    assert isinstance(network, Decoder)
    compile_layers(network, quantization, wide=network.output)
    if joined:
        join_layers(network)
    return network


def states(
    network: Decoder, block_size: int, adapters: StepAdapters | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Of a step of prompts and single tokens whose caches hold random numbers; and what the cache holds then."""
    config = network.config
    cache = KVCache(
        config.num_layers, 40, block_size=block_size, num_kv_heads=config.num_kv_heads, head_size=config.head_size,
        dtype=dtype, device="cpu",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    slots = torch.arange(40 * block_size)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        shape = (2, len(slots), config.num_kv_heads, config.head_size)
        torch.ops.slimpajama.store(*torch.randn(shape, generator=generator).bfloat16(), keys, values, slots)
    tables = torch.randperm(40, generator=generator)[:24].view(4, 6).int()
    positions = torch.cat([torch.arange(end - count, end) for count, end in zip(QUERIES, CONTEXTS, strict=True)])
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(QUERIES))
    layout = PagedLayout(
        query_starts=torch.tensor([0, *QUERIES]).cumsum(0).int(), context_lens=torch.tensor(CONTEXTS).int(),
        block_tables=tables, slots=tables[rows, positions // block_size].long() * block_size + positions % block_size,
        max_query_len=max(QUERIES), max_context_len=max(CONTEXTS),
    )  # fmt: skip
    ids = torch.randint(config.vocab_size, (len(positions),), generator=generator)
    hidden = network(ids, positions, CachedAttend(cache, layout, CpuAttention()), adapters)
    return hidden, cache.pool


@torch.inference_mode()
@pytest.mark.parametrize(("block_size", "dtype"), [(16, torch.bfloat16), (16, torch.int8), (8, torch.bfloat16)])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_joined_layers_give_the_same_to_a_bit(
    folder: Path, quantization: Quantization, block_size: int, dtype: torch.dtype
) -> None:
    apart, joined = (load(folder, quantization, joined=value) for value in (False, True))
    assert isinstance(joined.layers[0], JoinedLayers)
    assert weight_bytes(joined) == weight_bytes(apart)
    both = (states(network, block_size, dtype=dtype) for network in (joined, apart))
    for found, expected in zip(*both, strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_a_cache_in_8_bits_changes_little(folder: Path) -> None:
    network = load(folder, "none", joined=True)
    found, expected = (states(network, 16, dtype=dtype)[0].float() for dtype in (torch.int8, torch.bfloat16))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < float(error.median()) < 0.03
    # Of two experts that are nearly tied the other one may be chosen.
    assert float(error.max()) < (0.03 if network.config.experts is None else 0.2)


def adapter(seed: int, rank: int, projections: tuple[str, ...], layers: range, network: Decoder) -> AdapterWeights:
    """Beside these projections of these layers, as far as there are any: to experts nothing is added."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"query_key_value": (256, 128), "output": (128, 128), "gate_up": (192, 128), "down": (128, 96)}

    def pair(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        a = torch.randn(rank, inputs, generator=generator)
        return a, 0.1 * torch.randn(outputs, rank, generator=generator)

    pairs = [
        (layer, name, *pair(*sizes[name]))
        for layer in layers
        for name in projections
        if name in ("query_key_value", "output") or network.config.experts_of(layer) is None
    ]
    return AdapterWeights(pairs, torch.bfloat16, torch.device("cpu"))


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, for the length of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_joined_layers_add_what_adapters_add_layer_by_layer(
    folder: Path, quantization: Quantization, num_threads: int, set_num_threads: Callable[[int], None]
) -> None:
    """Of different ranks, beside some of the projections of some of the layers; the rows between have none."""
    set_num_threads(num_threads)
    apart, joined = (load(folder, quantization, joined=value) for value in (False, True))
    one = adapter(1, 5, ("query_key_value", "output", "gate_up", "down"), range(3), joined)
    other = adapter(2, 40, ("query_key_value", "down"), range(1, 2), joined)
    adapters = StepAdapters([Run(0, 1, one), Run(8, 9, one), Run(9, 29, other)])
    plain = states(joined, 16)[0]
    found = states(joined, 16, adapters)
    for value, expected in zip(found, states(apart, 16, adapters), strict=True):
        assert value.isfinite().all()
        assert torch.equal(value, expected)
    assert torch.equal(found[0][1:8], plain[1:8])
    assert not any(torch.equal(row, before) for row, before in zip(found[0][8:], plain[8:], strict=True))


@pytest.mark.parametrize(
    "model",
    [
        transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
        transformers.HunYuanDenseV1ForCausalLM(transformers.HunYuanDenseV1Config(**SIZES)),
        transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES)),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"head_dim": 24})),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"intermediate_size": 100})),
    ],
    ids=[
        "norms of other places",
        "norms of turned heads",
        "one norm for both",
        "heads of no vector's size",
        "inputs of no tile's size",
    ],
)
def test_what_the_operator_does_not_have_stays_apart(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    model.bfloat16().save_pretrained(tmp_path)
    network = load(tmp_path, "none", joined=True)
    assert len(network.layers) == SIZES["num_hidden_layers"]
