"""Rotary positions as `config.json` tells them: old keys (`rope_theta`, `rope_scaling`) and new (`rope_parameters`).

The formulas that these numbers enter are in `model.layers`. No torch; both processes.
"""

import math
from collections.abc import Mapping
from typing import Any

from model.architectures.raw import RawConfig
from model.config import Rotary, RotaryScaling
from model.errors import UnsupportedArchitectureError


def rotary(
    raw: RawConfig,
    head_size: int,
    *,
    length: int,
    layer_type: str | None = None,
    theta: float = 10000.0,
    partial: float = 1.0,
) -> Rotary:
    """The rotary positions of all layers, or of those of `layer_type` where `rope_parameters` tells kinds apart.

    `theta` and `partial` (the rotated share of a head) are the architecture's defaults; `length` is the longest
    sequence that will be run, which decides between the short and the long factors of LongRoPE and fixes the stretch
    of "dynamic": keys in the cache cannot be rotated anew when a sequence grows.
    """
    section = _section(raw, layer_type)
    theta = section.number("rope_theta", raw.number("rope_theta", theta))
    partial = section.number("partial_rotary_factor", raw.number("partial_rotary_factor", partial))
    size = int(head_size * partial)
    return Rotary(theta=theta, size=size, scaling=_scaling(raw, section, length, size))


def with_usual_scaling(raw: RawConfig, scaling: Mapping[str, Any]) -> RawConfig:
    """The config with rotary positions stretched so, unless it says how they are."""
    if "rope_parameters" in raw or "rope_scaling" in raw:
        return raw
    return RawConfig({**raw.values, "rope_scaling": dict(scaling)}, raw.file)


def _section(raw: RawConfig, layer_type: str | None) -> RawConfig:
    for key in ("rope_parameters", "rope_scaling"):
        if key in raw:
            section = raw.section(key)
            if layer_type is not None and layer_type in section:
                return section.section(layer_type)
            return section
    return RawConfig({}, raw.file)


def _scaling(raw: RawConfig, section: RawConfig, length: int, size: int) -> RotaryScaling | None:
    kind = section.text("rope_type", section.text("type", "default"))
    trained = raw.size("max_position_embeddings", 2048)
    if "short_factor" in section:
        # Phi-3's first configs call it "su" or "yarn".
        return _longrope(raw, section, length, size)
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=section.number("factor"))
    if kind == "dynamic":
        return RotaryScaling(
            kind="dynamic", factor=section.number("factor"), original_length=trained, length=max(length, trained)
        )
    if kind == "llama3":
        return RotaryScaling(
            kind="llama3",
            factor=section.number("factor"),
            original_length=section.size("original_max_position_embeddings", trained),
            low_frequency_factor=section.number("low_freq_factor"),
            high_frequency_factor=section.number("high_freq_factor"),
        )
    if kind == "yarn":
        return _yarn(section, trained)
    raise UnsupportedArchitectureError(f"{raw.file}: rotary scaling {kind!r} is not supported", file=raw.file)


def _yarn(section: RawConfig, trained: int) -> RotaryScaling:
    original = section.size("original_max_position_embeddings", trained)
    factor = section.number("factor", trained / original)
    if "attention_factor" in section:
        attention_factor = section.number("attention_factor")
    elif section.number("mscale", 0.0) and section.number("mscale_all_dim", 0.0):
        attention_factor = _mscale(factor, section.number("mscale")) / _mscale(factor, section.number("mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)
    return RotaryScaling(
        kind="yarn",
        factor=factor,
        original_length=original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, mscale: float) -> float:
    """The temperature of arXiv 2309.00071, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(raw: RawConfig, section: RawConfig, length: int, size: int) -> RotaryScaling:
    trained = raw.size("max_position_embeddings", 2048)
    outer = raw.size("original_max_position_embeddings", trained)
    original = section.size("original_max_position_embeddings", outer)
    factor = section.number("factor", trained / original)
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    for key in ("short_factor", "long_factor"):
        if len(section.numbers(key)) != size // 2:
            raise section.wrong(key, f"{size // 2} numbers")
    return RotaryScaling(
        kind="per_dimension",
        factor=factor,
        original_length=original,
        factors=section.numbers("long_factor" if length > original else "short_factor"),
        attention_factor=section.number("attention_factor", attention_factor),
    )
