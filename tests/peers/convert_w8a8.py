"""A checkpoint in compressed-tensors' int-quantized layout, for vLLM: convert_w8a8.py FOLDER TARGET.

Each linear layer but the head: int8 weights [out, in] with a scale per output channel, activations quantized per token
as they come. Reads and writes safetensors; quantizes by rounding to nearest.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_TENSOR = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "actorder": None,
    "block_structure": None,
}
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _TENSOR | {"strategy": "channel", "dynamic": False, "observer": "minmax", "observer_kwargs": {}},
            "input_activations": _TENSOR | {"strategy": "token", "dynamic": True, "observer": None},
            "output_activations": None,
        }
    },
}


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.glob("*.json"):
        shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}, indent=2))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        tensors[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(tensor.dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


main(*map(Path, sys.argv[1:]))
