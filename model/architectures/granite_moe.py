"""Granite's mixtures of experts (arXiv 2408.13359) onto `DecoderConfig`: Granite with experts in every layer."""

from dataclasses import replace

from model.architectures.granite import configure_granite
from model.architectures.llama import weights
from model.architectures.mapping import Architecture, Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.architectures.sparse import num_chosen, num_experts
from model.config import DecoderConfig, ExpertsConfig


def configure_granite_moe(raw: RawConfig, limit: int | None) -> DecoderConfig:
    plain = configure_granite(raw, limit)
    count = num_experts(raw, 8)
    return replace(
        plain,
        architecture="GraniteMoeForCausalLM",
        mlp_bias=False,
        experts=ExpertsConfig(
            num_experts=count,
            num_chosen=num_chosen(raw, count, 2),
            intermediate_size=plain.intermediate_size,
            layers=frozenset(range(plain.num_layers)),
            normalized=True,  # softmax over the chosen ones' scores alone is the same
        ),
    )


def weights_granite_moe(config: DecoderConfig) -> WeightMap:
    """A layer's experts are stored as one tensor for each projection, gate and up in our order."""
    plain = weights(config)
    assert config.experts is not None
    parameters = dict(plain.parameters)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        del parameters[f"{ours}.gate_up.weight"], parameters[f"{ours}.down.weight"]
        parameters[f"{ours}.router.weight"] = part(f"{theirs}.router.layer.weight")
        for expert in range(config.experts.num_experts):
            place = expert, config.experts.num_experts
            for own, stored in (("gate_up", "input_linear"), ("down", "output_linear")):
                matrix = Part(name=f"{theirs}.{stored}.weight", matrix=place)
                parameters[f"{ours}.experts.{expert}.{own}.weight"] = (matrix,)
    return replace(plain, parameters=parameters)


ARCHITECTURES = {
    "GraniteMoeForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_granite_moe, weights=weights_granite_moe
    )
}
