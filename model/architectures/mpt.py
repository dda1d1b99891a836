"""MPT (MosaicML) onto `DecoderConfig`: ALiBi, LayerNorms without bias, no biases anywhere. Knows no tensors."""

import json
from typing import Any

from model.architectures.llama import UNBOUNDED, context_length, with_aliases
from model.architectures.mapping import Architecture, WeightMap
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

ALIASES = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"}
USUAL: dict[str, Any] = {
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "logit_scale": None,
    "final_logit_softcapping": None,
    "block_overrides": None,
}
USUAL_ATTENTION: dict[str, Any] = {
    "attn_type": "multihead_attention",
    "prefix_lm": False,
    "qk_ln": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "alibi_bias_max": 8,
    "qk_gn": False,
    "rope": False,
    "sliding_window_size": -1,
    "attn_logit_softcapping": None,
}
USUAL_MLP: dict[str, Any] = {"ffn_type": "mptmlp"}
"""What MosaicML's own code lets be chosen and transformers has one way of."""


def configure_mpt(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_aliases(raw, ALIASES)
    attention, mlp = (
        raw.section(key) if key in raw else RawConfig({}, raw.file) for key in ("attn_config", "ffn_config")
    )
    for section, usual in ((raw, USUAL), (attention, USUAL_ATTENTION), (mlp, USUAL_MLP)):
        for key, value in usual.items():
            if key in section and section.values[key] != value:
                raise section.wrong(key, json.dumps(value))
    hidden_size, num_heads = raw.size("d_model"), raw.size("n_heads")
    head_size = hidden_size // num_heads
    return DecoderConfig(
        architecture="MptForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("expansion_ratio", 4) * hidden_size,
        num_layers=raw.size("n_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        context_length=context_length(raw, limit, trained=raw.size("max_seq_len", 2048), most=UNBOUNDED),
        norm="layer",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        norm_bias=False,
        positions="alibi",
        attention_scale=attention.number("softmax_scale", head_size**-0.5),
        # 0 is none, as in its own code.
        query_key_value_clip=attention.number("clip_qkv", 0.0) or None,
        activation="gelu",
        gated=False,
        tied_embeddings=raw.flag("tie_word_embeddings", True),
    )


def weights(config: DecoderConfig) -> WeightMap:
    return named_weights(
        config,
        Naming(
            prefix="transformer.",
            outer={"embedding": "wte", "norm": "norm_f"},
            layers="blocks",
            inner={
                "attention_norm": ("norm_1",),
                "mlp_norm": ("norm_2",),
                "attention.query_key_value": ("attn.Wqkv",),
                "attention.output": ("attn.out_proj",),
                "mlp.up": ("ffn.up_proj",),
                "mlp.down": ("ffn.down_proj",),
            },
        ),
    )


# MosaicML's own class is written otherwise.
ARCHITECTURES = {
    name: Architecture(network="decoder", head="language_model", configure=configure_mpt, weights=weights)
    for name in ("MptForCausalLM", "MPTForCausalLM")
}
