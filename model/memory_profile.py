"""What a step takes of a GPU's memory beside weights and cache: measured by running the largest one that may come.

The cache can then have all that is left, and no step runs out of memory because of it. The step itself runs on any
device; only its measuring needs CUDA. Runs in the worker process, on its loader thread.

Legend: T tokens of the largest step, B its rows.
"""

from collections.abc import Callable

import torch

from model.batch import Batch, Row, SamplingParams
from model.kv_cache import KVCache, KVCacheShape
from model.runner import Runner


def largest_batch(
    max_batch_tokens: int, max_sequences: int, context_length: int, block_size: int, *, encodes: bool = False
) -> tuple[Batch, int]:
    """A batch of T prompt tokens in as many rows as may be, each drawn with filters and scored; and the blocks it uses.

    Worked example: 10 tokens, 3 sequences, contexts up to 4: prompts of 4, 4 and 2 tokens.
    """
    # Nobody's text: what is sampled of it is not looked at.
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, logprobs=20)
    num_rows = max(1, min(max_sequences, max_batch_tokens // (2 if encodes else 1)))
    room = max_batch_tokens
    rows: list[Row] = []
    num_blocks = 0

    def take(num_tokens: int) -> list[int]:
        nonlocal num_blocks
        first, num_blocks = num_blocks, num_blocks + -(-num_tokens // block_size)
        return list(range(first, num_blocks))

    for index in range(num_rows):
        waiting = num_rows - index - 1
        length = max(1, min(context_length, room - waiting))
        if length < context_length and waiting:
            length = max(1, room // (waiting + 1))
        room -= length
        ids = [0] * (1 if encodes else length)
        source = [0] * max(length - 1, 1) if encodes else []
        rows.append(
            Row(-index - 1, ids, 0, take(len(ids)), sampling, True, [], ids, take(len(source)), source, encodes)
        )
    return Batch(rows), num_blocks


def step_bytes(
    shape: KVCacheShape,
    device: torch.device,
    make_runner: Callable[[KVCache], Runner],
    make_batch: Callable[[], tuple[Batch, int]],
) -> int:
    """The most that a step takes, and as much again for the captured ones, whose memory is theirs for good.

    Raises what the device raises if the step does not even fit beside the weights.
    """
    batch, num_blocks = make_batch()
    cache = KVCache.of_shape(shape, num_blocks, device)
    runner = make_runner(cache)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.run(batch)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner, cache
    torch.cuda.empty_cache()
    return 2 * peak
