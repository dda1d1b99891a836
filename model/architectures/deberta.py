"""DeBERTa, the first version (arXiv 2006.03654): fused projections, of which keys have no bias, and no buckets.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from model.architectures import deberta_v2
from model.architectures.encoders import Kind, family, only
from model.architectures.llama import with_defaults
from model.architectures.mapping import HeadOrder, Part, WeightMap, grouped_heads
from model.architectures.raw import RawConfig
from model.config import EncoderConfig

COMPUTED = {
    "talking_head": False,
    "position_buckets": -1,
    "norm_rel_ebd": "none",
    "share_att_key": False,
    "conv_kernel_size": 0,
}
"""Heads that talk were never trained; the rest is the second version's."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    only(raw, COMPUTED)
    return deberta_v2.configure(with_defaults(raw, {"vocab_size": 50265}), limit, kind)


def weights(config: EncoderConfig) -> WeightMap:
    shared = deberta_v2.weights(config)
    parameters, zeros = dict(shared.parameters), []
    rows = config.hidden_size
    order = HeadOrder(head_size=config.head_size, heads=grouped_heads(config.num_heads, config.num_heads))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"deberta.encoder.layer.{layer}.attention.self"
        fused = Part(name=f"{theirs}.in_proj.weight", order=order)
        parameters[f"{ours}.query_key_value.weight"] = (fused,)
        biases = (f"{theirs}.{x}_bias" for x in "qkv")
        parameters[f"{ours}.query_key_value.bias"] = tuple(Part(name=name, rows=rows) for name in biases)
        zeros += [f"{theirs}.k_bias", f"{theirs}.pos_key_proj.bias"]
    return WeightMap(
        parameters=parameters,
        ignored=shared.ignored,
        prefix=shared.prefix,
        renamed=(*shared.renamed, (".pos_proj.", ".pos_key_proj."), (".pos_q_proj.", ".pos_query_proj.")),
        zeros=tuple(zeros),
    )


ARCHITECTURES = family("Deberta", configure, weights)
