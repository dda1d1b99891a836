"""Drafts as the API process finds them and the worker loads them: whose they are, what they take, what is refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from shipped_adapter import write_shipped_adapter

from model.errors import CheckpointError
from service.engine.aliases import Alias
from service.engine.assembly import load_directory, prepare_model
from service.engine.deployment import Deployment
from service.engine.draft_loading import load_draft
from service.engine.former import Former
from service.engine.loading import load_lane
from service.engine.models import ModelDirectory
from service.engine.protocol import Loaded, WorkerConfig
from service.settings import Settings
from tests.service.engine.drafted import SHIPPED, write_shallow

ROOT = Path(__file__).parents[3]
CONFIG = WorkerConfig(models=[], num_threads=1)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shallow(tmp_path_factory.mktemp("drafts") / "shallow", 2)


def settings_of(draft: Path | None, model: Path = SHIPPED, **changes: Any) -> Settings:
    drafts = () if draft is None else (f"{draft}=lm",)
    return Settings(**({"model": (f"{model}=lm",), "draft": drafts, "kv_cache_memory": "8MiB"} | changes))


def loaded(directory: ModelDirectory) -> Loaded:
    return load_lane(directory["lm"].spec, CONFIG, lambda done, total: None, lambda: None).loaded


def test_a_draft_goes_with_all_versions_of_its_name(shallow: Path, tmp_path: Path) -> None:
    settings = settings_of(shallow, model=SHIPPED)
    directory = load_directory(settings)
    model = directory["lm"]
    assert list(directory) == ["lm"]
    assert model.draft is not None
    assert (model.draft.location, model.spec.draft) == (str(shallow), str(shallow))
    later = prepare_model(settings, "lm", Deployment(source=str(SHIPPED), version="2"), directory)
    assert later.spec.draft == str(shallow)
    without = prepare_model(settings, "lm", Deployment(source=str(SHIPPED), version="3", draft=""), directory)
    assert (without.spec.draft, without.draft) == (None, None)
    other = write_shallow(tmp_path / "other", 1)
    another = prepare_model(settings, "lm", Deployment(source=str(SHIPPED), version="4", draft=str(other)), directory)
    assert another.spec.draft == str(other)
    elsewhere = prepare_model(settings, "new", Deployment(source=str(SHIPPED)), directory)
    assert elsewhere.spec.draft is None
    assert Former.of(Alias({model.version: 1.0}), {model.version: model}).models[model.version].spec.draft == str(
        shallow
    )


def test_a_drafts_weights_and_blocks_are_counted_and_fit_into_what_was_given(shallow: Path) -> None:
    alone, both = loaded(load_directory(settings_of(None))), loaded(load_directory(settings_of(shallow)))
    small = loaded(load_directory(settings_of(None, model=shallow)))
    assert both.weight_bytes == alone.weight_bytes + small.weight_bytes
    assert both.kv_cache_bytes <= 8 << 20
    assert both.num_blocks < alone.num_blocks
    per_block = alone.kv_cache_bytes // (alone.num_blocks + 1) + small.kv_cache_bytes // (small.num_blocks + 1)
    assert both.kv_cache_bytes == (both.num_blocks + 1) * per_block
    assert both.kv_cache_bytes + per_block > 8 << 20


def test_rows_without_tokens_and_tokens_beyond_those_of_the_large_network_are_no_matter(tmp_path: Path) -> None:
    padded = write_shallow(tmp_path / "padded", 1, extra_ids=64)
    tokenizer = json.loads((padded / "tokenizer.json").read_text())
    more = tokenizer["added_tokens"][0] | {"id": 6144, "content": "<|more|>"}
    tokenizer["added_tokens"].append(more)
    (padded / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert loaded(load_directory(settings_of(padded))).num_blocks > 0


def swapped(folder: Path) -> Path:
    """Two tokens have each other's ids."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "other vocabulary": (
        lambda root: tiny_checkpoints.make("llama", root / "other"),
        r"other cannot guess tokens for 'lm': [\d,]+ of that one's 6,144 have another id here, or none; '.*', for one, "
        r"is \d+ there and (none|\d+) here",
    ),
    "other ids": (
        lambda root: swapped(write_shallow(root / "swapped", 1)),
        "2 of that one's 6,144 have another id here, or none; 'a', for one, is 68 there and 69 here",
    ),
    "an encoder": (lambda _: ROOT / "checkpoints/slimpajama-tiny-encoder", "it is no decoder that generates"),
    "an adapter": (lambda root: write_shipped_adapter(root)[0], "is an adapter: a draft is a checkpoint by itself"),
    "nothing": (lambda root: root / "absent", "absent"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_guess_is_refused_with_the_difference(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        load_directory(settings_of(make(tmp_path)))


def test_what_has_nothing_to_guess_gets_no_draft(shallow: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'lm' has a draft, .*shallow, but is no decoder that generates"):
        load_directory(settings_of(shallow, model=ROOT / "checkpoints/slimpajama-tiny-encoder"))


def test_an_adapter_that_is_deployed_has_no_draft_of_its_own(shallow: Path, tmp_path: Path) -> None:
    write_shipped_adapter(tmp_path)
    directory = load_directory(settings_of(shallow, model=tmp_path / "base"))
    deployment = Deployment(source=str(tmp_path / "adapter"), adapter=True)
    settings = settings_of(shallow, model=tmp_path / "base")
    assert prepare_model(settings, "one", deployment, directory).spec.draft is None
    with pytest.raises(ValueError, match="draft: an adapter has its base's"):
        prepare_model(
            settings, "one", Deployment(source=str(tmp_path / "adapter"), adapter=True, draft=str(shallow)), directory
        )


def test_a_gguf_file_may_guess_and_is_unpacked_as_long_as_it_does(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(gzip.decompress((ROOT / "tests/reference/gguf/bpe-smollm.gguf.gz").read_bytes()))
    model = load_directory(settings_of(file, model=file))["lm"]
    assert model.draft is not None
    assert model.draft.unpacked is not None
    folder = model.draft.unpacked.folder
    assert (model.spec.draft, model.draft.location) == (str(folder), str(file))
    assert folder.is_dir()
    assert folder != Path(model.spec.folder)
    del model
    assert not folder.exists()


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        ({"num_ranks": 2}, "cpu", "a draft is not to be had with tensor_parallel_size above 1"),
        ({}, "cuda", "a draft needs a CPU"),
    ],
)
def test_where_a_draft_is_not_to_be_had_loading_says_so(
    shallow: Path, config: dict[str, Any], device: str, message: str
) -> None:
    spec = load_directory(settings_of(shallow))["lm"].spec
    with pytest.raises(CheckpointError, match=message):
        load_draft(spec, WorkerConfig(models=[], **config), torch.device(device))
