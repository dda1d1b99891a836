"""A base and two adapters over it, in folders of their own, and the settings that serve them."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from shipped_adapter import write_shipped_adapter

from service.settings import Settings


def write_other(folder: Path, name: str, factor: float) -> Path:
    """A second adapter: the first one's tensors, times a factor, of half of the modules."""
    other = folder.parent / name
    other.mkdir()
    shutil.copy(folder / "adapter_config.json", other)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor * factor for key, tensor in tensors.items() if "mlp" in key or "v_proj" in key}
    save_file(kept, other / "adapter_model.safetensors")
    return other


def write_folders(root: Path) -> dict[str, Path]:
    """`base`, `one`, `two`, and `merged`, which is what `one` makes of the base."""
    one, merged = write_shipped_adapter(root)
    return {"base": root / "base", "one": one, "two": write_other(one, "two", -1.2), "merged": merged}


def settings_of(folders: dict[str, Path], **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "model": (f"{folders['base']}=base",),
        "adapter": tuple(f"{folders[name]}={name}" for name in ("one", "two")),
        "kv_cache_memory": "8MiB",
    }
    return Settings(**(values | changes))
