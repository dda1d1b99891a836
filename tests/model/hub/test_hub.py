"""A checkpoint by folder or by hub name, fetched from a server that speaks the hub's API."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from model.checkpoint import load_network
from model.errors import HubError
from model.hub import resolve
from model.sentencepiece_families import FAMILIES

NAME = "tiny/llama"
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "vocab_size": 16, **SIZES}


def checkpoint(seed: int) -> dict[str, bytes]:
    """The files of a sharded checkpoint, and some that serving has no use for."""
    generator = torch.Generator().manual_seed(seed)
    layer = {
        **{f"self_attn.{name}_proj": (8, 8) for name in "qkvo"},
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
    }
    shapes = {"model.embed_tokens": (16, 8), "model.norm": (8,), "lm_head": (16, 8)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    files = {file: save({name: tensors[name] for name in group}) for file, group in shards.items()}
    weight_map = {name: file for file, group in shards.items() for name in group}
    return files | {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "pytorch_model.bin": b"a pickle",
        "consolidated.safetensors": b"the same weights once more",
        "README.md": b"# tiny",
        "onnx/model.json": b"{}",
    }


@pytest.fixture
def fetch(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    # The client waits a second before each new try.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.repositories[NAME] = {"main": checkpoint(0), "v2": checkpoint(1)}

    def call(name: str = NAME, **options: Any) -> Path:
        return resolve(name, cache_dir=tmp_path / "cache", endpoint=hub.endpoint, **options)

    return call


def test_a_sharded_checkpoint_is_fetched_by_name_without_pickles_and_second_layouts(
    hub: Any, fetch: Callable[..., Path]
) -> None:
    folder = fetch()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in folder.rglob("*")) == [
        "config.json",
        *shards,
        "model.safetensors.index.json",
    ]
    assert load_network(folder).config.hidden_size == 8


def test_whatever_a_tokenizer_is_made_of_is_fetched(hub: Any, fetch: Callable[..., Path]) -> None:
    """Marian's `source.spm` stayed behind, and what had been fetched could not be served."""
    files = {file for file, _ in FAMILIES.values()}
    files |= {"target.spm", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "tokenizer_config.json"}
    hub.repositories["maker/translator"] = {"main": dict.fromkeys(files, b"{}")}
    assert {path.name for path in fetch("maker/translator").iterdir()} == files


def test_a_revision_is_what_its_name_says(hub: Any, fetch: Callable[..., Path]) -> None:
    main, v2 = load_network(fetch()), load_network(fetch(revision="v2"))
    assert not torch.equal(main.get_parameter("norm.weight"), v2.get_parameter("norm.weight"))
    assert fetch(revision=fetch(revision="v2").name) == fetch(revision="v2")


def test_what_is_in_the_cache_is_not_fetched_again(hub: Any, fetch: Callable[..., Path]) -> None:
    first = fetch()
    hub.downloads.clear()
    assert fetch() == first
    assert hub.downloads == []


def test_offline_uses_the_cache_and_asks_nobody(hub: Any, fetch: Callable[..., Path]) -> None:
    first = fetch()
    hub.num_requests = 0
    assert fetch(offline=True) == first
    assert hub.num_requests == 0
    with pytest.raises(HubError, match="offline mode is on"):
        fetch(revision="v2", offline=True)


def test_a_cached_checkpoint_outlives_the_hub(hub: Any, fetch: Callable[..., Path], tmp_path: Path) -> None:
    first = fetch()
    found = resolve(NAME, cache_dir=tmp_path / "cache", endpoint="http://127.0.0.1:9")
    assert found == first


def test_a_download_that_was_cut_off_is_tried_again(hub: Any, fetch: Callable[..., Path]) -> None:
    shard = "model-00002-of-00002.safetensors"
    hub.cut_after_bytes[shard] = [100]
    folder = fetch()
    assert hub.downloads.count(shard) == 2
    assert load_network(folder).config.hidden_size == 8


def test_a_hub_that_keeps_hanging_up_is_an_error_of_ours(hub: Any, fetch: Callable[..., Path]) -> None:
    hub.cut_after_bytes["model-00002-of-00002.safetensors"] = [100] * 20
    with pytest.raises(HubError, match="cannot fetch"):
        fetch()


@pytest.mark.parametrize(
    ("name", "revision", "advice"),
    [
        ("tiny/none", None, "neither a folder nor a model that the hub knows"),
        (NAME, "v9", "no revision v9"),
        ("tiny/gated", None, "HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(
    hub: Any, fetch: Callable[..., Path], name: str, revision: str | None, advice: str
) -> None:
    hub.gated.add("tiny/gated")
    with pytest.raises(HubError, match=advice):
        fetch(name, revision=revision)


@pytest.mark.parametrize("location", ["../secret", "/no/such/folder", "a/b/c", "a//b", "", "org/na me", "org/..", "-x"])
def test_what_is_neither_folder_nor_name_is_refused_without_asking(
    hub: Any, fetch: Callable[..., Path], location: str
) -> None:
    with pytest.raises(HubError, match="not a folder, nor a GGUF file, nor a hub name"):
        fetch(location)
    assert hub.num_requests == 0


@pytest.mark.parametrize("location", ["models/missing.gguf", "missing.gguf", "/no/such/missing.gguf"])
def test_a_gguf_file_that_is_not_there_is_no_name(hub: Any, fetch: Callable[..., Path], location: str) -> None:
    with pytest.raises(HubError, match=rf"{location}: no such file"):
        fetch(location)
    assert hub.num_requests == 0


def test_a_folder_that_exists_wins_over_a_name(
    hub: Any, fetch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch() == (tmp_path / NAME).resolve()
    assert hub.num_requests == 0


def test_the_environment_chooses_the_hub(hub: Any, fetch: Callable[..., Path], tmp_path: Path) -> None:
    """HF_ENDPOINT is read once, when the hub's client is imported; so in a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    code = f"from model.hub import resolve; print(resolve({NAME!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize("location", ["~nobodyx/b", "a" * 5000, "a/\0b"])
def test_a_name_that_no_system_takes_is_an_error_of_the_checkpoint(location: str) -> None:
    """It was a RuntimeError or an OSError, which POST /admin/models answered with 500."""
    with pytest.raises(HubError):
        resolve(location, offline=True)
