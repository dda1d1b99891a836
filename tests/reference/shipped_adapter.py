"""A LoRA of the language model that ships with the project, and the checkpoint that both make when merged by hand."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "slimpajama-tiny-lm"
RANK, SCALE = 4, 2.0


def write_shipped_adapter(root: Path) -> tuple[Path, Path]:
    """Writes `base`, `adapter` and `merged` (in float32) into the folder; returns the last two."""
    adapter, merged = root / "adapter", root / "merged"
    weights = {name: tensor.float() for name, tensor in load_file(SHIPPED / "model.safetensors").items()}
    added: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if "proj" in name]:
        outputs, inputs = weights[name].shape
        a, b = torch.randn(RANK, inputs, generator=generator), 0.01 * torch.randn(outputs, RANK, generator=generator)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        added |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        weights[name] += SCALE * b @ a
    shutil.copytree(SHIPPED, root / "base", ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(SHIPPED, merged, ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
    save_file(weights, merged / "model.safetensors")
    adapter.mkdir()
    save_file(added, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": RANK, "lora_alpha": RANK * SCALE}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return adapter, merged
