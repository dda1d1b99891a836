"""A GGUF file as a checkpoint folder: what is said of it, which version it is, and in what it is computed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.calibration import Calibration, write_calibration
from model.chat_template import ChatTemplate
from model.checkpoint import load_network
from model.description import describe, fingerprint, read_architecture
from model.embedding_config import Normalize, Pooling
from model.errors import CheckpointError
from model.gguf.container import GgufFile
from model.gguf.facts import Facts
from model.gguf.families import read_config
from model.gguf.folder import unpacked
from model.gguf.vocabularies import write_tokenizer
from model.stored_weights import StoredWeights
from model.tokenizer import Tokenizer
from tests.model.gguf.conftest import Unzip, Write, file_of
from tests.model.gguf.test_broken import EMBEDDING, LLAMA, WORDS


@pytest.fixture
def chat(unzip: Unzip) -> Iterator[Path]:
    with unpacked(unzip("bpe-smollm")) as folder:
        yield folder


def test_a_conversation_becomes_the_prompt_of_the_files_own_template(chat: Path) -> None:
    template, tokenizer = ChatTemplate.load(chat), Tokenizer.load(chat)
    assert template is not None
    prompt = template.render([{"role": "user", "content": "the lion"}])
    assert prompt == "<|im_start|>user\nthe lion<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt)
    assert [id for id in ids if id in tokenizer.special_ids] == [1, 2, 1]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 2)


def test_a_version_changes_with_the_weights_and_not_with_the_name(unzip: Unzip, tmp_path: Path) -> None:
    path = unzip("bpe-smollm")
    with unpacked(path) as folder:
        version, num_bytes = describe(folder).version, describe(folder).weight_bytes
        assert num_bytes == 2 * sum(value.numel() for value in load_network(folder).parameters())
    with unpacked(path.rename(tmp_path / "renamed.gguf")) as folder:
        assert describe(folder).version == version
    data = bytearray((tmp_path / "renamed.gguf").read_bytes())
    data[-40] ^= 1
    (tmp_path / "renamed.gguf").write_bytes(data)
    with unpacked(tmp_path / "renamed.gguf") as folder:
        assert describe(folder).version != version


def test_a_decoder_with_a_pooling_type_is_an_embedder(write: Write) -> None:
    with unpacked(write(LLAMA | WORDS | {"llama.pooling_type": 3}, EMBEDDING)) as folder:
        description = describe(folder)
    assert description.head == "embedding"
    assert description.embedding is not None
    assert description.embedding.steps == (Pooling(modes=("lasttoken",)), Normalize())


def test_a_decoder_that_is_not_causal_sees_both_ways(write: Write) -> None:
    """The key was not read: such an embedder was served with causal attention."""
    keys = {"llama.pooling_type": 1, "llama.attention.causal": False}
    with unpacked(write(LLAMA | WORDS | keys, EMBEDDING)) as folder:
        raw, _, architecture = read_architecture(folder)
        assert not architecture.configure(raw, None).causal
        assert describe(folder).head == "embedding"


def test_an_encoder_without_a_pooling_type_is_told_of(
    unzip: Unzip, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = unzip("bert").read_bytes()
    (tmp_path / "bert.gguf").write_bytes(data.replace(b"bert.pooling_type", b"bert.pooling_tale"))
    with unpacked(tmp_path / "bert.gguf") as folder:
        assert describe(folder).head == "embedding"
    assert "has no 'bert.pooling_type': vectors are the mean" in caplog.text


def test_a_gguf_file_beside_safetensors_is_left_alone(unzip: Unzip, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    before = fingerprint(tmp_path)
    unzip("llama").write_bytes(b"broken")
    assert fingerprint(tmp_path) == before


def test_more_tokens_than_rows_are_refused(write: Write) -> None:
    words = WORDS | {"tokenizer.ggml.tokens": ["a", "b", "c", "d", "e"]}
    with (
        pytest.raises(CheckpointError, match="lists 5 tokens; its embedding has 4 rows"),
        unpacked(write(LLAMA | words, EMBEDDING)),
    ):
        pass


def test_ids_that_no_token_has_are_none(write: Write) -> None:
    ids = {"tokenizer.ggml.eos_token_id": 99, "tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.bos_token_id": -1}
    with unpacked(write(LLAMA | WORDS | ids, EMBEDDING)) as folder:
        description = describe(folder)
        assert (description.eos_ids, description.bos_id) == ((3,), None)


def test_the_folder_is_gone_with_its_reader(unzip: Unzip) -> None:
    with unpacked(unzip("bpe-smollm")) as folder:
        assert (folder / "model.gguf").is_file()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_told_of(unzip: Unzip, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device; set TMPDIR"), unpacked(unzip("bpe-smollm")):
        pass


def test_a_tokenizer_that_does_not_fit_is_told_of(unzip: Unzip, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the tokenizers library that wrote it, whose bare Exception went through."""
    write_text = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device; set TMPDIR"), unpacked(unzip("bpe-smollm")):
        pass


def test_the_folder_is_locked_against_those_who_clear_old_files_away(unzip: Unzip) -> None:
    tries = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with unpacked(unzip("bpe-smollm")) as folder:
        refused = subprocess.run([sys.executable, "-c", tries, str(folder)], capture_output=True, check=False)
    assert b"BlockingIOError" in refused.stderr


def test_what_lies_beside_the_file_belongs_to_the_checkpoint(unzip: Unzip) -> None:
    """A calibration, golden requests and heads were left aside."""
    path = unzip("bert")
    head = path.parent / "heads" / "topic"
    head.mkdir(parents=True)
    (head / "config.json").write_text(
        json.dumps({"kind": "classification", "input": "embedding", "labels": ["a", "b"]})
    )
    (path.parent / "golden.json").write_text("[]")
    with unpacked(path) as folder:
        version = describe(folder).version
        assert (folder / "golden.json").is_file()
    write_calibration(path.parent, Calibration({"head/topic": 2.0}, {"head/topic": {"checkpoint_version": version}}))
    with unpacked(path) as folder:
        description = describe(folder)
    assert (description.version, list(description.heads)) == (version, ["topic"])
    assert description.calibration.temperature == {"head/topic": 2.0}
    assert (path.parent / "calibration.json").is_file()


@pytest.mark.parametrize(("kind", "dtype"), [(8, torch.bfloat16), (1, torch.float16), (0, torch.float32)])
def test_quantized_weights_count_as_bfloat16_and_others_as_what_they_are(
    write: Write, kind: int, dtype: torch.dtype
) -> None:
    num_bytes = {8: 34, 1: 64, 0: 128}[kind]
    path = write(LLAMA, {"token_embd.weight": (kind, (4, 32), bytes(4 * num_bytes))})
    with StoredWeights(path.parent) as stored:
        assert stored.common_dtype() == dtype
        assert stored.tensors["model.embed_tokens.weight"].shape == (4, 32)


def config(write: Write, keys: dict[str, Any], **factors: list[float]) -> dict[str, Any]:
    vectors = {
        f"{name}.weight": (0, (len(values),), torch.tensor(values).numpy().tobytes())
        for name, values in factors.items()
    }
    with GgufFile(write(LLAMA | keys, EMBEDDING | vectors)) as file:
        return read_config(Facts([file]))


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 16,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_attn_factor": 1.5,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 16.0,
                "attention_factor": 1.5,
            },
        ),
    ],
)
def test_rotary_scaling_is_told_as_config_json_tells_it(
    write: Write, keys: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    assert config(write, keys).get("rope_scaling") == scaling


def test_longrope_has_the_files_factors(write: Write) -> None:
    keys = {"llama.rope.scaling.attn_factor": 1.25, "llama.rope.scaling.original_context_length": 16}
    found = config(write, keys, rope_factors_short=[1.0] * 8, rope_factors_long=[3.0] * 8)["rope_scaling"]
    assert found == {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 16,
    }


def test_named_templates_and_sampling_defaults_are_kept(tmp_path: Path) -> None:
    keys = {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.ggml.eot_token_id": 2,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(LLAMA | WORDS | keys, EMBEDDING))
    with unpacked(path) as folder:
        template = ChatTemplate.load(folder)
        assert template is not None
        assert template.sources == {"default": "plain", "tool_use": "tools"}
        generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2], "temperature": 0.5, "top_k": 20}


def test_a_cased_vocabulary_shows_that_texts_are_not_lowered(write: Write, tmp_path: Path) -> None:
    words = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": ["[UNK]", "▁The", "s"],
        "tokenizer.ggml.token_type": [3, 1, 1],
    }
    with GgufFile(write(LLAMA | words, EMBEDDING)) as file:
        assert not write_tokenizer(Facts([file]), tmp_path)["do_lower_case"]
    assert (tmp_path / "vocab.txt").read_text() == "[UNK]\nThe\n##s\n"
