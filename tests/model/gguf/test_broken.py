"""Files that are cut off, that lie about their lengths, or that hold what is not read, are refused by name."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError, UnsupportedArchitectureError
from model.gguf.container import GgufFile, files_of
from model.gguf.facts import Facts
from model.gguf.families import read_config
from model.gguf.folder import unpack
from model.gguf.tensors import GgufTensors
from model.gguf.vocabularies import write_tokenizer
from tests.model.gguf.conftest import Unzip, Write, file_of

HUGE = struct.pack("<Q", 1 << 62)
LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.feed_forward_length": 32,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
EXPERTS = {"llama.expert_count": 2, "llama.expert_used_count": 1}
EMBEDDING = {"token_embd.weight": (0, (4, 32), bytes(4 * 32 * 4))}
EIGHT = (0, (8,), struct.pack("<8f", *[1.0] * 8))
WORDS: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "c", "ab"]}


def of(kind: str) -> dict[str, Any]:
    """The same keys, of another architecture."""
    return {key.replace("llama.", f"{kind}."): value for key, value in LLAMA.items()} | {"general.architecture": kind}


def config(path: Path) -> dict[str, Any]:
    with GgufFile(path) as file:
        return read_config(Facts([file]))


def sound() -> bytes:
    return file_of(LLAMA | WORDS | {"tokenizer.ggml.scores": [0.5] * 4}, EMBEDDING)


def test_versions_2_and_3_are_read(tmp_path: Path) -> None:
    for version in (2, 3):
        path = tmp_path / "model.gguf"
        path.write_bytes(file_of(LLAMA, EMBEDDING, version=version))
        with GgufFile(path) as file:
            assert file.metadata == LLAMA | {"llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5)}
            assert file.tensors["token_embd.weight"].shape == (4, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "cannot read"),
        (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "its version is 1"),
        (lambda data: data[:8] + HUGE + data[16:], "cut off"),
        (lambda data: data[:16] + HUGE + data[24:], "cut off"),
        (lambda data: data[:24] + HUGE + data[32:], "cut off"),
        (lambda data: data[:-1], "'token_embd.weight' ends 1 bytes behind the end"),
        (lambda data: data.replace(b"ggml.scores", b"ggml.tokens"), "'tokenizer.ggml.tokens' twice"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], said: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(change(sound()))
    with pytest.raises(CheckpointError, match=said) as caught:
        config(path)
    assert "model.gguf" in str(caught.value)


@given(place=st.integers(0, len(sound()) - 1), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_damage_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, *, cut: bool
) -> None:
    data = bytearray(sound())
    data[place] = byte
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(data[:place] if cut else data)
    try:
        with GgufFile(path) as file:
            facts = Facts([file])
            read_config(facts)
            write_tokenizer(facts, path.parent)
        with GgufTensors(path.parent) as stored:
            for tensor in stored.tensors.values():
                stored.read(tensor)
    except CheckpointError:
        pass


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({"general.architecture": "mamba"}, {}, "'mamba' cannot be read, only of llama, qwen2"),
        ({}, {"blk.0.ffn_up.weight": (16, (32, 32), bytes(9000))}, "stored as IQ2_XXS; read are F32, F16, Q4_0"),
        ({}, {"x": (99, (32, 32), b"")}, "stored as type 99"),
        ({"general.architecture": "qwen2", "qwen2.expert_count": 8}, {}, "mixture of experts .* 'qwen2'"),
        ({"llama.expert_count": 8}, {}, "'llama.expert_used_count'"),
        ({**EXPERTS, "llama.expert_weights_scale": 2.5}, {}, "'llama.expert_weights_scale' is not supported"),
        ({**EXPERTS, "llama.expert_gating_func": 2}, {}, "expert_gating_func' is 2; expected 1"),
        ({**EXPERTS, "llama.expert_weights_norm": False}, {}, "expert_weights_norm' is False; expected true"),
        ({"llama.attention.value_length": 8}, {}, "another width"),
        ({"llama.rope.scaling.type": "spiral", "llama.rope.scaling.factor": 2.0}, {}, "rotary scaling 'spiral'"),
        ({"llama.attention.head_count_kv": [1, 2]}, {}, "head_count_kv"),
        ({"llama.block_count": "many"}, {}, "'llama.block_count' is 'many'"),
        ({"general.alignment": 24}, {}, "alignment is 24"),
        ({"llama.rope.scaling.factor": math.inf}, {}, "'llama.rope.scaling.factor' is inf"),
        ({"llama.rope.scaling.factor": -2.0}, {}, "'llama.rope.scaling.factor' is -2.0"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0}, {}, "expected a finite number above 0"),
        ({"llama.rope.freq_base": 0.0}, {}, "'llama.rope.freq_base' is 0.0"),
        ({"llama.rope.freq_base": math.nan}, {}, "'llama.rope.freq_base' is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, {}, "layer_norm_rms_epsilon' is nan"),
        ({"llama.rope.dimension_count": 7}, {}, "dimension_count' is 7; expected an even number of at most 16"),
        ({"llama.rope.dimension_count": 4096}, {}, "dimension_count' is 4,096"),
        ({}, {"rope_factors_long.weight": EIGHT}, "'rope_factors_long.weight' is there without 'rope_factors_short"),
        ({}, {"rope_factors_short.weight": EIGHT}, "'rope_factors_short.weight' is there without 'rope_factors_long"),
        ({}, {"rope_freqs.weight": (0, (3,), bytes(12))}, r"has the shape \[3\]; expected \[8\]"),
        ({}, {"rope_freqs.weight": (0, (8,), bytes(32))}, "not finite and above 0"),
        (of("stablelm"), {"blk.0.attn_q_norm.weight": EIGHT}, "StableLM with normed queries and keys"),
        (of("glm4") | {"glm4.rope.dimension_sections": [1, 2]}, {}, "rotary positions of several kinds"),
        (of("mpt"), {"blk.0.attn_qkv.bias": EIGHT}, "MPT with biases"),
        (of("granite"), {}, "'granite.logit_scale'"),
        (
            of("granite") | {"granite.logit_scale": 0.0},
            {},
            "'granite.logit_scale' is 0.0; expected a finite number above 0",
        ),
        (of("gptneox") | {"gptneox.use_parallel_residual": 3}, {}, "'gptneox.use_parallel_residual' is 3"),
    ],
)
def test_what_is_not_read_is_named(write: Write, keys: dict[str, Any], tensors: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        config(write(LLAMA | keys, EMBEDDING | tensors))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32), (32,)])
def test_a_tensor_that_has_not_a_matrix_of_each_expert_is_named(write: Write, shape: tuple[int, ...]) -> None:
    path = write(LLAMA | EXPERTS, EMBEDDING | {"blk.0.ffn_up_exps.weight": (0, shape, bytes(math.prod(shape) * 4))})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up_exps\.weight' has shape .* matrices of 2 experts"):
        GgufTensors(path.parent).__enter__()


def test_a_gate_that_is_stored_as_a_vector_is_a_row(write: Write) -> None:
    keys = {key.replace("llama", "qwen2moe"): value for key, value in (LLAMA | EXPERTS).items()}
    gate = {"blk.0.ffn_gate_inp_shexp.weight": (0, (32,), bytes(128))}
    path = write(keys | {"general.architecture": "qwen2moe"}, EMBEDDING | gate)
    with GgufTensors(path.parent) as stored:
        assert stored.tensors["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 32)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv' cannot be read, only of gpt2, llama, bert"),
        ({"tokenizer.ggml.pre": "gemma4"}, "as 'gemma4' does"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a", "c"]}, "'a' is there twice"),
        ({"tokenizer.ggml.merges": ["a b", "x"]}, "without a space"),
        ({"tokenizer.ggml.merges": ["a x"]}, "do not fit its tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 entries for 4 tokens"),
        ({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a", "b\nc"]}, "line break"),
    ],
)
def test_tokenizers_that_cannot_be_made_are_refused(
    write: Write, tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    with GgufFile(write(LLAMA | WORDS | keys, EMBEDDING)) as file, pytest.raises(CheckpointError, match=said):
        write_tokenizer(Facts([file]), tmp_path)


def test_a_reranker_is_refused_and_leaves_no_folder_behind(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(UnsupportedArchitectureError, match="rerankers"):
        unpack(write(LLAMA | WORDS | {"llama.pooling_type": 4}, EMBEDDING))
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("value", [math.nan, -1.0, "hot"])
def test_a_sampling_default_that_is_none_is_refused(write: Write, value: Any) -> None:
    """It was a traceback in `slimpajama models`, or a temperature that no request can have."""
    with pytest.raises(CheckpointError, match=f"'general.sampling.temp' is '?{value}"):
        unpack(write(LLAMA | WORDS | {"general.sampling.temp": value}, EMBEDDING))


def test_an_encoder_that_pools_nothing_is_refused(unzip: Unzip) -> None:
    path = unzip("bert")
    data, key = path.read_bytes(), b"bert.pooling_type" + struct.pack("<I", 4)
    assert key in data
    place = data.index(key) + len(key)
    path.write_bytes(data[:place] + struct.pack("<I", 0) + data[place + 4 :])
    with pytest.raises(UnsupportedArchitectureError, match=r"'bert\.pooling_type' is 0"):
        unpack(path)


def test_a_path_stands_for_one_model(unzip: Unzip, tmp_path: Path) -> None:
    one = unzip("llama")
    assert files_of(one) == files_of(tmp_path) == (one,)
    (tmp_path / "mmproj-model.gguf").write_bytes(one.read_bytes())
    assert files_of(tmp_path) == (one,)
    two = unzip("qwen2")
    with pytest.raises(CheckpointError, match=r"several GGUF models \(llama.gguf, qwen2.gguf\)"):
        files_of(tmp_path)
    two.unlink()
    (tmp_path / "model.safetensors").touch()
    assert files_of(tmp_path) == ()


def test_all_parts_of_a_set_are_wanted(write: Write, tmp_path: Path) -> None:
    first = write(LLAMA, {}, "m-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"part 2 of 2 is missing: .*m-00002-of-00002\.gguf"):
        files_of(first)
    second = write({}, EMBEDDING, "m-00002-of-00002.gguf")
    assert files_of(first) == files_of(tmp_path) == (first, second)
    with pytest.raises(CheckpointError, match="part 2 of 2; give the first"):
        files_of(second)
    with GgufTensors(tmp_path) as stored:
        assert stored.read(stored.tensors["model.embed_tokens.weight"]).shape == (4, 32)


def test_a_set_that_does_not_begin_or_does_not_end_is_refused(write: Write, tmp_path: Path) -> None:
    second = write({}, EMBEDDING, "m-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"part 1 of 2 is missing: .*m-00001-of-00002\.gguf"):
        files_of(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match="part 1 of none"):
        files_of(write(LLAMA, {}, "m-00001-of-00000.gguf"))
    with pytest.raises(CheckpointError, match=r"'split.count' is 3; expected 1"):
        config(write(LLAMA | {"split.count": 3}, EMBEDDING))


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Sixty thousand of them made a file of a few MiB take gigabytes."""
    path = tmp_path / "model.gguf"
    data = file_of(LLAMA, EMBEDDING | {"output.weight": EMBEDDING["token_embd.weight"]})
    place = data.index(b"output.weight") + len(b"output.weight") + 4 + 2 * 8 + 4
    assert data[place : place + 8] == struct.pack("<Q", 512)
    path.write_bytes(data[:place] + struct.pack("<Q", 256) + data[place + 8 :])
    with pytest.raises(CheckpointError, match=r"'output.weight' begins before the end of 'token_embd.weight'"):
        config(path)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ((8, (), bytes(34)), "has rows of 1 values; Q8_0 has 32 a block"),
        ((0, (4, 0), b""), r"has the shape \[4, 0\]"),
        ((0, (1 << 62, 0), b""), r"has the shape \[4611686018427387904, 0\]"),
        ((99, (1 << 62,), b""), "sizes are 1 to"),
    ],
)
def test_a_tensor_of_no_size_is_refused(write: Write, tensor: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        config(write(LLAMA, EMBEDDING | {"x": tensor}))
