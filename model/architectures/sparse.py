"""What mixtures of experts have in common: which layers are sparse, and how their experts' tensors are named.

Maps `config.json` and stored names onto `ExpertsConfig` and `model.experts`' parameters; knows no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from model.architectures.llama import weights
from model.architectures.mapping import Architecture, Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.config import DecoderConfig, ExpertsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseNames:
    """Of a layer's sparse MLP, and of an expert's three projections within it."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    selection_bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate"


def sparse_decoder(
    configure: Callable[[RawConfig, int | None], DecoderConfig], names: SparseNames, *, paired: bool = False
) -> Architecture[DecoderConfig]:
    """The row of a language model whose tensors are named as Llama's but for the experts; `paired` as in `weights`."""

    def sparse_weights(config: DecoderConfig) -> WeightMap:
        plain = weights(config, paired=paired)
        assert config.experts is not None
        parameters = dict(plain.parameters)
        for layer in sorted(config.experts.layers):
            ours, theirs = f"layers.{layer}.mlp", f"model.layers.{layer}.{names.block}"
            del parameters[f"{ours}.gate_up.weight"], parameters[f"{ours}.down.weight"]
            parameters |= _sparse_mlp(config.experts, names, ours, theirs)
        wide = frozenset(name for name in parameters if name.endswith(".selection_bias"))
        return replace(plain, parameters=parameters, wide=wide)

    return Architecture(network="decoder", head="language_model", configure=configure, weights=sparse_weights)


def _sparse_mlp(experts: ExpertsConfig, names: SparseNames, ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    found = {f"{ours}.router.weight": part(f"{theirs}.{names.router}.weight")}

    def mlp(own: str, stored: str, size: int) -> dict[str, tuple[Part, ...]]:
        halves = tuple(Part(name=f"{theirs}.{stored}.{half}.weight", rows=size) for half in (names.gate, names.up))
        down = part(f"{theirs}.{stored}.{names.down}.weight")
        return {f"{ours}.{own}.gate_up.weight": halves, f"{ours}.{own}.down.weight": down}

    for index in range(experts.num_experts):
        found |= mlp(f"experts.{index}", f"experts.{index}", experts.intermediate_size)
    if experts.selection_bias:
        found[f"{ours}.selection_bias"] = part(f"{theirs}.{names.selection_bias}")
    if experts.shared_size is not None:
        found |= mlp("shared", names.shared, experts.shared_size)
    if experts.shared_gate:
        found[f"{ours}.shared_gate.weight"] = part(f"{theirs}.{names.shared_gate}.weight")
    return found


def num_experts(raw: RawConfig, default: int) -> int:
    """By the key of most config classes, or the one that transformers 5 writes for some of them instead."""
    keys = [key for key in ("num_experts", "num_local_experts") if key in raw]
    sizes = {raw.size(key) for key in keys}
    if len(sizes) > 1:
        raise raw.wrong(keys[1], f"{raw.size(keys[0])}, as {keys[0]!r} says")
    return sizes.pop() if sizes else default


def num_chosen(raw: RawConfig, num_experts: int, default: int | None = None) -> int:
    chosen = raw.size("num_experts_per_tok", default)
    if chosen > num_experts:
        raise raw.wrong("num_experts_per_tok", f"at most the {num_experts} experts")
    return chosen


def sparse_layers(raw: RawConfig) -> frozenset[int]:
    """Every `decoder_sparse_step`th, the first of them the step's last, but for `mlp_only_layers`.

    Worked example: of 6 layers with a step of 2, and layer 3 an MLP, layers 1 and 5 have experts.
    """
    num_layers, step = raw.size("num_hidden_layers"), raw.size("decoder_sparse_step", 1)
    plain = raw.wholes("mlp_only_layers") if "mlp_only_layers" in raw else ()
    return frozenset(range(step - 1, num_layers, step)).difference(plain)
