"""A checkpoint in a lane of its own, in this process: what it generates."""

import time
from typing import Any

from model.batch import SamplingParams
from service.engine.loading import load_lane
from service.engine.protocol import Generate, ModelSpec, WorkerConfig

NUM_TOKENS = 24


def generate(prompt_ids: list[int], **wanted: Any) -> list[int]:
    """The tokens after the prompt; `wanted` are fields of the `ModelSpec`."""
    spec = ModelSpec(key="m@1", kv_cache_bytes=8 << 20, **wanted)
    lane = load_lane(spec, WorkerConfig(models=[spec], block_size=16), lambda done, total: None, lambda: None)
    sampling = SamplingParams(max_tokens=NUM_TOKENS)
    lane.submit(Generate(request_id=1, model="m@1", prompt_ids=prompt_ids, sampling=sampling), time.monotonic())
    ids: list[int] = []
    while len(ids) < NUM_TOKENS:
        for output in lane.step(time.monotonic()).tokens:
            assert output.error is None
            ids += output.token_ids
    return ids
