"""Rotary positions past the trained length, and the old and the new way of writing them down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.architectures.raw import RawConfig
from model.architectures.table import ARCHITECTURES
from model.checkpoint import load_network
from model.config import DecoderConfig
from model.errors import CheckpointError
from model.layers import rotary_frequencies

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

Save = Callable[..., tuple[Path, PreTrainedModel]]
Run = Callable[..., list[Tensor]]


def text(length: int) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize(("max_model_len", "length"), [(None, 40), (24, 24), (24, 7)])
def test_longrope_takes_its_long_factors_where_longer_texts_are_allowed(
    save_reference: Save, run_packed: Run, max_model_len: int | None, length: int
) -> None:
    folder, reference = save_reference(
        model_type="phi3",
        **SIZES,
        max_position_embeddings=96,
        original_max_position_embeddings=24,
        rope_parameters=dict(LONGROPE),
    )
    ours = run_packed(load_network(folder, max_model_len=max_model_len), [text(length)])[0]
    torch.testing.assert_close(ours, reference(torch.tensor([text(length)])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("max_model_len", "length"), [(None, 32), (64, 64)])
def test_dynamic_scaling_stretches_to_the_longest_text_allowed(
    save_reference: Save, run_packed: Run, max_model_len: int | None, length: int
) -> None:
    folder, reference = save_reference(
        model_type="llama",
        **SIZES,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    network = load_network(folder, max_model_len=max_model_len)
    assert network.config.context_length == length
    ours = run_packed(network, [text(length)])[0]
    torch.testing.assert_close(ours, reference(torch.tensor([text(length)])).logits[0], rtol=1e-4, atol=1e-4)


def configure(values: dict[str, Any], architecture: str = "LlamaForCausalLM") -> DecoderConfig:
    config = ARCHITECTURES[architecture].configure(RawConfig(values), None)
    assert isinstance(config, DecoderConfig)
    return config


def test_old_and_new_keys_mean_the_same() -> None:
    plain = {**SIZES, "max_position_embeddings": 131072}
    new = configure({**plain, "rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0}})
    old = configure({**plain, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 500000.0})
    oldest = configure({**plain, "rope_scaling": {**LLAMA3, "type": "llama3"}, "rope_theta": 500000.0})
    assert new == old == oldest
    assert new.rotary is not None
    assert new.rotary.theta == 500000.0
    assert new.rotary.scaling is not None


def test_old_and_new_keys_of_gemma_3_mean_the_same() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {**SIZES, "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": scaling}
    nested = {
        "full_attention": {**scaling, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    new = {**SIZES, "rope_parameters": nested}
    assert configure(old, "Gemma3ForCausalLM") == configure(new, "Gemma3ForCausalLM")
    assert configure(old, "Gemma3ForCausalLM") == configure({**SIZES, "rope_scaling": scaling}, "Gemma3ForCausalLM")


def test_the_length_that_was_trained_first_may_stand_inside_the_section() -> None:
    scaling = {**LONGROPE, "original_max_position_embeddings": 24}
    found = configure({**SIZES, "max_position_embeddings": 96, "rope_parameters": scaling}, "Phi3ForCausalLM").rotary
    assert found is not None
    assert found.scaling is not None
    assert found.scaling.original_length == 24


def test_phi_3_scaling_by_its_first_names_is_longrope() -> None:
    lengths = {"max_position_embeddings": 96, "original_max_position_embeddings": 24}
    rows = [{**LONGROPE, "rope_type": None, "type": name} for name in ("su", "yarn", "longrope")]
    configs = [configure({**SIZES, **lengths, "rope_scaling": row}, "Phi3ForCausalLM") for row in rows]
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "spiral"},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "two"},
        {"rope_type": 3},
        {**LONGROPE, "long_factor": [1.0]},
        [],
    ],
)
def test_nonsense_is_refused_by_name(rope: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        configure({**SIZES, "rope_parameters": rope})
    assert caught.value.file == "config.json"


def test_a_limit_lowers_the_context_and_never_raises_it(save_reference: Save) -> None:
    folder, _ = save_reference(model_type="llama", **SIZES, max_position_embeddings=32)
    lengths = [load_network(folder, max_model_len=limit).config.context_length for limit in (None, 16, 64)]
    assert lengths == [32, 16, 32]
    with pytest.raises(CheckpointError):
        load_network(folder, max_model_len=0)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "llama3", **LLAMA3}, 32),
        ({"rope_type": "dynamic", "factor": 2.0}, 200),
    ],
)
def test_a_limit_raises_the_context_as_far_as_the_scaling_reaches(rope: dict[str, Any], most: int) -> None:
    """Qwen2.5's cards say to add YaRN and leave `max_position_embeddings` as it is: no longer text was let in."""
    values = {**SIZES, "max_position_embeddings": 32, "rope_scaling": rope}
    lengths = [ARCHITECTURES["LlamaForCausalLM"].configure(RawConfig(values), limit) for limit in (None, 24, 200)]
    assert [config.context_length for config in lengths] == [32, 24, most]


def test_a_limit_raises_the_context_as_far_as_the_config_says() -> None:
    """Command R was trained on 128k tokens; its `max_position_embeddings` are 8192."""
    values = {**SIZES, "max_position_embeddings": 32, "model_max_length": 80}
    lengths = [ARCHITECTURES["CohereForCausalLM"].configure(RawConfig(values), limit) for limit in (None, 64, 200)]
    assert [config.context_length for config in lengths] == [32, 64, 80]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16,
            "beta_slow": 2,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 0.7},
    ],
    ids=["linear", "llama 3.1", "llama 3.2", "qwen", "not truncated", "betas", "mscale", "attention factor"],
)
def test_frequencies_of_real_head_sizes_are_those_of_transformers(rope: dict[str, Any]) -> None:
    values = {**SIZES, "hidden_size": 512, "max_position_embeddings": 131072}
    rope = {**rope, "rope_theta": 500000.0}
    theirs, their_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](LlamaConfig(**values, rope_parameters=dict(rope)))
    rotary = configure({**values, "rope_parameters": rope}).rotary
    assert rotary is not None
    ours, our_factor = rotary_frequencies(rotary)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    assert our_factor == pytest.approx(their_factor)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite"])
def test_what_a_config_leaves_out_is_what_it_is_in_transformers(kind: str) -> None:
    """Mistral's window and heads, Qwen3's head size: small configs leave out what their class says already."""
    given = {"vocab_size": 97, "hidden_size": 4096, "intermediate_size": 48, "num_hidden_layers": 2}
    given |= {"num_attention_heads": 64, "use_sliding_window": True, "max_window_layers": 1}
    theirs = AutoConfig.for_model(kind, **given)
    names = {name.lower().removesuffix("forcausallm"): name for name in ARCHITECTURES if name.endswith("ForCausalLM")}
    ours = configure({**given, "model_type": kind}, names[kind])
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_size == (getattr(theirs, "head_dim", None) or 64)
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.window(1) == getattr(theirs, "sliding_window", None)
    for key, value in {"sliding_window": None, "num_key_value_heads": None}.items():
        if kind == "mistral":
            explicit = configure({**given, key: value}, names[kind])
            assert (explicit.window(0), explicit.num_kv_heads) in {(None, 8), (4096, 64)}


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 5}),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 5}),
        ("Gemma2ForCausalLM", {"sliding_window": 9}),
        ("Gemma3ForCausalLM", {"sliding_window": 9}),
        ("Gemma3ForCausalLM", {"sliding_window": 9, "sliding_window_pattern": 3}),
    ],
)
def test_configs_that_do_not_list_their_layers_slide_where_transformers_says(
    architecture: str, values: dict[str, Any]
) -> None:
    values = {**SIZES, **values, "num_hidden_layers": 8}
    classes = {
        "Qwen2ForCausalLM": Qwen2Config,
        "Gemma2ForCausalLM": Gemma2Config,
        "Gemma3ForCausalLM": Gemma3TextConfig,
    }
    kinds = classes[architecture](**values).layer_types
    config = configure(values, architecture)
    found = [config.window(layer) for layer in range(8)]
    assert found == [9 if kind == "sliding_attention" else None for kind in kinds]
