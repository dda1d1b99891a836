# ruff: noqa: N803 - by Triton's custom its compile-time arguments are written in capitals
"""What lies between a decoder's matrix products, each in one pass over memory: Triton kernels for GPUs.

A sum and its norm, the gate of an MLP, norm and rotation of queries and keys, the writing of keys and values into the
paged cache, and the quantizing of a projection's inputs. Each computes in float32 what the plain layers do and rounds
once. Importing this needs Triton. Runs in the worker process.

Legend: T tokens, E hidden size, F intermediate size, H query heads, K key/value heads, D head size, R rotated
dimensions of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GATE_BLOCK = 1024
MANY_TOKENS = 1024
"""From so many tokens on there are programs enough for each to take more heads."""


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, offset: float
) -> tuple[Tensor, Tensor]:
    """x [.., E] and delta of its shape or None; the sum, and rms-normed times (weight + offset), of the same shape."""
    size = x.shape[-1]
    rows = x.reshape(-1, size).contiguous()
    out = torch.empty_like(rows)
    added = rows if delta is None else delta.reshape(-1, size).contiguous()
    summed = rows if delta is None else torch.empty_like(rows)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(len(rows),)](
        out,
        summed,
        rows,
        added,
        weight,
        size,
        epsilon,
        offset,
        ADDS=delta is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return summed.view(x.shape), out.view(x.shape)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x and delta [.., E]; the layer norm of their sum, of the same shape."""
    size = x.shape[-1]
    rows, added = x.reshape(-1, size).contiguous(), delta.reshape(-1, size).contiguous()
    out = torch.empty_like(rows)
    block = triton.next_power_of_2(size)
    _add_layer_norm[(len(rows),)](
        out, rows, added, weight, bias, size, epsilon, BLOCK=block, num_warps=min(max(block // 512, 1), 16)
    )
    return out.view(x.shape)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up [.., 2F], gate first; activation(gate) * up [.., F]. Activations: silu, gelu, gelu_tanh."""
    size = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * size).contiguous()
    out = torch.empty((len(rows), size), dtype=rows.dtype, device=rows.device)
    _gated[(len(rows), triton.cdiv(size, GATE_BLOCK))](
        out, rows, size, ACTIVATION=activation, BLOCK=GATE_BLOCK, num_warps=4
    )
    return out.view(*gate_up.shape[:-1], size)


Rotation = tuple[Tensor, Tensor]
"""As in `layers.rotate`."""
HeadNorm = tuple[Tensor, Tensor, float, float]
"""Weights of queries and of keys [D], epsilon, and what is added to the weights."""


def turn_heads(heads: Tensor, rotation: Rotation | None, norm: HeadNorm | None, num_heads: int) -> Tensor:
    """heads [T, H + K, D], the first `num_heads` of them queries: normed each for itself, then turned."""
    num_tokens, num_all, size = heads.shape
    out = torch.empty((num_tokens, num_all, size), dtype=heads.dtype, device=heads.device)
    _launch_turn(out, heads, rotation, norm, num_heads, num_all)
    return out


def turn_and_store(
    heads: Tensor,
    rotation: Rotation | None,
    norm: HeadNorm | None,
    num_heads: int,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """heads [T, H + 2K, D]: the queries as `turn_heads` gives them, [T, H, D]; keys like them, and values as they
    are, go to `slots` [T] of the caches [num_blocks, block_size, K, D]."""
    num_tokens, _, size = heads.shape
    out = torch.empty((num_tokens, num_heads, size), dtype=heads.dtype, device=heads.device)
    num_turned = num_heads + key_cache.shape[2]
    _launch_turn(out, heads, rotation, norm, num_heads, num_turned, (key_cache, value_cache, slots))
    return out


def _launch_turn(
    out: Tensor,
    heads: Tensor,
    rotation: Rotation | None,
    norm: HeadNorm | None,
    num_heads: int,
    num_turned: int,
    stored: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    num_tokens, num_all, size = heads.shape
    cos, sin = rotation if rotation is not None else (heads, heads)
    query_weight, key_weight, epsilon, offset = norm if norm is not None else (heads, heads, 0.0, 0.0)
    key_cache, value_cache, slots = stored if stored is not None else (heads, heads, heads)
    heads_at_once = min(16 if num_tokens >= MANY_TOKENS else 4, triton.next_power_of_2(num_all))
    _turn[(num_tokens, triton.cdiv(num_all, heads_at_once))](
        out,
        heads,
        heads.stride(0),
        heads.stride(1),
        cos,
        sin,
        query_weight,
        key_weight,
        epsilon,
        offset,
        num_heads,
        num_turned,
        num_all,
        key_cache,
        value_cache,
        slots,
        D=size,
        R=cos.shape[-1] if rotation is not None else 0,
        NORMS=norm is not None,
        STORES=stored is not None,
        HEADS=heads_at_once,
        BLOCK=triton.next_power_of_2(size),
        num_warps=4 if heads_at_once > 4 else 1,
    )


def store(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """key and value [T, K, D], heads side by side, to `slots` [T] of the caches [num_blocks, block_size, K, D]."""
    num_tokens, num_kv_heads, size = key.shape
    _store[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        key.stride(0),
        value.stride(0),
        key_cache.stride(1),
        WIDTH=num_kv_heads * size,
        BLOCK=triton.next_power_of_2(num_kv_heads * size),
        num_warps=4,
    )


def stores(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether `store` takes these: heads side by side, slots one after the other."""
    size = key.shape[2]
    packed = key.stride(2) == value.stride(2) == 1 and key.stride(1) == value.stride(1) == size
    return packed and key_cache.is_contiguous() and value_cache.is_contiguous()


def quantize_rows(x: Tensor, dtype: torch.dtype, largest: float, least_scale: float) -> tuple[Tensor, Tensor]:
    """x [T, K] in the 8-bit dtype, and the float32 scales [T, 1] by which it is to be multiplied again."""
    rows = x.contiguous()
    num_rows, size = rows.shape
    out = torch.empty((num_rows, size), dtype=dtype, device=x.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _quantize[(num_rows,)](
        out, scales, rows, size, largest, least_scale, BLOCK=block, num_warps=min(max(block // 512, 1), 16)
    )
    return out, scales


@triton.jit
def _add_rms_norm(
    out,
    summed,
    x,
    delta,
    weight,
    size,
    epsilon,
    offset,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * size
    place = tl.arange(0, BLOCK)
    real = place < size
    row = tl.load(x + start + place, mask=real, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(delta + start + place, mask=real, other=0.0).to(tl.float32)
        # Rounded as the stream is: the norm is that of what the next layer adds to.
        narrow = row.to(summed.dtype.element_ty)
        tl.store(summed + start + place, narrow, mask=real)
        row = narrow.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / size + epsilon)
    gain = tl.load(weight + place, mask=real, other=0.0).to(tl.float32) + offset
    tl.store(out + start + place, (row * scale * gain).to(out.dtype.element_ty), mask=real)


@triton.jit
def _add_layer_norm(out, x, delta, weight, bias, size, epsilon, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    place = tl.arange(0, BLOCK)
    real = place < size
    row = tl.load(x + start + place, mask=real, other=0.0).to(tl.float32)
    row += tl.load(delta + start + place, mask=real, other=0.0).to(tl.float32)
    centred = tl.where(real, row - tl.sum(row, 0) / size, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / size + epsilon)
    row = centred * scale * tl.load(weight + place, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        row += tl.load(bias + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + start + place, row.to(out.dtype.element_ty), mask=real)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """silu, gelu or gelu_tanh of float32 x."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # tanh(z) = 2 sigmoid(2 z) - 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _gated(out, gate_up, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = place < size
    gate = tl.load(gate_up + row * 2 * size + place, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * size + place, (activated(gate, ACTIVATION) * up).to(out.dtype.element_ty), mask=real)


@triton.jit
def _turn(
    out,
    heads,
    token_stride,
    head_stride,
    cos,
    sin,
    query_weight,
    key_weight,
    epsilon,
    offset,
    num_heads,
    num_turned,
    num_all,
    key_cache,
    value_cache,
    slots,
    D: tl.constexpr,
    R: tl.constexpr,
    NORMS: tl.constexpr,
    STORES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    real = (place < D) & (head < num_all)
    begin = heads + token * token_stride + head * head_stride
    given = tl.load(begin + place, mask=real, other=0.0)
    own = given.to(tl.float32)  # [HEADS, BLOCK]
    # Dimension i < R / 2 is turned with i + R / 2.
    partner = tl.where(place < R // 2, place + R // 2, place - R // 2)
    turned = place < R
    other = tl.load(begin + partner, mask=turned & real & (head < num_turned), other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(own * own, 1) / D + epsilon)[:, None]
        own = own * scale * (head_weight(query_weight, key_weight, head < num_heads, place, place < D) + offset)
        other = other * scale * (head_weight(query_weight, key_weight, head < num_heads, partner, turned) + offset)
    if R > 0:
        c = tl.load(cos + token * R + place, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + token * R + place, mask=turned, other=0.0).to(tl.float32)
        own = own * c + other * s
    found = own.to(out.dtype.element_ty)
    if STORES:
        tl.store(out + (token * num_heads + head) * D + place, found, mask=real & (head < num_heads))
        # The caches hold keys and values of as many heads, side by side.
        num_kv_heads = num_turned - num_heads
        target = (tl.load(slots + token) * num_kv_heads + (head - num_heads)) * D + place
        is_key = (head >= num_heads) & (head < num_turned)
        tl.store(key_cache + target, found.to(key_cache.dtype.element_ty), mask=real & is_key)
        value_target = value_cache + target - num_kv_heads * D
        tl.store(value_target, given.to(value_cache.dtype.element_ty), mask=real & (head >= num_turned))
    else:
        tl.store(out + (token * num_all + head) * D + place, found, mask=real)


@triton.jit
def head_weight(query_weight, key_weight, is_query, place, there):
    of_query = tl.load(query_weight + place, mask=there, other=0.0).to(tl.float32)
    of_key = tl.load(key_weight + place, mask=there, other=0.0).to(tl.float32)
    return tl.where(is_query, of_query, of_key)


@triton.jit
def _store(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    key_stride,
    value_stride,
    slot_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    real = place < WIDTH
    target = tl.load(slots + token) * slot_stride + place
    k = tl.load(key + token * key_stride + place, mask=real)
    v = tl.load(value + token * value_stride + place, mask=real)
    tl.store(key_cache + target, k.to(key_cache.dtype.element_ty), mask=real)
    tl.store(value_cache + target, v.to(value_cache.dtype.element_ty), mask=real)


@triton.jit
def _quantize(out, scales, x, size, largest, least_scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    real = place < size
    values = tl.load(x + row * size + place, mask=real, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / largest, least_scale)
    tl.store(scales + row, scale)
    scaled = tl.minimum(tl.maximum(values / scale, -largest), largest)
    tl.store(out + row * size + place, scaled.to(out.dtype.element_ty), mask=real)
