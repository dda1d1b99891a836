"""An adapter's folder is a checkpoint's: its base is found, its own files hold, and the rest are the base's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import make

from model.adapters.config import read_adapter_config
from model.adapters.folder import find_base, is_adapter, joined
from model.chat_template import ChatTemplate
from model.description import CheckpointDescription, describe
from model.errors import CheckpointError, HubError, UnsupportedArchitectureError
from model.hub import resolve
from model.tokenizer import Tokenizer
from tests.model.adapters.conftest import Store, pair, parameters

PARTS = pair("model.layers.0.self_attn.q_proj", 8, 8)
BERT_PARTS = pair("bert.encoder.layer.0.attention.self.query", 32, 32)


def described(folder: Path) -> CheckpointDescription:
    with joined(folder, find_base(folder)) as whole:
        return describe(whole)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("kind", ["beside", "absolute", "symbolic"])
def test_a_local_base_is_found(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A relative way begins in the adapter's folder, wherever the service runs."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    where = {"beside": "../base", "absolute": str(tmp_path / "base"), "symbolic": "../link"}[kind]
    folder = store(PARTS, base_model_name_or_path=where)
    assert find_base(folder) == (tmp_path / "base").resolve()


def test_a_base_is_fetched_by_its_name_and_revision(
    hub: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make("llama", tmp_path / "made")
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    hub.repositories["maker/base"] = {"main": {"config.json": b"{}"}, "v2": files}
    folder = store(PARTS, base_model_name_or_path="maker/base", revision="v2")
    options = {"cache_dir": tmp_path / "cache", "endpoint": hub.endpoint}
    found = find_base(folder, **options)
    assert found is not None
    assert (found / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert find_base(folder, cache_dir=tmp_path / "cache", offline=True) == found
    assert read_adapter_config(folder).base_name == "maker/base"


def test_an_adapter_on_the_hub_is_fetched_without_those_of_its_training(hub: Any, store: Store, tmp_path: Path) -> None:
    """Adapters were left on the hub, as what a checkpoint's folder has besides its weights."""
    folder = store(PARTS)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["maker/adapter"] = {"main": files | {"checkpoint-5/adapter_model.safetensors": b"a step's"}}
    found = resolve("maker/adapter", cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    assert sorted(path.name for path in found.rglob("*")) == sorted(files)
    assert is_adapter(found)


def test_a_base_that_is_nowhere_is_looked_for_and_named(hub: Any, store: Store, tmp_path: Path) -> None:
    folder = store(PARTS, base_model_name_or_path="maker/none")
    with pytest.raises(HubError) as caught:
        find_base(folder, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    for place in (str(folder), "'maker/none'", str(folder / "maker/none"), "neither a folder nor a model"):
        assert place in str(caught.value)
    lost = store(PARTS, folder="lost", base_model_name_or_path="/home/me/models/base")
    with pytest.raises(HubError, match="/home/me/models/base"):
        find_base(lost)


def test_an_adapter_of_an_adapter_is_refused(store: Store) -> None:
    store(PARTS)
    folder = store(PARTS, folder="second", base_model_name_or_path="../adapter")
    with pytest.raises(UnsupportedArchitectureError, match="is an adapter itself"):
        find_base(folder)


def test_merged_weights_beside_an_adapter_are_the_checkpoint(store: Store, tmp_path: Path) -> None:
    folder = store(PARTS)
    before = parameters(tmp_path / "base")
    for path in (tmp_path / "base").iterdir():
        shutil.copy(path, folder)
    assert find_base(folder) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(folder).items())


def test_it_is_described_by_its_base_and_versioned_by_both(store: Store, tmp_path: Path) -> None:
    folder = store(PARTS)
    base, found = describe(tmp_path / "base"), described(folder)
    assert (found.architecture, found.tasks, found.context_length) == (base.architecture, base.tasks, 64)
    assert (found.base, base.base) == ("base", None)
    assert found.version == described(folder).version != base.version
    versions = {found.version}
    settings = json.loads((folder / "adapter_config.json").read_text())
    write(folder, "adapter_config.json", settings | {"lora_alpha": 4})
    versions.add(described(folder).version)
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    versions.add(described(folder).version)
    assert len(versions) == 3


def test_the_joined_folder_is_gone_afterwards(store: Store, tmp_path: Path) -> None:
    folder = store(PARTS)
    with joined(folder, tmp_path / "base") as whole:
        assert (whole / "config.json").is_file()
    assert not whole.exists()
    assert not whole.parent.exists()
    assert (tmp_path / "base" / "config.json").is_file()


def test_what_was_measured_of_the_base_alone_is_left_behind(store: Store, tmp_path: Path) -> None:
    folder = store(PARTS)
    for name in ("calibration.json", "golden.json", "heads/spam/config.json", "checkpoint-5/model.safetensors"):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "base", name, {"version": 1})
    write(folder, "checkpoint-5/adapter_model.safetensors", "a step's")
    (folder / "heads").mkdir()
    write(folder, "heads/mine/config.json", {})
    with joined(folder, tmp_path / "base") as whole:
        names = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "heads/mine/config.json"),
        *("joined-adapter/adapter_config.json", "joined-adapter/adapter_model.safetensors"),
    }


def test_a_tokenizer_of_its_own_replaces_all_files_of_the_bases(store: Store, tmp_path: Path) -> None:
    folder = store(PARTS)
    write(tmp_path / "base", "special_tokens_map.json", {"additional_special_tokens": ["<base>"]})
    with joined(folder, tmp_path / "base") as whole:
        assert Tokenizer.load(whole).token_id("<base>") is not None
    document = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 300, "content": "<mine>"})
    write(folder, "tokenizer.json", document)
    with joined(folder, tmp_path / "base") as whole:
        tokenizer = Tokenizer.load(whole)
    assert tokenizer.token_id("<mine>") is not None
    assert tokenizer.token_id("<base>") is None


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_is_its_own_or_else_the_bases(store: Store, tmp_path: Path, where: str) -> None:
    """The base's was lost with its tokenizer_config.json, where the adapter had one without."""

    def put(folder: Path, template: str) -> None:
        if where == "chat_template.jinja":
            write(folder, where, template)
        else:
            write(folder, where, {"bos_token": "<s>", "chat_template": template})

    def rendered() -> str:
        with joined(folder, tmp_path / "base") as whole:
            assert describe(whole).has_chat_template
            template = ChatTemplate.load(whole)
        assert template is not None
        return template.render([{"role": "user", "content": "hello"}])

    folder = store(PARTS)
    put(tmp_path / "base", "base: {{ messages[0].content }}")
    assert rendered() == "base: hello"
    for name in ("tokenizer.json", "special_tokens_map.json"):
        if (tmp_path / "base" / name).exists():
            shutil.copy(tmp_path / "base" / name, folder)
    write(folder, "tokenizer_config.json", {"bos_token": "<s>"})
    assert rendered() == "base: hello"
    put(folder, "mine: {{ messages[0].content }}")
    assert rendered() == "mine: hello"


def test_generation_settings_are_its_own_or_else_the_bases(store: Store, tmp_path: Path) -> None:
    folder = store(PARTS)
    write(tmp_path / "base", "generation_config.json", {"temperature": 0.25, "top_k": 9})
    assert described(folder).generation_defaults == {"temperature": 0.25, "top_k": 9}
    write(folder, "generation_config.json", {"temperature": 0.5})
    assert described(folder).generation_defaults == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("labels", "config", "expected"),
    [
        (5, None, tuple(f"LABEL_{index}" for index in range(5))),
        (3, None, ("bad", "fair", "good")),
        (2, {"id2label": {"0": "no", "1": "yes"}}, ("no", "yes")),
    ],
)
def test_labels_are_as_many_as_were_trained(
    store: Store, tmp_path: Path, labels: int, config: dict[str, Any] | None, expected: tuple[str, ...]
) -> None:
    head = {
        "base_model.model.classifier.weight": torch.ones(labels, 32),
        "base_model.model.classifier.bias": torch.ones(labels),
    }
    folder = store(BERT_PARTS | head, base="three-classes", task_type="SEQ_CLS", modules_to_save=["classifier"])
    if config is not None:
        raw = json.loads((tmp_path / "base" / "config.json").read_text())
        write(folder, "config.json", raw | config)
    assert described(folder).labels == expected
    assert parameters(folder)["network.head.output.weight"].shape == (labels, 32)


@pytest.mark.parametrize(
    ("base", "parts", "task", "architecture"),
    [
        ("llama", PARTS, "SEQ_CLS", "LlamaForSequenceClassification"),
        ("llama", PARTS, "FEATURE_EXTRACTION", "LlamaModel"),
        ("llama", PARTS, "CAUSAL_LM", "LlamaForCausalLM"),
        ("llama", PARTS, None, "LlamaForCausalLM"),
        ("three-classes", BERT_PARTS, "TOKEN_CLS", "BertForTokenClassification"),
        ("three-classes", BERT_PARTS, "QUESTION_ANS", "BertForQuestionAnswering"),
        ("three-classes", BERT_PARTS, "FEATURE_EXTRACTION", "BertModel"),
        ("gpt2", PARTS, "SEQ_CLS", "GPT2ForSequenceClassification"),
    ],
)
def test_its_task_says_what_the_network_is_for(
    store: Store, base: str, parts: dict[str, torch.Tensor], task: str | None, architecture: str
) -> None:
    assert described(store(parts, base=base, task_type=task)).architecture == architecture


@pytest.mark.parametrize(
    ("base", "task", "architecture"),
    [("llama", "TOKEN_CLS", "LlamaForCausalLM"), ("gpt2", "FEATURE_EXTRACTION", "GPT2LMHeadModel")],
)
def test_a_task_that_the_family_has_no_class_for_is_refused(
    store: Store, base: str, task: str, architecture: str
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"{architecture}, has no class for that"):
        described(store(PARTS, base=base, task_type=task))


def test_the_bases_modules_pool_what_the_adapter_embeds_and_not_what_it_classifies(
    store: Store, tmp_path: Path
) -> None:
    folder = store(BERT_PARTS, base="three-classes", task_type="FEATURE_EXTRACTION")
    write(
        tmp_path / "base",
        "modules.json",
        [{"type": "m.Transformer", "path": ""}, {"type": "m.Pooling", "path": "1_Pooling"}],
    )
    write(tmp_path / "base", "1_Pooling/config.json", {"pooling_mode": "cls"})
    found = described(folder)
    assert found.embedding is not None
    assert found.embedding.steps[0].modes == ("cls",)
    settings = json.loads((folder / "adapter_config.json").read_text())
    write(folder, "adapter_config.json", settings | {"task_type": "SEQ_CLS"})
    assert described(folder).head == "sequence_classification"


def test_how_the_base_is_quantized_is_the_bases_to_say(store: Store, tmp_path: Path) -> None:
    """A config of the training's, with the quantization that it was held in then, made plain weights unreadable."""
    folder = store(PARTS)
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    write(folder, "config.json", raw | {"quantization_config": {"quant_method": "hqq"}})
    assert described(folder).architecture == "LlamaForCausalLM"


def test_a_folder_that_cannot_be_written_is_said(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store(PARTS)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"), joined(folder, tmp_path / "base"):
        pass


@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_no_file_outside_of_the_joined_folder_is_written(store: Store, tmp_path: Path, whose: str) -> None:
    """The base's template was written through a link, over the file of whoever had one without a template."""
    folder = store(PARTS)
    shutil.copy(tmp_path / "base" / "tokenizer.json", folder)
    write(tmp_path / "base", "tokenizer_config.json", {"bos_token": "<s>", "chat_template": "base: {{ messages }}"})
    write(tmp_path, "settings.json", {"precious": True})
    (tmp_path / whose / "chat_template.json").symlink_to(tmp_path / "settings.json")
    with joined(folder, tmp_path / "base") as whole:
        template = ChatTemplate.load(whole)
    assert template is not None
    assert template.render([]) == "base: []"
    assert json.loads((tmp_path / "settings.json").read_text()) == {"precious": True}


def test_a_folder_given_from_below_is_joined_within_the_temporary_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`..` as a name led out of the temporary folder, and its links were left in TMPDIR."""
    folder = store(PARTS)
    (folder / "below").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(folder / "below")
    with joined(Path(".."), find_base(Path(".."))) as whole:
        assert whole.name == "adapter"
        assert describe(whole).architecture == "LlamaForCausalLM"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_base_is_not_looked_for_where_the_service_runs(
    hub: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store(PARTS, base_model_name_or_path="maker/base")
    (tmp_path / "here" / "maker").mkdir(parents=True)
    make("llama", tmp_path / "here" / "maker" / "base")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(HubError, match="neither a folder nor a model"):
        find_base(folder, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    hub.repositories["maker/base"] = {"main": {"config.json": b"{}"}}
    found = find_base(folder, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    assert found is not None
    assert found.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("name", ["~nobodyx/b", "~nobodyx", "a" * 4000, "a" * 5000, "a/\0", ""])
def test_a_base_whose_name_no_system_takes_is_refused(store: Store, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path|hub name"):
        find_base(store(PARTS, base_model_name_or_path=name), offline=True)
