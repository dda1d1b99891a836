"""Each format's variants, packed in numpy from its published description: the weight is (values - zeros) * scales."""

import json
from typing import Any

import numpy as np
import packing
import pytest
import torch
from torch import Tensor

from model.checkpoint import load_network
from model.stored_weights import StoredWeights
from tests.model.quantized.conftest import Store, read_weight

NUM_OUTPUTS, NUM_INPUTS, GROUP = 16, 64, 16
COMPRESSED = {"quant_method": "compressed-tensors"}


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=torch.Generator().manual_seed(2))


def parts(arrays: dict[str, packing.Array], module: str = "m") -> dict[str, Tensor]:
    return {f"{module}.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def in_order(group: int = GROUP, num_inputs: int = NUM_INPUTS) -> packing.Array:
    return np.arange(num_inputs) // group


def grouped(num_bits: int, group_size: int = GROUP, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` of packed groups."""
    settings = {"num_bits": num_bits, "type": "int", "strategy": "group", "group_size": group_size, **weights}
    return COMPRESSED | {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("form", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("sorts", [False, True], ids=["in-order", "desc-act"])
def test_gptq(store: Store, weight: Tensor, bits: int, form: str, offset: int, sorts: bool) -> None:
    groups = in_order()
    groups = np.random.default_rng(0).permutation(groups) if sorts else groups
    found = packing.quantize(weight.numpy(), bits, groups)
    tensors = parts(packing.gptq(*found, bits, zero_offset=offset) | {"g_idx": groups.astype(np.int32)})
    folder = store(tensors, quant_method="gptq", bits=bits, group_size=GROUP, checkpoint_format=form, desc_act=sorts)
    assert np.array_equal(read_weight(folder).numpy(), packing.plain(*found, groups))


def test_gptq_of_one_group_without_an_index(store: Store, weight: Tensor) -> None:
    groups = in_order(NUM_INPUTS)
    found = packing.quantize(weight.numpy(), 4, groups)
    folder = store(parts(packing.gptq(*found, 4)), quant_method="gptq", bits=4, group_size=-1)
    assert np.array_equal(read_weight(folder).numpy(), packing.plain(*found, groups))


@pytest.mark.parametrize("group_size", [GROUP, -1])
def test_awq(store: Store, weight: Tensor, group_size: int) -> None:
    groups = in_order(NUM_INPUTS if group_size == -1 else group_size)
    found = packing.quantize(weight.numpy(), 4, groups)
    tensors = parts(packing.awq(*found))
    folder = store(tensors, quant_method="awq", bits=4, group_size=group_size, zero_point=True, version="GEMM")
    assert np.array_equal(read_weight(folder).numpy(), packing.plain(*found, groups))


@pytest.mark.parametrize("packs_zeros", [True, False], ids=["zeros-packed", "zeros-not-packed"])
@pytest.mark.parametrize("sorts", [False, True], ids=["in-order", "g_idx"])
def test_compressed_tensors_packed_with_zeros(store: Store, weight: Tensor, packs_zeros: bool, sorts: bool) -> None:
    groups = in_order()
    groups = np.random.default_rng(0).permutation(groups) if sorts else groups
    values, zeros, scales = packing.quantize(weight.numpy(), 4, groups)
    tensors = parts(
        {
            "weight_packed": packing.words(values, 4),
            "weight_scale": scales,
            "weight_zero_point": packing.words(zeros.T, 4).T if packs_zeros else (zeros - 8).astype(np.int8),
            "weight_shape": np.array(weight.shape, np.int64),
        }
        | ({"weight_g_idx": groups.astype(np.int32)} if sorts else {})
    )
    folder = store(tensors, **grouped(4, symmetric=False))
    assert np.array_equal(read_weight(folder).numpy(), packing.plain(values, zeros, scales, groups))


def test_compressed_tensors_packed_without_zeros_stores_half_the_range_as_zero(store: Store, weight: Tensor) -> None:
    values, _, scales = packing.quantize(weight.numpy(), 8, in_order(20))
    tensors = parts(
        {
            "weight_packed": packing.words(values, 8),
            "weight_scale": scales,
            "weight_shape": np.array(weight.shape, np.int64),
            "weight_g_idx": np.full(NUM_INPUTS, -1, np.int32),
        }
    )
    folder = store(tensors, **grouped(8, group_size=20))
    expected = packing.plain(values, np.full_like(scales, 128), scales, in_order(20))
    assert np.array_equal(read_weight(folder).numpy(), expected)


@pytest.mark.parametrize(
    ("strategy", "shape", "rows", "columns"),
    [
        ({"strategy": "tensor"}, (1,), NUM_OUTPUTS, NUM_INPUTS),
        ({"strategy": "tensor"}, (), NUM_OUTPUTS, NUM_INPUTS),
        ({"strategy": "channel"}, (NUM_OUTPUTS, 1), 1, NUM_INPUTS),
        ({"group_size": -1}, (NUM_OUTPUTS,), 1, NUM_INPUTS),
        ({"group_size": 24}, (NUM_OUTPUTS, 3), 1, 24),
        ({"strategy": "block", "block_structure": [5, 48]}, (4, 2), 5, 48),
    ],
    ids=["tensor", "tensor-scalar", "channel", "channel-implied", "group-implied", "block-cut-short"],
)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_compressed_tensors_one_by_one(
    store: Store, strategy: dict[str, Any], shape: tuple[int, ...], rows: int, columns: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randint(-100, 100, (NUM_OUTPUTS, NUM_INPUTS), generator=generator)
    stored = values.to(torch.int8 if kind == "int" else torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=generator)
    form = "int-quantized" if kind == "int" else "float-quantized"
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": kind, **strategy}}
    folder = store(
        {"m.weight": stored, "m.weight_scale": scales}, **COMPRESSED, format=form, config_groups={"group_0": group}
    )
    grid = scales.reshape(-(-NUM_OUTPUTS // rows), -(-NUM_INPUTS // columns))
    whole = torch.stack([grid[n // rows, torch.arange(NUM_INPUTS) // columns] for n in range(NUM_OUTPUTS)])
    assert torch.equal(read_weight(folder), stored.float() * whole)


def test_each_group_of_modules_has_its_own_scheme(store: Store, weight: Tensor) -> None:
    """A group that names a module goes before one that names a class, wherever it stands."""
    eight, four = ({"num_bits": bits, "type": "int", "strategy": "channel"} for bits in (8, 4))
    values, _, scales = packing.quantize(weight.numpy(), 4, in_order(NUM_INPUTS))
    packed = {
        "weight_packed": packing.words(values, 4),
        "weight_scale": scales,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    tensors = parts(packed, "layers.1.down") | {
        "layers.1.up.weight": torch.full((2, 3), 5, dtype=torch.int8),
        "layers.1.up.weight_scale": torch.tensor([[1.0], [2.0]]),
    }
    groups = {
        "all": {"targets": ["Linear"], "weights": eight, "format": "int-quantized"},
        "down": {"targets": ["re:.*down$"], "weights": four, "format": "pack-quantized"},
        "inputs": {"targets": ["Linear"], "weights": None},
        "head": {"targets": ["lm_head"], "weights": eight, "format": "naive-quantized"},
    }
    folder = store(tensors, **COMPRESSED, format="mixed-precision", config_groups=groups)
    expected = packing.plain(values, np.full_like(scales, 8), scales, in_order(NUM_INPUTS))
    assert np.array_equal(read_weight(folder, "layers.1.down.weight").numpy(), expected)
    assert read_weight(folder, "layers.1.up.weight").tolist() == [[5.0] * 3, [10.0] * 3]


@pytest.mark.parametrize(
    ("name", "shape", "block"),
    [
        ("weight_scale_inv", (2, 3), [128, 128]),
        ("weight_scale_inv", (), None),
        ("weight_scale", (1,), None),
        ("weight_scale", (200,), None),
        ("weight_scale", (200, 1), None),
    ],
    ids=["blocks-cut-short", "tensor", "tensor-of-one", "channel", "channel-column"],
)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8(
    store: Store, name: str, shape: tuple[int, ...], block: list[int] | None, scale_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(6)
    stored = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=generator).to(scale_dtype)
    folder = store({"m.weight": stored, f"m.{name}": scales}, quant_method="fp8", weight_block_size=block)
    wide = scales.float()
    if block is not None:
        rows, columns = torch.arange(200) // 128, torch.arange(300) // 128
        wide = wide[rows][:, columns]
    elif wide.dim() == 1 and len(wide) > 1:
        wide = wide[:, None]
    assert torch.equal(read_weight(folder), stored.float() * wide)


def test_what_else_belongs_to_a_quantization_is_not_left_over(store: Store) -> None:
    """Scales of inputs and of the cache, which are not quantized here."""
    others = ("m.input_scale", "m.activation_scale", "attention.k_scale", "attention.v_scale", "m.output_scale")
    tensors = {name: torch.ones(1) for name in others} | {
        "m.weight": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "m.weight_scale": torch.ones(1),
        "m.bias": torch.ones(2),
    }
    with StoredWeights(store(tensors, quant_method="fp8")) as stored:
        assert {tensor.name for tensor in stored} == {"m.weight", "m.bias"}


def test_without_a_quantization_in_the_config_its_names_mean_nothing(store: Store) -> None:
    with StoredWeights(store({"m.weight": torch.ones(2, 3), "m.weight_scale": torch.ones(1)})) as stored:
        assert {tensor.name for tensor in stored} == {"m.weight", "m.weight_scale"}


def test_a_quantized_weight_is_read_outputs_first_where_the_family_stores_inputs_first(store: Store) -> None:
    """GPT-2's square projections would load either way, and be wrong in one of them."""
    hidden, generator = 32, torch.Generator().manual_seed(8)
    shapes = {"attn.c_attn": 3 * hidden, "attn.c_proj": hidden, "mlp.c_fc": 4 * hidden, "mlp.c_proj": hidden}
    norms = ("h.0.ln_1", "h.0.ln_2", "ln_f")
    plain = {
        f"{norm}.{kind}": torch.randn(hidden, generator=generator) for norm in norms for kind in ("weight", "bias")
    }
    plain |= {name: torch.randn(40, hidden, generator=generator) for name in ("wte.weight", "wpe.weight")}
    packed = dict(plain)
    for name, num_outputs in shapes.items():
        num_inputs = 4 * hidden if name == "mlp.c_proj" else hidden
        weight = torch.randn(num_outputs, num_inputs, generator=generator).numpy()
        found = packing.quantize(weight, 4, in_order(GROUP, num_inputs))
        packed |= parts(packing.gptq(*found, 4), f"h.0.{name}")
        plain[f"h.0.{name}.weight"] = torch.from_numpy(
            packing.plain(*found, in_order(GROUP, num_inputs))
        ).T.contiguous()
        plain[f"h.0.{name}.bias"] = packed[f"h.0.{name}.bias"] = torch.randn(num_outputs, generator=generator)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **{"vocab_size": 40, "n_embd": hidden, "n_head": 4, "n_layer": 1, "n_positions": 40},
    }
    expected = load_network(store(plain, config=config, folder="plain"), dtype=torch.float32)
    network = load_network(
        store(packed, config=config, quant_method="gptq", bits=4, group_size=GROUP), dtype=torch.float32
    )
    for name, parameter in expected.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter), name


def test_bitsandbytes_bytes_may_be_stored_as_another_type(store: Store) -> None:
    """`bnb_4bit_quant_storage`, for FSDP."""
    octets = torch.arange(16, dtype=torch.uint8) * 17  # each value twice
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 8]}
    tensors = {
        "m.weight": octets.view(torch.bfloat16).reshape(-1, 1),
        "m.weight.absmax": torch.tensor([2.0]),
        "m.weight.quant_map": torch.arange(16.0),
        "m.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    folder = store(tensors, quant_method="bitsandbytes", load_in_4bit=True)
    assert torch.equal(read_weight(folder), 2.0 * torch.arange(16.0).repeat_interleave(2).reshape(4, 8))
