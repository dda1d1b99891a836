"""OPT (arXiv 2205.01068) onto `DecoderConfig`: learned positions from the third row on, ReLU. Knows no tensors."""

from model.architectures.llama import ACTIVATIONS, context_length
from model.architectures.mapping import Architecture, WeightMap
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

POSITION_OFFSET = 2


def configure_opt(raw: RawConfig, limit: int | None) -> DecoderConfig:
    hidden_size, num_heads = raw.size("hidden_size"), raw.size("num_attention_heads")
    # OPT-350M norms the residual sums, and its embedding is narrower than its states.
    if not raw.flag("do_layer_norm_before", True):
        raise raw.wrong("do_layer_norm_before", "true")
    if raw.flag("_remove_final_layer_norm", False):
        raise raw.wrong("_remove_final_layer_norm", "false")
    if raw.size("word_embed_proj_dim", hidden_size) != hidden_size:
        raise raw.wrong("word_embed_proj_dim", f"{hidden_size}, the hidden size")
    num_positions = raw.size("max_position_embeddings", 2048)
    head_size, bias = hidden_size // num_heads, raw.flag("enable_bias", True)
    learned = raw.flag("layer_norm_elementwise_affine", True)
    return DecoderConfig(
        architecture="OPTForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("ffn_dim", 3072),
        num_layers=raw.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        context_length=context_length(raw, limit, trained=num_positions),
        norm="layer",
        norm_epsilon=1e-5,
        norm_weight=learned,
        norm_bias=learned,
        positions="learned",
        num_learned_positions=num_positions + POSITION_OFFSET,
        position_offset=POSITION_OFFSET,
        attention_scale=head_size**-0.5,
        query_key_value_bias=bias,
        attention_output_bias=bias,
        activation=raw.choice("activation_function", ACTIVATIONS, "relu"),
        gated=False,
        mlp_bias=bias,
        tied_embeddings=raw.flag("tie_word_embeddings", True),
    )


def weights(config: DecoderConfig) -> WeightMap:
    return named_weights(
        config,
        Naming(
            prefix="model.",
            outer={
                "embedding": "decoder.embed_tokens",
                "position_embedding": "decoder.embed_positions",
                "norm": "decoder.final_layer_norm",
            },
            layers="decoder.layers",
            inner={
                "attention_norm": ("self_attn_layer_norm",),
                "mlp_norm": ("final_layer_norm",),
                "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attention.output": ("self_attn.out_proj",),
                "mlp.up": ("fc1",),
                "mlp.down": ("fc2",),
            },
        ),
    )


ARCHITECTURES = {
    "OPTForCausalLM": Architecture(network="decoder", head="language_model", configure=configure_opt, weights=weights)
}
