"""A checkpoint that is worth a draft, and drafts for it: made of the language model that ships with the project."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHIPPED = Path(__file__).parents[3] / "checkpoints" / "slimpajama-tiny-lm"


def write_deep(folder: Path, num_layers: int = 24) -> Path:
    """The shipped network with layers behind its own that add next to nothing, in bfloat16: it takes several times as
    long, and nearly always says the same."""
    tensors = _shipped()
    own = 1 + max(_layer(name) for name in tensors)
    for layer in range(own, num_layers):
        for name in [name for name in tensors if _layer(name) == layer % own]:
            tiny = 0.001 if "o_proj" in name or "down_proj" in name else 1.0
            tensors[name.replace(f".{layer % own}.", f".{layer}.", 1)] = tensors[name] * tiny
    return _write(folder, tensors, num_hidden_layers=num_layers)


def write_shallow(folder: Path, num_layers: int = 6, *, extra_ids: int = 0) -> Path:
    """The first layers of the shipped network, with rows more in its embedding, which no token has."""
    tensors = {name: tensor for name, tensor in _shipped().items() if _layer(name) < num_layers}
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, torch.zeros(extra_ids, embedding.shape[1])])
    return _write(folder, tensors, num_hidden_layers=num_layers, vocab_size=len(embedding) + extra_ids)


def _shipped() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(SHIPPED / "model.safetensors").items()}


def _layer(name: str) -> int:
    return int(name.split(".")[2]) if "layers" in name else -1


def _write(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("*.png", "*.safetensors"))
    config = json.loads((SHIPPED / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
