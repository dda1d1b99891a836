"""BERTs with rotary positions, as their authors stored them before transformers had them, give its states."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from model.description import describe
from model.errors import CheckpointError

Run = Callable[..., list[NDArray[np.float32]]]
MakeModel = Callable[..., tuple[Path, PreTrainedModel]]

NOMIC = {
    "activation_function": "swiglu",
    "architectures": ["NomicBertModel"],
    "causal": False,
    "fused_bias_fc": True,
    "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 20,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "model_type": "nomic_bert",
    "n_embd": 32,
    "n_head": 4,
    "n_inner": 48,
    "n_layer": 3,
    "n_positions": 80,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": 2,
    "scale_attn_weights": True,
    "type_vocab_size": 2,
    "use_rms_norm": False,
    "vocab_size": 90,
}
"""The keys of nomic-embed-text-v1's `config.json`."""


def states(folder: Path, model: PreTrainedModel, ids: list[int]) -> NDArray[np.float32]:
    """What transformers makes of a text alone, read anew: its stretch would stay with what comes after a long text."""
    with torch.no_grad():
        states: torch.Tensor = type(model).from_pretrained(folder)(torch.tensor([ids])).last_hidden_state[0]
    return states.numpy()


@pytest.mark.parametrize("num_heads", [4, 1])
def test_nomic_as_its_authors_store_it_stretches_each_long_text_by_itself(
    num_heads: int, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    """A head of 32 is one that the compiled encoder takes, with an inner size of as many."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
    changes = {"num_attention_heads": num_heads, "intermediate_size": 64, "max_position_embeddings": 20}
    folder, model = make_model("nomic-bert", **changes, rope_parameters=rope)
    expected = [states(folder, model, ids) for ids in texts]
    assert describe(folder).context_length == 20
    (folder / "config.json").write_text(json.dumps(NOMIC | {"n_head": num_heads, "n_inner": 64}))
    weights = load_file(folder / "model.safetensors")
    save_file({f"bert.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    assert describe(folder).context_length == 80
    for found, theirs in zip(run(folder, texts), expected, strict=True):
        assert_allclose(found, theirs, atol=1e-4)


def test_nomic_without_a_stretch_reads_what_it_was_trained_on_unless_asked_for_more(make_model: MakeModel) -> None:
    folder, _ = make_model("nomic-bert")
    (folder / "config.json").write_text(json.dumps(NOMIC | {"rotary_scaling_factor": None}))
    assert [describe(folder, limit).context_length for limit in (None, 12, 64, 500)] == [20, 12, 64, 80]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 8),
        ("moe_every_n_layers", 2),
        ("qkv_proj_bias", True),
        ("activation_function", "gelu"),
        ("rotary_emb_fraction", 0.5),
        ("prenorm", True),
        ("head_dim", 16),
    ],
)
def test_nomic_of_another_build_is_refused_by_the_key(key: str, value: object, make_model: MakeModel) -> None:
    folder, _ = make_model("nomic-bert")
    (folder / "config.json").write_text(json.dumps(NOMIC | {key: value}))
    with pytest.raises(CheckpointError, match=f"{key} {value!r}"):
        describe(folder)


NEW = {
    "architectures": ["NewModel", "NewForTokenClassification"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "max_position_embeddings": 80,
    "model_type": "new",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pack_qkv": True,
    "pad_token_id": 1,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 8.0, "type": "ntk"},
    "rope_theta": 20000,
    "type_vocab_size": 1,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "vocab_size": 90,
}
"""The keys of gte-multilingual-base's `config.json`."""


@pytest.mark.parametrize(
    ("suffix", "output", "types"),
    [("Model", "token_embeddings", 1), ("Model", "token_embeddings", 0), ("ForSequenceClassification", "logits", 1)],
)
def test_gte_as_its_authors_store_it(
    suffix: str, output: str, types: int, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    """Their NTK scaling is a larger base and slower positions, which transformers calls linear."""
    rope = {"rope_type": "linear", "factor": 8 ** (2 / 8), "rope_theta": 160000.0}
    folder, model = make_model("gte", suffix, rope_parameters=rope, type_vocab_size=types, num_labels=1)
    with torch.no_grad():
        outputs = [model(torch.tensor([ids])) for ids in texts]
    expected = [(out.logits if output == "logits" else out.last_hidden_state)[0].numpy() for out in outputs]
    names = {"architectures": [f"New{suffix}"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(NEW | names | {"type_vocab_size": types}))
    weights = load_file(folder / "model.safetensors")
    prefix = "" if suffix == "Model" else "gte."
    renamed = {re.sub(rf"^{prefix}(?!classifier)", "new.", name): tensor for name, tensor in weights.items()}
    extra = {} if "classifier.weight" in renamed else {"classifier.weight": torch.ones(1, 32)}  # of sparse weights
    save_file(renamed | extra, folder / "model.safetensors")
    for found, theirs in zip(run(folder, texts, output), expected, strict=True):
        assert_allclose(found, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "absolute"),
        ("layer_norm_type", "rms_norm"),
        ("logn_attention_scale", True),
        ("pack_qkv", False),
        ("rope_scaling", {"factor": 8.0, "type": "ntk", "mixed_b": 0.6}),
        ("rope_scaling", {"factor": 8.0, "type": "mixed"}),
    ],
)
def test_gte_of_another_build_is_refused_by_the_key(key: str, value: object, make_model: MakeModel) -> None:
    folder, _ = make_model("gte")
    (folder / "config.json").write_text(json.dumps(NEW | {key: value}))
    shown = f"{key} {value!r}" if not isinstance(value, dict) else "mixed"
    with pytest.raises(CheckpointError, match=shown):
        describe(folder)


def test_the_loras_of_jinas_tasks_are_refused_by_name(make_model: MakeModel) -> None:
    folder, _ = make_model("jina-embeddings-v3")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_adaptations": ["retrieval.query"]}))
    with pytest.raises(CheckpointError, match=r"lora_adaptations.*retrieval\.query"):
        describe(folder)


@pytest.mark.parametrize("suffix", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", ["nomic-bert", "gte", "jina-embeddings-v3"])
def test_names_of_transformers_own_modules_are_read_as_well(
    family: str, suffix: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    output = {"Model": "token_embeddings", "ForMaskedLM": "sparse_embedding"}.get(suffix, "logits")
    folder, model = make_model(family, suffix)
    before = run(folder, texts, output)
    model.save_pretrained(folder, save_original_format=False)
    assert any("q_proj" in name for name in load_file(folder / "model.safetensors"))
    for found, expected in zip(run(folder, texts, output), before, strict=True):
        assert_allclose(found, expected)


def test_a_fused_tensor_that_cannot_be_divided_is_named(make_model: MakeModel, run: Run) -> None:
    folder, _ = make_model("gte")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.attention.qkv_proj.weight"] = torch.zeros(97, 32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layer\.1\.attention\.qkv_proj\.weight' has shape \[97, 32\]"):
        run(folder, [[7]])
