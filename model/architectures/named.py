"""Weight maps of decoders whose files have names of their own: each family's file says them once, as plain data.

What a config has no use for (a bias, a norm) is not asked for. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.architectures.llama import head, kinds, tied
from model.architectures.mapping import HeadOrder, Part, WeightMap
from model.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """Stored names without "weight" and "bias"."""

    prefix: str
    """Of all but the head, which files of the bare network leave out."""
    outer: Mapping[str, str]
    """Of embeddings and norms outside of the layers, by ours."""
    layers: str
    inner: Mapping[str, tuple[str, ...]]
    """Of a layer's modules, by ours: several lie one below the other."""
    ignored: tuple[str, ...] = ()
    """Masks and tables, as `WeightMap.ignored`."""
    orders: Mapping[str, HeadOrder] = field(default_factory=dict)
    """How the heads of some of the stored modules of a layer lie."""


def named_weights(config: DecoderConfig, naming: Naming) -> WeightMap:
    parameters: dict[str, tuple[Part, ...]] = {}
    for ours, theirs in naming.outer.items():
        for kind in kinds(config, ours):
            parameters[f"{ours}.{kind}"] = (Part(name=f"{naming.prefix}{theirs}.{kind}"),)
    rows = {"attention.query_key_value": _fused_rows(config)}
    for layer in range(config.num_layers):
        for ours, stored in naming.inner.items():
            several = rows.get(ours, ()) if len(stored) > 1 else (None,)
            for kind in kinds(config, ours):
                parameters[f"layers.{layer}.{ours}.{kind}"] = tuple(
                    Part(
                        name=f"{naming.prefix}{naming.layers}.{layer}.{name}.{kind}",
                        order=naming.orders.get(name),
                        rows=count,
                    )
                    for name, count in zip(stored, several, strict=True)
                )
    return WeightMap(
        parameters=parameters | head(config),
        aliases=tied(config, f"{naming.prefix}{naming.outer['embedding']}.weight"),
        ignored=naming.ignored,
        prefix=naming.prefix,
    )


def _fused_rows(config: DecoderConfig) -> tuple[int, int, int]:
    num_key_rows = config.num_kv_heads * config.head_size
    return config.num_heads * config.head_size, num_key_rows, num_key_rows
