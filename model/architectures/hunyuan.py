"""HunYuan's dense models onto `DecoderConfig`: Llama with norms of queries and keys, behind the turn to positions."""

from dataclasses import replace

from model.architectures.llama import configure_llama, decoder, with_defaults
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

HUNYUAN_DEFAULTS = {"rms_norm_eps": 1e-5}


def configure_hunyuan(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return replace(
        configure_llama(_with_stretched_base(with_defaults(raw, HUNYUAN_DEFAULTS)), limit),
        architecture="HunYuanDenseV1ForCausalLM",
        query_key_norm="head",
        turned_norm=True,
        mlp_bias=False,
    )


def _with_stretched_base(raw: RawConfig) -> RawConfig:
    """Positions that are "dynamic" with an `alpha` have a base that is larger, whatever the text's length."""
    key = next((key for key in ("rope_parameters", "rope_scaling") if key in raw), None)
    if key is None:
        return raw
    section = raw.section(key)
    if section.text("rope_type", section.text("type", "default")) != "dynamic" or not section.number("alpha", 0.0):
        return raw
    size = raw.size("head_dim", max(1, raw.size("hidden_size") // raw.size("num_attention_heads")))
    theta = section.number("rope_theta", raw.number("rope_theta", 10000.0))
    stretched = {"rope_type": "default", "rope_theta": theta * section.number("alpha") ** (size / (size - 2))}
    return RawConfig({**raw.values, key: stretched}, raw.file)


RENAMED = ((".query_layernorm.", ".q_norm."), (".key_layernorm.", ".k_norm."))

ARCHITECTURES = {"HunYuanDenseV1ForCausalLM": decoder(configure_hunyuan, renamed=RENAMED)}
