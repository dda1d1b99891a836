"""What is said in the log about a checkpoint that is loaded, where it will not do all that its files say.

Nothing of it is an error: whoever serves the checkpoint may mean it so. API process.
"""

import logging
from pathlib import Path

from model.architectures.mapping import NetworkConfig
from model.architectures.raw import RawConfig
from model.config import DecoderConfig
from model.declared_rules import NEUTRAL_FOR_DECODERS, not_implemented

log = logging.getLogger("slimpajama.checkpoint")


def tell_of_own_code(folder: Path, raw: RawConfig, name: str) -> None:
    """Warns of code of the checkpoint's own, which is never run: the class of that name here may compute otherwise.

    Most such code is what transformers has taken in since; what its config says beyond that is read or refused.
    """
    if "auto_map" in raw:
        modules = ", ".join(sorted({str(value) for value in raw.section("auto_map").values.values()}))
        log.warning("%s brings code of its own (%s), which is not run: read as the usual %s", folder, modules, name)


def tell_of_length(folder: Path, config: NetworkConfig, limit: int | None) -> None:
    """Says where a limit on the context is not what is used, and by which factors positions are stretched."""
    length = config.context_length
    if limit is not None and length < limit:
        log.warning("%s: of the %s tokens that are allowed for it can hold %s", folder, f"{limit:,}", f"{length:,}")
    scaling = config.rotary.scaling if isinstance(config, DecoderConfig) and config.rotary is not None else None
    if scaling is not None and scaling.kind == "per_dimension" and scaling.factor > 1:
        which = "long" if length > scaling.original_length else "short"
        log.info(
            "%s: LongRoPE's %s factors for all texts (the short ones are for a context of up to %s tokens)",
            folder,
            which,
            f"{scaling.original_length:,}",
        )


def tell_of_what_is_left_out(folder: Path, generation: RawConfig) -> None:
    """Names the parameters of a decoder's `generation_config.json` that it is decoded without."""
    for key, value in not_implemented(generation.values, NEUTRAL_FOR_DECODERS).items():
        log.warning("%s: %s asks for %s: %r, which is not implemented", folder, generation.file, key, value)
