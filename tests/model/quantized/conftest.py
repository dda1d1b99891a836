"""Folders of stored weights, quantized or not: recorded ones, and any tensors under any `quantization_config`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.stored_weights import StoredWeights

RECORDED = sorted((Path(__file__).parents[2] / "reference" / "quantized").glob("*.safetensors"))

Store = Callable[..., Path]
"""`store(tensors, shards=2, quant_method="gptq", bits=4)`: a folder; `config` has other keys of config.json."""


@dataclass
class Recording:
    """What `tests/reference/record_quantized.py` wrote of one case."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    logits: Tensor = field(repr=False)

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found


def read_recording(path: Path) -> Recording:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        config = json.loads(file.metadata()["config.json"])
    return Recording(path.stem, config, tensors, tensors.pop("logits"))


@pytest.fixture(params=RECORDED, ids=[path.stem for path in RECORDED])
def recording(request: pytest.FixtureRequest) -> Recording:
    return read_recording(request.param)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    def make(
        tensors: dict[str, Tensor],
        *,
        shards: int = 1,
        folder: str = "model",
        config: dict[str, Any] | None = None,
        **quantization: Any,
    ) -> Path:
        path = tmp_path / folder
        path.mkdir()
        values = (config or {}) | ({"quantization_config": quantization} if quantization else {})
        (path / "config.json").write_text(json.dumps(values))
        if shards == 1:
            save_file(tensors, path / "model.safetensors")
            return path
        names = sorted(tensors)
        files = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return path

    return make


def read_weight(folder: Path, name: str = "m.weight") -> Tensor:
    with StoredWeights(folder) as stored:
        return stored.read(stored.tensors[name])
