"""An encoder that is one compiled operator: BERT and what differs from it in positions, norms' places and MLPs alone.

`compiled_encoder` takes a filled `Encoder`'s weights and packs them; what comes out is what the encoder gives, in the
operators' order of additions, and can't be saved. Other encoders stay as they are. Runs in the worker process.

Legend: T tokens packed in the step, E hidden size.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from model.attention.attend import PackedAttend
from model.attention.cpu import CpuAttention
from model.attention.interface import PackedLayout
from model.compiled_layers import Quantization
from model.config import EncoderConfig
from model.encoder import Encoder, EncoderEmbedding, EncoderLayer
from model.huge_pages import Shelf
from model.layers import GatedMLP, LayerNorm, Linear
from model.ops import library

CALIBRATION_LENGTHS = (8, 16, 32, 64, 128, 256)
"""Tokens of the texts by which the ranges of inputs are found."""
LEAST_RANGE = 1e-5

LEAST_SIZE = 32
"""Sizes of heads and of the MLP are multiples of it: what one instruction of matrix hardware takes."""


class CompiledEncoder(Module):
    """Ids to hidden states, as `Encoder` has it. `head` is the checkpoint's own, or None.

    With `halves` float32 is multiplied as the sum of two bfloat16, 16 bits of it: what torch calls the
    float32_matmul_precision "high".
    """

    def __init__(self, encoder: Encoder, quantization: Quantization = "none", *, halves: bool = False) -> None:
        super().__init__()
        config = encoder.config
        self.config = config
        self.embedding = encoder.embedding
        self.head = encoder.head
        self._layers: Any = torch.classes.slimpajama.EncoderLayers(
            config.num_heads,
            config.attention_scale,
            config.norm_epsilon,
            config.activation,
            config.gated,
            config.pre_norm,
        )
        self._rotaries = encoder.rotary_tables
        tables = encoder.embedding
        self._layers.embed_with(
            tables.tokens.weight,
            _types(tables),
            None if tables.positions is None else tables.positions.weight,
            *_parts(tables.norm),
        )
        if encoder.norm is not None:
            self._layers.end_with(*_parts(encoder.norm))
        self.num_bytes = 0
        """Of the packed weights."""
        ranges = input_ranges(encoder) if quantization == "int8" else {}
        for index, layer in enumerate(encoder.layers):
            assert isinstance(layer, EncoderLayer)
            tensors = _tensors(layer, ranges, halves)
            shelf = Shelf([tensor.nbytes for tensor in tensors])
            kept, window = [shelf.keep(tensor) for tensor in tensors], config.window(index) or 0
            self._layers.add(kept, config.hidden_size, config.intermediate_size, window)
            self.num_bytes += sum(tensor.nbytes for tensor in tensors)

    def forward(self, ids: Tensor, type_ids: Tensor, positions: Tensor, attend: PackedAttend) -> Tensor:
        """ids, type_ids and positions [T], positions from 0 in each text; returns [T, E]."""
        offset = self.embedding.offset
        places = positions + offset if offset else positions
        rotations = [table.rows(positions) for table in self._rotaries]
        usual, local = (*rotations, None, None)[:2]
        hidden: Tensor = self._layers.run(ids, type_ids, places, attend.layout.starts, usual, local)
        return hidden


def compiled_encoder(
    encoder: Encoder, quantization: Quantization = "none", *, exact: bool = True
) -> CompiledEncoder | None:
    """The encoder on the operators; None where there are none, or they don't have its parts.

    Unless its products are to be `exact`, float32 is multiplied in halves where the processor has AMX for them.
    """
    dtype = encoder.embedding.tokens.weight.dtype
    sound = encoder.embedding.tokens.weight.device.type == "cpu" and library.LOADED
    fitting = dtype == torch.bfloat16 or (dtype == torch.float32 and quantization == "none")
    if not (sound and fitting and _has_all_parts(encoder.config)):
        return None
    halves = dtype == torch.float32 and not exact and torch.ops.slimpajama.has_tiles()
    return CompiledEncoder(encoder, quantization, halves=halves)


def _has_all_parts(config: EncoderConfig) -> bool:
    """Whether the network is BERT's but for sizes, activation, positions, windows, gates and where its norms are."""
    unusual = (
        config.norm != "layer",
        config.num_kv_heads not in (None, config.num_heads),
        config.weight_order,
        config.relative_buckets,
        config.disentangled,
        config.convolution,
        config.embedding_projection,
        config.num_task_types and not config.num_token_types,
    )
    sizes = (config.head_size, config.intermediate_size)
    return config.embedding_norm and not any(unusual) and all(size % LEAST_SIZE == 0 for size in sizes)


def _types(tables: EncoderEmbedding) -> Tensor | None:
    """The table of token types, with what the one task of all tokens adds to each of them."""
    if tables.types is None or tables.tasks is None:
        return None if tables.types is None else tables.types.weight
    return tables.types.weight + tables.tasks.weight[0]


def _tensors(layer: EncoderLayer, ranges: Mapping[Linear, Tensor], halves: bool) -> list[Tensor]:
    """What the operator wants of a layer, in its order; int8 where there are ranges of inputs."""
    mlp = layer.mlp
    up = mlp.gate_up if isinstance(mlp, GatedMLP) else mlp.up
    linears = (layer.query_key_value, layer.output, up, mlp.down)
    parts = [_quantized(linear, ranges.get(linear)) if ranges else _packed(linear, halves) for linear in linears]
    tensors = [part for linear_parts in parts for part in linear_parts]
    return [*tensors, *_parts(layer.attention_norm), *_parts(layer.mlp_norm)]


def _packed(linear: Linear, halves: bool) -> list[Tensor]:
    """The weight, nothing of what int8 has, and the bias (empty: none)."""
    wide = "halves" if halves else "float32"
    pack = getattr(torch.ops.slimpajama, f"pack_{wide if linear.weight.dtype == torch.float32 else 'bf16'}")
    nothing = torch.empty(0)
    return [pack(linear.weight), nothing, nothing, nothing, _bias(linear)]


def _quantized(linear: Linear, inputs: Tensor | None) -> list[Tensor]:
    """The weight in 8 bits, its scales and sums, what the inputs are multiplied by first, and the bias."""
    weight = linear.weight.float()
    if inputs is None:
        return [*torch.ops.slimpajama.pack_int8(weight), torch.empty(0), _bias(linear)]
    shares = (inputs.clamp(min=LEAST_RANGE) / weight.abs().amax(0).clamp(min=LEAST_RANGE)).sqrt()
    return [*torch.ops.slimpajama.pack_int8(weight * shares), 1 / shares, _bias(linear)]


def _bias(linear: Linear) -> Tensor:
    return torch.empty(0) if linear.bias is None else linear.bias.float()


def _parts(norm: Module | None) -> list[Tensor]:
    """Weight and bias in float32, their own, for addresses are kept; both empty where there is no norm."""
    if norm is None:
        return [torch.empty(0), torch.empty(0)]
    assert isinstance(norm, LayerNorm)
    weight = norm.weight.float().clone()
    return [weight, torch.zeros_like(weight) if norm.bias is None else norm.bias.float().clone()]


@torch.inference_mode()
def input_ranges(encoder: Encoder) -> dict[Linear, Tensor]:
    """The largest |x| of each input of the projections that read a norm's output, over texts of random ids.

    A few inputs of such a projection are many times larger than the others, whatever the text; in steps that fit them
    the others would be lost. Each input is divided, and its weights multiplied, by the square root of its range over
    its weights' (SmoothQuant, arXiv 2211.10438).
    """
    config = encoder.config
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, config.context_length) for length in CALIBRATION_LENGTHS]
    ids = torch.randint(config.vocab_size, (sum(lengths),), generator=generator)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    found: dict[Linear, Tensor] = {}

    def note(linear: Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(linear, Linear)
        found[linear] = inputs[0].abs().amax(0).float()

    names = (".query_key_value", ".mlp.up", ".mlp.gate_up")
    readers = [module for name, module in encoder.layers.named_modules() if name.endswith(names)]
    hooks = [module.register_forward_pre_hook(note) for module in readers]
    positions = torch.cat([torch.arange(length) for length in lengths])
    layout = PackedLayout(starts=starts, max_len=max(lengths))
    encoder(ids, torch.zeros_like(ids), positions, PackedAttend(layout, CpuAttention()))
    for hook in hooks:
        hook.remove()
    return found
