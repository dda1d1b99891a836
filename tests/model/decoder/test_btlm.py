"""BTLM (arXiv 2309.11568), which transformers does not have: checked against its description in float64 numpy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from model.checkpoint import load_network
from model.layers import alibi_slopes

Array = NDArray[np.float64]
Run = Callable[..., list[Tensor]]
HIDDEN, HEADS, LAYERS, INNER, VOCAB = 48, 6, 2, 40, 61
CONFIG: dict[str, Any] = {
    "architectures": ["BTLMLMHeadModel"],
    "model_type": "btlm",
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_inner": INNER,
    "n_positions": 64,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "layer_norm_epsilon": 1e-5,
    "mup_width_scale": 0.1,
    "mup_embeddings_scale": 14.6,
    "mup_output_alpha": 2.22,
    "mup_scale_qk_dot_by_d": True,
}
# 2^(-8/4 * 1..4), then the first and third of the eight slopes of eight heads.
SLOPES = np.array([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])


@pytest.fixture
def tensors() -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        block = f"h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (HIDDEN,), f"{block}.{norm}.bias": (HIDDEN,)}
        sizes = {"attn.c_attn": (HIDDEN, 3 * HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN), "mlp.c_fc": (HIDDEN, INNER)}
        for name, (rows, columns) in (sizes | {"mlp.c_fc2": (HIDDEN, INNER), "mlp.c_proj": (INNER, HIDDEN)}).items():
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (columns,)}
    shapes |= {"ln_f.weight": (HIDDEN,), "ln_f.bias": (HIDDEN,)}
    return {f"transformer.{name}": random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def save(tmp_path: Path, tensors: dict[str, NDArray[np.float32]]) -> Callable[..., Path]:
    def write(**config: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
        slopes = {"transformer.relative_pe.slopes": np.zeros((HEADS, 1), np.float32)}
        save_file(tensors | slopes, tmp_path / "model.safetensors")
        return tmp_path

    return write


def norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    return scaled


def published_forward(ids: list[int], tensors: dict[str, NDArray[np.float32]], slopes: Array) -> Array:
    weights = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in tensors.items()}

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][ids] * 14.6
    length, size = len(ids), HIDDEN // HEADS
    behind = np.arange(length)[:, None] - np.arange(length)[None, :]
    for layer in range(LAYERS):
        block = f"h.{layer}"
        normed = norm(x, weights[f"{block}.ln_1.weight"], weights[f"{block}.ln_1.bias"])
        fused = linear(normed, f"{block}.attn.c_attn").reshape(length, 3, HEADS, size)
        query, key, value = fused[:, 0], fused[:, 1], fused[:, 2]
        scores = np.einsum("qhd,khd->hqk", query, key) / size - slopes[:, None, None] * behind
        scores = np.where(behind >= 0, scores, -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khd->qhd", chances, value).reshape(length, HIDDEN), f"{block}.attn.c_proj")
        normed = norm(x, weights[f"{block}.ln_2.weight"], weights[f"{block}.ln_2.bias"])
        gate = linear(normed, f"{block}.mlp.c_fc2")
        x = x + linear(linear(normed, f"{block}.mlp.c_fc") * gate / (1 + np.exp(-gate)), f"{block}.mlp.c_proj")
    x = norm(x, weights["ln_f.weight"], weights["ln_f.bias"])
    logits: Array = x @ weights["wte.weight"].T * (2.22 * 0.1)
    return logits


def test_btlm_computes_what_its_description_says(
    save: Callable[..., Path], tensors: dict[str, NDArray[np.float32]], run_packed: Run
) -> None:
    texts = [list(range(7)), [3], [40, 2, 60, 9, 9, 1, 0, 33, 21, 5, 18, 52]]
    for text, ours in zip(texts, run_packed(load_network(save()), texts), strict=True):
        theirs = torch.from_numpy(published_forward(text, tensors, SLOPES)).float()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 4.0}, {"type": "linear", "train_seq_len": 16}], ids=["fixed", "by length"]
)
def test_btlm_interpolates_its_slopes_past_the_trained_length(
    save: Callable[..., Path], tensors: dict[str, NDArray[np.float32]], run_packed: Run, scaling: dict[str, Any]
) -> None:
    text = [40, 2, 60, 9, 9, 1, 0, 33, 21, 5, 18, 52]
    ours = run_packed(load_network(save(alibi_scaling=scaling)), [text])[0]
    theirs = torch.from_numpy(published_forward(text, tensors, SLOPES / 4)).float()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(6).tolist() == SLOPES.tolist()
