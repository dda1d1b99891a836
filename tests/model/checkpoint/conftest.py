"""A small Llama checkpoint as plain tensors, and a writer of folders from them: whole, sharded or broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB = 32, 40, 4, 2, 2, 50
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
Write = Callable[..., Path]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    key_rows = HIDDEN // HEADS * KV_HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_rows, HIDDEN),
        "self_attn.v_proj": (key_rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    for index in range(LAYERS):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(5)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(tensors, shards=2, **config)`: a checkpoint folder."""

    def make(tensors: dict[str, Tensor], *, shards: int = 1, folder: str = "model", **config: Any) -> Path:
        path = tmp_path / folder
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG | config))
        if shards == 1:
            save_file(tensors, path / "model.safetensors")
            return path
        files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
        names = sorted(tensors)
        for index, file in enumerate(files):
            save_file({name: tensors[name] for name in names[index::shards]}, path / file)
        weight_map = {name: files[index % shards] for index, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return path

    return make
