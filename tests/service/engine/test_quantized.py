"""A lane of a checkpoint that is stored quantized generates what a lane of its plain weights does, to the token."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import packing
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import CheckpointError
from model.ops import library
from service.engine.loading import load_lane
from service.engine.protocol import Loaded, ModelSpec, WorkerConfig
from tests.service.engine import lanes

SHIPPED = Path(__file__).parents[3] / "checkpoints" / "slimpajama-tiny-lm"
PROMPT = [10, 500, 77, 1200, 310, 42]
GROUP = 64


def quantized(method: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors with their projections packed, and what is stored then made plain."""
    packed, plain = dict(tensors), dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        weight = packed.pop(name).float().numpy()
        groups = np.arange(weight.shape[1]) // GROUP
        found = packing.quantize(weight, 4, groups)
        parts = packing.gptq(*found, 4) if method == "gptq" else packing.awq(*found)
        packed |= {
            f"{name.removesuffix('weight')}{part}": torch.from_numpy(np.ascontiguousarray(array))
            for part, array in parts.items()
        }
        plain[name] = torch.from_numpy(packing.plain(*found, groups))
    return packed, plain


@pytest.fixture(scope="module", params=["gptq", "awq"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    packed, plain = quantized(request.param, load_file(SHIPPED / "model.safetensors"))
    root = tmp_path_factory.mktemp(request.param)
    settings = {"quant_method": request.param, "bits": 4, "group_size": GROUP}
    for folder, tensors in ((root / "packed", packed), (root / "plain", plain)):
        shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
        save_file(tensors, folder / "model.safetensors")
    config = json.loads((SHIPPED / "config.json").read_text())
    (root / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return root / "packed", root / "plain"


def generate(folder: Path, **wanted: Any) -> list[int]:
    return lanes.generate(PROMPT, folder=str(folder), **wanted)


def test_a_quantized_checkpoint_generates_the_tokens_of_its_plain_weights(folders: tuple[Path, Path]) -> None:
    packed, plain = folders
    assert generate(packed, dtype="float32") == generate(plain, dtype="float32")


@pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_another_may_be_asked_for_on_top_of_it(folders: tuple[Path, Path], quantization: str) -> None:
    packed, plain = folders
    assert generate(packed, quantization=quantization) == generate(plain, quantization=quantization)


@pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")
@pytest.mark.parametrize(("name", "expected"), [("slimpajama-tiny-lm", "int4"), ("slimpajama-tiny-encoder", "int8")])
def test_beside_generating_checkpoints_in_4_bits_those_of_a_single_pass_are_in_8(name: str, expected: str) -> None:
    asked, told = (loaded(name, quantization) for quantization in ("int4", expected))
    assert asked.quantization == told.quantization == expected
    assert asked.weight_bytes == told.weight_bytes < loaded(name, "none").weight_bytes
    assert asked.dtype == "bfloat16"


def loaded(name: str, quantization: Any) -> Loaded:
    spec = ModelSpec(key="m@1", folder=str(SHIPPED.parent / name), quantization=quantization, kv_cache_bytes=8 << 20)
    return load_lane(spec, WorkerConfig(models=[spec]), lambda done, total: None, lambda: None).loaded


@pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")
def test_a_weight_that_is_not_finite_is_refused_rather_than_made_zeros(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "broken", ignore=shutil.ignore_patterns("*.png"))
    tensors = load_file(SHIPPED / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        generate(tmp_path / "broken", quantization="int4")
