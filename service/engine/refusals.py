"""Why a request could not run even alone, in the words of its error. Worker process."""

from service.engine.placement import Placement
from service.engine.sequence import Sequence

MAX_TOKEN_ID = 2**31 - 1


def fault_of_ids(sequence: Sequence) -> str | None:
    """No vocabulary is so large; smaller faults are found where the vocabulary is known."""
    for ids in (sequence.prompt_ids, sequence.output_ids, sequence.encoder_ids):
        for extreme in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= extreme <= MAX_TOKEN_ID:
                return f"token id {extreme} is not between 0 and {MAX_TOKEN_ID:,}"
    return None


def refusal(sequence: Sequence, placement: Placement, max_model_len: int, max_rows: int) -> str | None:
    """What of it is beyond the limits; None if it can run."""
    num_prompt, max_tokens = len(sequence.prompt_ids), sequence.sampling.max_tokens
    if num_prompt == 0:
        return "the prompt has no tokens"
    limit = max_model_len - (1 if max_tokens > 0 else 0)
    if num_prompt > limit:
        return f"the prompt has {num_prompt:,} tokens; the limit is {limit:,}"
    if sequence.width > max_rows:
        return f"{sequence.width} beams are asked for; the limit is {max_rows} rows in a step"
    num_blocks = placement.max_blocks(sequence, min(num_prompt + max_tokens, max_model_len))
    if num_blocks > placement.capacity:
        size = placement.block_size
        return (
            f"the request may need {num_blocks * size:,} tokens of KV cache ({len(sequence.encoder_ids):,} "
            f"encoded, {num_prompt:,} prompt, up to {max_tokens:,} output, times {sequence.width}); "
            f"the cache holds {placement.capacity * size:,}"
        )
    return None
