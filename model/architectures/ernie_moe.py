"""ERNIE 4.5's mixtures of experts onto `DecoderConfig`: softmax and a bias that chooses, shared experts in some layers.

Dense ones are in `llama_kin`.
"""

from dataclasses import replace

from model.architectures.llama import configure_llama, with_defaults
from model.architectures.mapping import WeightMap
from model.architectures.raw import RawConfig
from model.architectures.sparse import SparseNames, sparse_decoder
from model.config import DecoderConfig, ExpertsConfig

ERNIE_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


def configure_ernie_moe(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, ERNIE_DEFAULTS)
    if raw.flag("use_bias", False):
        raise raw.wrong("use_bias", "false: projections with biases are not supported")
    count, chosen = raw.size("moe_num_experts", 64), raw.size("moe_k", 6)
    if chosen > count:
        raise raw.wrong("moe_k", f"at most the {count} experts")
    size, num_shared = raw.size("moe_intermediate_size", 1536), raw.whole("moe_num_shared_experts", 2)
    return replace(
        configure_llama(raw, limit),
        architecture="Ernie4_5_MoeForCausalLM",
        experts=ExpertsConfig(
            num_experts=count,
            num_chosen=chosen,
            intermediate_size=size,
            layers=_layers(raw),
            normalized=True,
            selection_bias=True,
            shared_size=size * num_shared if num_shared > 0 else None,
        ),
    )


def _layers(raw: RawConfig) -> frozenset[int]:
    """From the first index to the last (-1: the network's), every so many."""
    num_layers, step = raw.size("num_hidden_layers"), raw.size("moe_layer_interval", 1)
    first, last = raw.whole("moe_layer_start_index", 1), raw.whole("moe_layer_end_index", -1)
    last = num_layers - 1 if last == -1 else last
    return frozenset(layer for layer in range(step - 1, num_layers, step) if first <= layer <= last)


ERNIE = sparse_decoder(
    configure_ernie_moe,
    SparseNames(shared="shared_experts", selection_bias="moe_statics.e_score_correction_bias"),
    paired=True,
)


def weights_ernie_moe(config: DecoderConfig) -> WeightMap:
    """The bias is stored as the only row of a matrix. Layers that guess ahead (`mtp`) are not read."""
    plain = ERNIE.weights(config)
    biases = {
        name: tuple(replace(source, matrix=(0, 1)) for source in sources)
        for name, sources in plain.parameters.items()
        if name.endswith(".selection_bias")
    }
    return replace(plain, parameters=plain.parameters | biases, ignored=(*plain.ignored, r"model\.mtp_.*"))


ARCHITECTURES = {"Ernie4_5_MoeForCausalLM": replace(ERNIE, weights=weights_ernie_moe)}
