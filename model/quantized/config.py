"""What `config.json` says of weights that are stored quantized: by which method, and what the reader must know of it.

Plain data, no torch, so that the API process refuses what the worker could not read. Which of the weights are quantized
is not asked here: their names in the files tell (`model.quantized.formats`).

Sources: the `quantization_config` of transformers (`utils/quantization_config.py`), of compressed-tensors
(`quantization/quant_config.py`), of AutoGPTQ and GPTQModel, of AutoAWQ.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from model.architectures.raw import RawConfig
from model.errors import UnsupportedArchitectureError

Block = tuple[int | None, int | None]
"""How many outputs and how many inputs share a scale; None: all of them."""
TENSOR: Block = (None, None)
CHANNEL: Block = (1, None)

PACKED_BITS = (2, 4, 8)
"""Of which a whole number fits into a byte."""
NAIVE_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
PACKED_FORMAT = "pack-quantized"
EXPRESSION = "re:"


@dataclass(frozen=True, slots=True)
class Fp8:
    """8-bit floating point (e4m3) with scales of blocks, of outputs or of whole matrices."""

    block: Block


@dataclass(frozen=True, slots=True)
class Gptq:
    """Integers of `bits` bits, `group_size` inputs sharing scale and zero."""

    bits: int
    group_size: int | None
    zero_offset: int
    """What the stored zeros lack: 1 in the format of AutoGPTQ, 0 in its second version."""


@dataclass(frozen=True, slots=True)
class Awq:
    """Integers of 4 bits in AutoAWQ's "gemm" order, `group_size` inputs sharing scale and zero."""

    group_size: int | None


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """LLM.int8() or 4-bit floats; which of them, each weight says itself."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a group of modules are quantized."""

    targets: tuple[str, ...]
    packed: bool
    bits: int
    floating: bool
    symmetric: bool
    block: Block


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Integers or 8-bit floats, packed or one by one, as each group of modules has them."""

    schemes: tuple[Scheme, ...]
    ignored: tuple[str, ...]

    def scheme(self, module: str) -> Scheme | None:
        """That of the first group which names the module; else of the first which names a class ("Linear")."""
        if any(_names(target, module) for target in self.ignored):
            return None
        for scheme in self.schemes:
            if any(_names(target, module) for target in scheme.targets):
                return scheme
        classes = (scheme for scheme in self.schemes if any(target[:1].isupper() for target in scheme.targets))
        return next(classes, None)


Quantization = Fp8 | Gptq | Awq | BitsAndBytes | CompressedTensors


def read_quantization(raw: RawConfig) -> Quantization | None:
    """How a checkpoint's weights are quantized; None where `config.json` says nothing of it.

    Raises: UnsupportedArchitectureError for a method, or a variant of it, that is not read; CheckpointError for values
    that make no sense.
    """
    key = next((key for key in ("quantization_config", "compression_config") if key in raw), None)
    if key is None:
        return None
    section = raw.section(key)
    method = section.text("quant_method", _implied_method(section))
    if method not in METHODS:
        raise _unsupported(section, method)
    return METHODS[method](section)


def _implied_method(section: RawConfig) -> str:
    """bitsandbytes and compressed-tensors did not always write their names."""
    if "load_in_8bit" in section or "load_in_4bit" in section:
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in section else "an unknown method"


def _unsupported(section: RawConfig, method: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{section.file}: weights that are stored quantized ({method}) cannot be read, only those of "
        f"{', '.join(METHODS)}; use the checkpoint that they were made from",
        file=section.file,
    )


def _read_fp8(section: RawConfig) -> Fp8:
    if "weight_block_size" not in section:
        return Fp8(TENSOR)
    return Fp8(_block(section, "weight_block_size"))


def _read_gptq(section: RawConfig) -> Gptq:
    bits = _bits(section, "bits", PACKED_BITS, "gptq")
    form = section.text("checkpoint_format", section.text("format", "gptq"))
    if form not in ("gptq", "gptq_v2") or section.flag("is_marlin_format", False):
        raise _unsupported(section, f"gptq in the format {'marlin' if form == 'gptq' else form}")
    # GPTQModel's rules of single modules: those with "-:" say what is not quantized, which the names tell as well.
    rules = section.section("dynamic").values if "dynamic" in section else {}
    if any(not rule.startswith("-:") for rule in rules):
        raise _unsupported(section, "gptq with other settings for some modules")
    return Gptq(bits=bits, group_size=_group_size(section, "group_size"), zero_offset=1 if form == "gptq" else 0)


def _read_awq(section: RawConfig) -> Awq:
    _bits(section, "bits" if "bits" in section else "w_bit", (4,), "awq")
    form = section.text("version", section.text("format", "gemm")).lower()
    if form != "gemm" or section.text("backend", "autoawq") == "llm-awq":
        raise _unsupported(section, f"awq in the format {form if form != 'gemm' else 'llm-awq'}")
    return Awq(group_size=_group_size(section, "group_size" if "group_size" in section else "q_group_size"))


def _read_compressed_tensors(section: RawConfig) -> CompressedTensors:
    sparsity = section.section("sparsity_config").text("format", "dense") if "sparsity_config" in section else "dense"
    if sparsity != "dense":
        raise _unsupported(section, f"compressed-tensors, {sparsity}")
    if "transform_config" in section and section.section("transform_config").values.get("config_groups"):
        raise _unsupported(section, "compressed-tensors with transforms")
    groups = section.section("config_groups")
    form = section.text("format", "dense")
    schemes = [
        _read_scheme(group, group.text("format", form))
        for group in (groups.section(name) for name in groups)
        if "weights" in group
    ]
    ignored = _targets(section, "ignore") if "ignore" in section else ()
    return CompressedTensors(tuple(schemes), ignored)


def _read_scheme(group: RawConfig, form: str) -> Scheme:
    weights = group.section("weights")
    packed, floating = form == PACKED_FORMAT, weights.text("type", "int") == "float"
    if form not in (*NAIVE_FORMATS, PACKED_FORMAT) or (packed and floating):
        raise _unsupported(group, f"compressed-tensors, {form}{' of floats' if packed else ''}")
    possible = (8,) if floating else PACKED_BITS if packed else tuple(range(1, 9))
    bits = _bits(weights, "num_bits", possible, f"compressed-tensors, {form}")
    return Scheme(
        targets=_targets(group, "targets"),
        packed=packed,
        bits=bits,
        floating=floating,
        symmetric=weights.flag("symmetric", True),
        block=_strategy(weights),
    )


def _targets(section: RawConfig, key: str) -> tuple[str, ...]:
    """Names of modules or of their classes, and regular expressions ("re:...") of the former."""
    targets = section.texts(key)
    try:
        for target in targets:
            if target.startswith(EXPRESSION):
                re.compile(target.removeprefix(EXPRESSION))
    except re.error as error:
        raise section.wrong(key, f"names and regular expressions ({error})") from error
    return targets


def _strategy(weights: RawConfig) -> Block:
    """The block of a strategy; one that is not named follows from the size of its groups."""
    group_size = _group_size(weights, "group_size") if "group_size" in weights else None
    implied = "group" if group_size else "channel" if "group_size" in weights else "tensor"
    strategy = weights.text("strategy", implied)
    if strategy == "block":
        return _block(weights, "block_structure")
    strategies: Mapping[str, Block] = {"tensor": TENSOR, "channel": CHANNEL, "group": (1, group_size)}
    if strategy not in strategies or (strategy == "group" and group_size is None):
        raise weights.wrong("strategy", "tensor, channel, block, or group with a group_size")
    return strategies[strategy]


def _bits(section: RawConfig, key: str, possible: tuple[int, ...], method: str) -> int:
    bits = section.whole(key)
    if bits not in possible:
        raise _unsupported(section, f"{method}, {bits} bits")
    return bits


def _group_size(section: RawConfig, key: str) -> int | None:
    """None for -1: one group of all inputs."""
    return None if section.whole(key, 128) == -1 else section.size(key, 128)


def _block(section: RawConfig, key: str) -> Block:
    sizes = section.sizes(key)
    if len(sizes) != 2:
        raise section.wrong(key, "two positive whole numbers")
    return sizes[0], sizes[1]


def _names(target: str, module: str) -> bool:
    """Whether a target is the module's name, or an expression that its beginning matches."""
    if target.startswith(EXPRESSION):
        return re.match(target.removeprefix(EXPRESSION), module) is not None
    return target == module


METHODS: Mapping[str, Callable[[RawConfig], Quantization]] = {
    "awq": _read_awq,
    "bitsandbytes": lambda _: BitsAndBytes(),
    "compressed-tensors": _read_compressed_tensors,
    "fp8": _read_fp8,
    "gptq": _read_gptq,
}
