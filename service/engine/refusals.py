"""Why a request could not run even alone, in the words of its error, and what of it is at fault. Worker process."""

from typing import NamedTuple

from service.engine.placement import Placement
from service.engine.protocol import Blame
from service.engine.sequence import Sequence

MAX_TOKEN_ID = 2**31 - 1


class Refusal(NamedTuple):
    blame: Blame
    message: str


def fault_of_ids(sequence: Sequence) -> Refusal | None:
    """No vocabulary is so large; smaller faults are found where the vocabulary is known."""
    for ids in (sequence.prompt_ids, sequence.output_ids, sequence.encoder_ids):
        for extreme in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= extreme <= MAX_TOKEN_ID:
                return Refusal("request", f"token id {extreme} is not between 0 and {MAX_TOKEN_ID:,}")
    return None


def refusal(sequence: Sequence, placement: Placement, max_model_len: int, max_rows: int) -> Refusal | None:
    """What of it is beyond the limits; None if it can run."""
    num_prompt, max_tokens = len(sequence.prompt_ids), sequence.sampling.max_tokens
    if num_prompt == 0:
        return Refusal("request", "the prompt has no tokens")
    limit = max_model_len - (1 if max_tokens > 0 else 0)
    if num_prompt > limit:
        return Refusal("context", f"the prompt has {num_prompt:,} tokens; the limit is {limit:,}")
    if sequence.width > max_rows:
        message = f"{sequence.width} beams are asked for; the limit is {max_rows} rows in a step"
        return Refusal("request", message)
    num_blocks = placement.max_blocks(sequence, min(num_prompt + max_tokens, max_model_len))
    if num_blocks > placement.capacity:
        size = placement.block_size
        message = (
            f"the request may need {num_blocks * size:,} tokens of KV cache ({len(sequence.encoder_ids):,} "
            f"encoded, {num_prompt:,} prompt, up to {max_tokens:,} output, times {sequence.width}); "
            f"the cache holds {placement.capacity * size:,}"
        )
        return Refusal("context", message)
    return None
