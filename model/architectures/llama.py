"""Llama and those that share its tensor names: Mistral, Qwen2, Qwen3 and, in their own files, Gemma, OLMo and more.

Maps `config.json` and stored names onto `DecoderConfig` and `model.decoder`'s parameters; knows no tensors.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from model.architectures.mapping import Architecture, HeadOrder, Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import Activation, DecoderActivation, DecoderConfig
from model.errors import CheckpointError

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DECODER_ACTIVATIONS: Mapping[str, DecoderActivation] = {**ACTIVATIONS, "relu2": "relu_squared"}

IGNORED = (r".*\.rotary_emb\.inv_freq",)

Renamed = tuple[tuple[str, str], ...]
"""As `WeightMap.renamed`."""

UNBOUNDED = sys.maxsize
"""Positions of a formula that has no end."""

MISTRAL_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}
QWEN2_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
QWEN3_DEFAULTS: Mapping[str, Any] = {**QWEN2_DEFAULTS, "head_dim": 128}
"""What a `config.json` that leaves these keys out means to transformers (one that says null means none)."""


def context_length(raw: RawConfig, limit: int | None, *, trained: int, most: int | None = None) -> int:
    """The longest sequence to be run: as many positions as were trained, or the caller's `limit`.

    That may be above the trained length where positions reach up to `most` of them. (One limit is set for all
    checkpoints of a worker, so that one above the length of some is no mistake.)
    """
    if limit is not None and limit < 1:
        raise CheckpointError(f"{raw.file}: a context of {limit:,} tokens holds nothing", file=raw.file)
    return trained if limit is None else min(limit, max(trained, most or 0))


def heads(raw: RawConfig) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size."""
    num_heads = raw.size("num_attention_heads")
    num_kv_heads = raw.size("num_key_value_heads", num_heads)
    head_size = raw.size("head_dim", max(1, raw.size("hidden_size") // num_heads))
    if num_heads % num_kv_heads:
        raise raw.wrong("num_key_value_heads", f"a divisor of the {num_heads} attention heads")
    return num_heads, num_kv_heads, head_size


def windows(raw: RawConfig, window: int | None, slides: Callable[[int], bool] | None = None) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types` where given, else those of the architecture (None: all)."""
    num_layers = raw.size("num_hidden_layers")
    if window is None:
        return ()
    if "layer_types" in raw:
        kinds = raw.texts("layer_types")
        if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise raw.wrong("layer_types", f"{num_layers} times sliding_attention or full_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return tuple(window if slides is None or slides(layer) else None for layer in range(num_layers))


def is_causal(raw: RawConfig) -> bool:
    """False where a decoder was made into an embedder that sees the whole text (gte-Qwen2), by either key."""
    return raw.flag("is_causal", True) and not raw.flag("use_bidirectional_attention", False)


def optional_window(raw: RawConfig) -> int | None:
    """How many tokens a position sees, itself among them; of one that looks both ways the key is one side's reach."""
    if "sliding_window" not in raw:
        return None
    return raw.size("sliding_window") + (0 if is_causal(raw) else 1)


def most_positions(raw: RawConfig, trained: int) -> int:
    """How many positions the scaling of the rotary ones can reach; `max_position_embeddings` often leaves it out.

    "dynamic" grows with the text. "linear" and "yarn" reach their factor times what they stretch, as vLLM reckons it
    (`_get_and_verify_max_len`); unlike there, more than `max_position_embeddings` is not used unasked, since a linear
    factor may be in it already. Command R says the larger number itself.
    """
    section = raw.section("rope_scaling") if "rope_scaling" in raw else RawConfig({}, raw.file)
    section = raw.section("rope_parameters") if "rope_parameters" in raw else section
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "dynamic":
        return UNBOUNDED
    if kind not in ("linear", "yarn") or "factor" not in section:
        return raw.size("model_max_length", trained)
    original = section.size("original_max_position_embeddings", trained) if kind == "yarn" else trained
    return int(original * section.number("factor"))


def configure_llama(raw: RawConfig, limit: int | None) -> DecoderConfig:
    num_heads, num_kv_heads, head_size = heads(raw)
    trained = raw.size("max_position_embeddings", 2048)
    length = context_length(raw, limit, trained=trained, most=most_positions(raw, trained))
    bias = raw.flag("attention_bias", False)
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=raw.size("hidden_size"),
        intermediate_size=raw.size("intermediate_size"),
        num_layers=raw.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        context_length=length,
        norm_epsilon=raw.number("rms_norm_eps", 1e-6),
        rotary=rotary(raw, head_size, length=length),
        causal=is_causal(raw),
        attention_scale=head_size**-0.5,
        query_key_value_bias=bias,
        attention_output_bias=bias,
        activation=raw.choice("hidden_act", DECODER_ACTIVATIONS, "silu"),
        mlp_bias=raw.flag("mlp_bias", False),
        tied_embeddings=raw.flag("tie_word_embeddings", False),
    )


def with_defaults(raw: RawConfig, defaults: Mapping[str, Any]) -> RawConfig:
    return RawConfig({**defaults, **raw.values}, raw.file)


def with_aliases(raw: RawConfig, aliases: Mapping[str, str]) -> RawConfig:
    """The config with those keys, by the other names that they may have, where it has these alone."""
    found = {key: raw.values[other] for key, other in aliases.items() if key not in raw and other in raw}
    return RawConfig({**raw.values, **found}, raw.file)


def configure_mistral(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, MISTRAL_DEFAULTS)
    return replace(
        configure_llama(raw, limit),
        architecture="MistralForCausalLM",
        windows=windows(raw, optional_window(raw)),
    )


def configure_qwen2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, QWEN2_DEFAULTS)
    window = optional_window(raw) if raw.flag("use_sliding_window", False) else None
    first = raw.whole("max_window_layers", 28)
    return replace(
        configure_llama(raw, limit),
        architecture="Qwen2ForCausalLM",
        windows=windows(raw, window, lambda layer: layer >= first),
        query_key_value_bias=True,
        attention_output_bias=False,
    )


def configure_qwen3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, QWEN3_DEFAULTS)
    bias = raw.flag("attention_bias", False)
    return replace(
        configure_qwen2(raw, limit),
        architecture="Qwen3ForCausalLM",
        query_key_norm="head",
        query_key_value_bias=bias,
        attention_output_bias=bias,
    )


def weights(config: DecoderConfig, *, renamed: Renamed = (), paired: bool = False) -> WeightMap:
    """Names as Llama stores them; what the config has no use for (a bias, a norm) is not asked for.

    `renamed` says what is called otherwise; `paired` that heads lie with those dimensions side by side that are turned
    to their positions together.
    """
    order = HeadOrder(head_size=config.head_size, paired=config.rotary.size) if paired and config.rotary else None
    parameters = {"embedding.weight": part("model.embed_tokens.weight")}
    parameters |= {f"norm.{kind}": part(f"model.norm.{kind}") for kind in config.norm_parameters}
    for layer in range(config.num_layers):
        parameters |= _layer(config, f"layers.{layer}", f"model.layers.{layer}", order)
    parameters |= head(config)
    return WeightMap(
        parameters=parameters,
        aliases=tied(config, "model.embed_tokens.weight"),
        ignored=IGNORED,
        prefix="model.",
        renamed=renamed,
    )


def head(config: DecoderConfig) -> dict[str, tuple[Part, ...]]:
    """The projection to logits."""
    kinds = ("weight", "bias") if config.logits_bias else ("weight",)
    return {f"output.{kind}": part(f"lm_head.{kind}") for kind in kinds}


def tied(config: DecoderConfig, embedding: str) -> tuple[tuple[str, ...], ...]:
    """The embedding and the head as one matrix, where the config says so and no two different ones are stored."""
    return ((embedding, "lm_head.weight"),) if config.tied_embeddings else ()


def kinds(config: DecoderConfig, module: str) -> tuple[str, ...]:
    """Which tensors a module of ours has."""
    name = module.rpartition(".")[2]
    if name in ("query_norm", "key_norm") and config.query_key_norm == "heads":
        return ("weight",)
    if name.endswith("norm"):
        return config.norm_parameters
    biases = {"query_key_value": config.query_key_value_bias, "output": config.attention_output_bias}
    biased = not name.endswith("embedding") and biases.get(name, config.mlp_bias)
    return ("weight", "bias") if biased else ("weight",)


def _layer(config: DecoderConfig, ours: str, theirs: str, order: HeadOrder | None) -> dict[str, tuple[Part, ...]]:
    modules = _projections(config, order) | _norms(config, order)
    return {
        f"{ours}.{module}.{kind}": tuple(replace(source, name=f"{theirs}.{source.name}.{kind}") for source in sources)
        for module, sources in modules.items()
        for kind in kinds(config, module)
    }


def _projections(config: DecoderConfig, order: HeadOrder | None) -> dict[str, tuple[Part, ...]]:
    """Of a layer, by our names: what their weights and biases are made of."""
    num_key_rows = config.num_kv_heads * config.head_size
    inner = ("gate", "up") if config.gated else ("up",)
    return {
        "attention.query_key_value": (
            Part(name="self_attn.q_proj", rows=config.num_heads * config.head_size, order=order),
            Part(name="self_attn.k_proj", rows=num_key_rows, order=order),
            Part(name="self_attn.v_proj", rows=num_key_rows),
        ),
        "attention.output": part("self_attn.o_proj"),
        "mlp.gate_up" if config.gated else "mlp.up": tuple(
            Part(name=f"mlp.{name}_proj", rows=config.intermediate_size) for name in inner
        ),
        "mlp.down": part("mlp.down_proj"),
    }


def _norms(config: DecoderConfig, order: HeadOrder | None) -> dict[str, tuple[Part, ...]]:
    """Likewise."""
    found = {ours: part(theirs) for ours, theirs in NORM_NAMES[config.norm_places].items()}
    if config.shared_norm:
        del found["mlp_norm"]
    if config.query_key_norm is not None:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            flattened = config.query_key_norm == "heads"
            found[f"attention.{ours}"] = (Part(name=f"self_attn.{theirs}", order=order, flattened=flattened),)
    return found


NORM_NAMES: Mapping[str, Mapping[str, str]] = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    "around": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}


def decoder(
    configure: Callable[[RawConfig, int | None], DecoderConfig], *, renamed: Renamed = (), paired: bool = False
) -> Architecture[DecoderConfig]:
    """The row of a language model whose tensors are named as Llama's, but for what `weights` is told."""
    named = partial(weights, renamed=renamed, paired=paired)
    return Architecture(network="decoder", head="language_model", configure=configure, weights=named)


ARCHITECTURES = {
    "LlamaForCausalLM": decoder(configure_llama),
    "MistralForCausalLM": decoder(configure_mistral),
    "MinistralForCausalLM": decoder(configure_mistral),
    "Qwen2ForCausalLM": decoder(configure_qwen2),
    "Qwen3ForCausalLM": decoder(configure_qwen3),
}
