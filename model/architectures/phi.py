"""Phi-1, Phi-1.5 and Phi-2 (arXiv 2309.05463) onto `DecoderConfig`: attention and MLP side by side behind one norm."""

from dataclasses import replace

from model.architectures.llama import configure_llama, decoder, with_defaults
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

PHI_DEFAULTS = {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5}


def configure_phi(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, PHI_DEFAULTS)
    return replace(
        configure_llama(raw, limit),
        architecture="PhiForCausalLM",
        norm="layer",
        norm_epsilon=raw.number("layer_norm_eps", 1e-5),
        parallel_residual=True,
        shared_norm=True,
        query_key_norm="head" if raw.flag("qk_layernorm", False) else None,
        query_key_value_bias=True,
        attention_output_bias=True,
        gated=False,
        mlp_bias=True,
        logits_bias=True,
    )


RENAMED = (
    (".self_attn.dense.", ".self_attn.o_proj."),
    (".self_attn.q_layernorm.", ".self_attn.q_norm."),
    (".self_attn.k_layernorm.", ".self_attn.k_norm."),
    (".mlp.fc1.", ".mlp.up_proj."),
    (".mlp.fc2.", ".mlp.down_proj."),
    ("final_layernorm.", "norm."),
)

ARCHITECTURES = {"PhiForCausalLM": decoder(configure_phi, renamed=RENAMED)}
