"""What `config.json` says of experts is what it says to transformers, or it is refused."""

from typing import Any

import pytest
import transformers

from model.architectures.raw import RawConfig
from model.architectures.table import ARCHITECTURES
from model.config import DecoderConfig, ExpertsConfig, Rotary
from model.errors import CheckpointError


def configure(values: dict[str, Any], architecture: str) -> DecoderConfig:
    config = ARCHITECTURES[architecture].configure(RawConfig(values), None)
    assert isinstance(config, DecoderConfig)
    return config


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "Qwen2Moe", "Olmoe", "GraniteMoe"])
def test_what_a_config_leaves_out_of_its_experts_is_what_it_is_in_transformers(name: str) -> None:
    given = {"vocab_size": 97, "hidden_size": 4096, "intermediate_size": 48, "num_hidden_layers": 7}
    given |= {"num_attention_heads": 64, "use_sliding_window": True, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    theirs = getattr(transformers, f"{name}Config")(**given)
    ours = configure(given, f"{name}ForCausalLM")
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_size == 64
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rotary == Rotary(theta=theirs.rope_parameters["rope_theta"], size=64)
    assert ours.window(0) == getattr(theirs, "sliding_window", None)
    experts = ours.experts
    assert experts is not None
    assert experts.num_experts == getattr(theirs, "num_experts", None) or theirs.num_local_experts
    assert experts.num_chosen == theirs.num_experts_per_tok
    assert experts.intermediate_size == getattr(theirs, "moe_intermediate_size", 48)
    assert experts.normalized == getattr(theirs, "norm_topk_prob", True)
    assert experts.shared_size == getattr(theirs, "shared_expert_intermediate_size", None)
    assert (experts.scores, experts.scale, experts.selection_bias) == ("softmax", 1.0, False)
    assert experts.layers == ({1, 5} if name.startswith("Qwen") else set(range(7)))


@pytest.mark.parametrize("name", ["Glm4Moe", "Dots1"])
def test_what_is_left_out_of_experts_by_sigmoids_is_what_it_is_in_transformers(name: str) -> None:
    given = {"vocab_size": 97, "hidden_size": 4096, "intermediate_size": 48, "num_hidden_layers": 3}
    given |= {"num_attention_heads": 64}
    own = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3} if name == "Dots1" else {}
    theirs = getattr(transformers, f"{name}Config")(**given, **own)
    ours = configure(given | own, f"{name}ForCausalLM")
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rotary == Rotary(theta=theirs.rope_parameters["rope_theta"], size=32 if name == "Glm4Moe" else 64)
    assert not any(ours.windows)
    experts = ours.experts
    assert experts is not None
    assert experts.num_experts == theirs.n_routed_experts
    assert experts.num_chosen == theirs.num_experts_per_tok
    assert experts.intermediate_size == theirs.moe_intermediate_size
    assert experts.normalized == theirs.norm_topk_prob
    assert experts.scale == theirs.routed_scaling_factor
    assert experts.shared_size == theirs.n_shared_experts * theirs.moe_intermediate_size
    assert experts.layers == set(range(theirs.first_k_dense_replace, 3))


def test_what_is_left_out_of_experts_of_ernie_is_what_it_is_in_transformers() -> None:
    given = {"vocab_size": 97, "hidden_size": 4096, "intermediate_size": 48, "num_hidden_layers": 3}
    given |= {"num_attention_heads": 64}
    theirs = transformers.Ernie4_5_MoeConfig(**given)
    ours = configure(given, "Ernie4_5_MoeForCausalLM")
    assert (ours.num_kv_heads, ours.context_length) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert (ours.norm_epsilon, ours.tied_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rotary == Rotary(theta=theirs.rope_parameters["rope_theta"], size=64)
    assert ours.experts == ExpertsConfig(
        num_experts=theirs.moe_num_experts,
        num_chosen=theirs.moe_k,
        intermediate_size=theirs.moe_intermediate_size,
        layers=frozenset({1, 2}),
        normalized=True,
        selection_bias=True,
        shared_size=theirs.moe_num_shared_experts * theirs.moe_intermediate_size,
    )


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("Qwen3Moe", {"num_experts": 8, "num_local_experts": 4}, "'num_local_experts' is 4; expected 8"),
        (
            "Qwen3Moe",
            {"num_experts": 4, "num_experts_per_tok": 5},
            "'num_experts_per_tok' is 5; expected at most the 4",
        ),
        ("Qwen2Moe", {"mlp_only_layers": [-1]}, "'mlp_only_layers'"),
        ("Qwen2Moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
        ("Mixtral", {"num_local_experts": 1}, "'num_experts_per_tok'"),
        ("Olmoe", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
        ("Glm4Moe", {"n_group": 8}, "'n_group' is 8; expected 1"),
        ("Glm4Moe", {"scoring_func": "softmax"}, "'scoring_func' is 'softmax'; expected 'sigmoid'"),
        ("GraniteMoe", {"logits_scaling": 0}, "'logits_scaling' is 0"),
        ("Ernie4_5_Moe", {"moe_num_experts": 4}, "'moe_k' is None; expected at most the 4"),
        ("Ernie4_5_Moe", {"use_bias": True}, "'use_bias' is True; expected false"),
        ("Dots1", {"n_routed_experts": 4, "num_key_value_heads": 16}, "no 'num_experts_per_tok'"),
    ],
)
def test_experts_that_make_no_sense_are_refused_by_key(name: str, values: dict[str, Any], message: str) -> None:
    given = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    with pytest.raises(CheckpointError, match=message):
        configure({**given, "num_attention_heads": 16, **values}, f"{name}ForCausalLM")
