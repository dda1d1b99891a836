"""The rules on tokens that a `generation_config.json` declares: bans, repeats, shortest length, a forced end.

Reads them for decoders, and says which of a checkpoint's parameters change the output and are not implemented. What
encoder-decoders want beyond that is `model.generation_defaults`'s. No torch; both processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.architectures.raw import RawConfig
from model.errors import CheckpointError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "diversity_penalty": (0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "force_words_ids": ([],),
    "top_h": (),
    "watermarking_config": (),
    "stop_strings": ([],),
}
"""Parameters that change the output and that are not implemented, with the values that mean "off"."""

NEUTRAL_FOR_DECODERS: Mapping[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "num_beams": (1,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredRules:
    """A decoder's own. `min_length` counts prompt and completion, `min_new_tokens` the completion alone."""

    no_repeat_ngram_size: int = 0
    suppressed_ids: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int | None = None
    min_length: int = 0
    forced_eos_id: int | None = None

    def min_tokens(self, num_prompt_tokens: int) -> int:
        """The least that a completion has behind a prompt of this length."""
        return max(0, self.min_length - num_prompt_tokens) if self.min_new_tokens is None else self.min_new_tokens


def read_declared_rules(raw: RawConfig, eos_ids: Sequence[int]) -> DeclaredRules:
    """Raises: CheckpointError for a value that is none of its kind."""
    try:
        suppressed, sequences = bans(raw.values, eos_ids)
        return DeclaredRules(
            no_repeat_ngram_size=raw.whole("no_repeat_ngram_size", 0),
            suppressed_ids=suppressed,
            banned_sequences=sequences,
            min_new_tokens=raw.whole("min_new_tokens") if "min_new_tokens" in raw else None,
            min_length=raw.whole("min_length", 0),
            forced_eos_id=one_id(raw.values.get("forced_eos_token_id")),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{raw.file}: token ids are not lists of numbers: {error}", file=raw.file) from error


def not_implemented(values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Those of the declared parameters that would change the output, with their values."""
    set_ones = {key: values[key] for key in neutral if values.get(key) is not None}
    return {key: value for key, value in set_ones.items() if value not in neutral[key]}


def bans(values: Mapping[str, Any], eos_ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Ids that are never generated, and sequences whose last id is not generated behind the others.

    The end is never among them, as in `transformers`' NoBadWordsLogitsProcessor.
    """
    words = [tuple(int(id) for id in word) for word in values.get("bad_words_ids") or []]
    single = [word[0] for word in words if len(word) == 1 and word[0] not in eos_ids]
    suppressed = [*single, *(int(id) for id in values.get("suppress_tokens") or [])]
    return tuple(dict.fromkeys(suppressed)), tuple(dict.fromkeys(word for word in words if len(word) > 1))


def one_id(value: Any) -> int | None:
    """`forced_eos_token_id` may be a list; the most likely of several would be forced, so the first stands for them."""
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else int(value)
