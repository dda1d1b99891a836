"""What PEFT's `adapter_config.json` says: the kind of an adapter, the checkpoint it was trained on, how much it adds.

Plain data, no torch, so that the API process refuses what the worker could not merge. Which modules are adapted is not
asked here: the names of the stored tensors tell (`model.adapters.names`).

Source: PEFT's `LoraConfig` (`tuners/lora/config.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from model.adapters.module_patterns import ModulePattern
from model.architectures.raw import RawConfig, read_json
from model.errors import UnsupportedArchitectureError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
JOINED_FOLDER = "joined-adapter"
"""Where a joined folder (`model.adapters.folder`) has the adapter's two files."""

VARIANTS: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "LoRA with repeated layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA of single parameters",
    "trainable_token_indices": "LoRA with single trained tokens",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
"""Keys of a LoRA's config that make another kind of it."""
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` by which training begins with other weights than the base's."""
MAX_ALPHA = 3.4028234663852886e38
"""Of float32, in which is merged."""
MAX_PATH_CHARACTERS = 4096
MAX_PATTERNS = 10_000
MAX_PATTERN_STATES = 50_000
"""Of all expressions of a key together: each is asked of each module."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """A LoRA (arXiv 2106.09685), with the variants that can be merged into plain weights."""

    base: str
    """A folder or a hub name, as it is written."""
    base_revision: str | None = None
    task: str | None = None
    """PEFT's `task_type`."""
    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[ModulePattern, int] = field(default_factory=dict)
    alpha_pattern: Mapping[ModulePattern, float] = field(default_factory=dict)
    """Exceptions by the module's name; the first that fits holds."""
    rank_stabilized: bool = False
    inputs_first: bool = False
    """Weights are stored [in, out] (GPT-2's Conv1D)."""
    decomposed: bool = False
    """Each output's weights have a trained length (DoRA)."""
    keeps_ties: bool = False
    """What changes an embedding changes the output matrix that is tied to it, too."""

    @property
    def base_name(self) -> str:
        """The base without the way to it: a hub name as it is, of a folder its own name."""
        is_hub_name = self.base.count("/") <= 1 and self.base[:1] not in (".", "~", "/")
        return self.base if is_hub_name else Path(self.base).name

    def rank_of(self, module: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if key.fits(module)), self.rank)

    def scale(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) where stabilized (arXiv 2312.03732)."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if key.fits(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (rank**0.5 if self.rank_stabilized else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The adapter's settings.

    Raises: UnsupportedArchitectureError for a kind that cannot be merged, which it names; CheckpointError for values
    that make no sense.
    """
    raw = RawConfig(read_json(folder / ADAPTER_CONFIG), ADAPTER_CONFIG)
    _check_kind(raw)
    return AdapterConfig(
        base=_base(raw),
        base_revision=raw.text("revision") if "revision" in raw else None,
        task=raw.text("task_type") if "task_type" in raw else None,
        rank=raw.size("r", 8),
        alpha=_alpha(raw, "lora_alpha", 8),
        rank_pattern=_by_pattern(raw, "rank_pattern", RawConfig.size),
        alpha_pattern=_by_pattern(raw, "alpha_pattern", _alpha),
        rank_stabilized=raw.flag("use_rslora", False),
        inputs_first=raw.flag("fan_in_fan_out", False),
        decomposed=raw.flag("use_dora", False),
        keeps_ties=raw.flag("ensure_weight_tying", False),
    )


def _check_kind(raw: RawConfig) -> None:
    kind = raw.text("peft_type")
    if kind != "LORA":
        raise _unsupported(f"an adapter of kind {kind}")
    for key, name in VARIANTS.items():
        if raw.values.get(key):
            raise _unsupported(f"{name} ({key!r})")
    start = raw.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise _unsupported(f"a LoRA whose base's weights were changed before training (init_lora_weights {start!r})")


def _unsupported(what: str) -> UnsupportedArchitectureError:
    message = f"{ADAPTER_CONFIG}: {what} cannot be merged into its base, only LoRA, rsLoRA and DoRA"
    return UnsupportedArchitectureError(message, file=ADAPTER_CONFIG)


def _alpha(raw: RawConfig, key: str, default: float | None = None) -> float:
    alpha = raw.number(key, default)
    if not abs(alpha) <= MAX_ALPHA:
        raise raw.wrong(key, "a finite number of float32")
    return alpha


def _base(raw: RawConfig) -> str:
    base = raw.text("base_model_name_or_path")
    if len(base) > MAX_PATH_CHARACTERS:
        raise raw.wrong("base_model_name_or_path", f"at most {MAX_PATH_CHARACTERS:,} characters")
    return base


def _by_pattern(raw: RawConfig, key: str, read: Callable[[RawConfig, str], Value]) -> dict[ModulePattern, Value]:
    section = raw.section(key) if key in raw else RawConfig({}, raw.file)
    found: dict[ModulePattern, Value] = {}
    num_states = 0
    for text in section:
        try:
            pattern = ModulePattern(text)
        except ValueError as error:
            raise raw.wrong(key, f"names and regular expressions ({text[:40]!r} {error})") from error
        found[pattern] = read(section, text)
        num_states += pattern.num_states
        if len(found) > MAX_PATTERNS or num_states > MAX_PATTERN_STATES:
            raise raw.wrong(key, f"at most {MAX_PATTERNS:,} names and simpler regular expressions")
    return found
