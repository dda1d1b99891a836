"""Keys and values in 8 bits where blocks are few: whoever shares, copies or loses them gets what it gets alone."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.batch import BeamParams, SamplingParams
from model.ops import library
from service.engine.generation_lane import GenerationLane
from service.engine.loading import load_lane
from service.engine.protocol import Generate, ModelSpec, WorkerConfig

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")

SHIPPED = Path(__file__).parents[3] / "checkpoints" / "slimpajama-tiny-lm"
ROOM = 8 << 20
NUM_BLOCKS, BLOCK = 20, 16
VOCAB = 96
SAMPLINGS: list[dict[str, Any]] = [{}, {"beam": BeamParams(num_beams=3)}, {"temperature": 1.0}]


def save_mbart(folder: Path) -> Path:
    """With the shipped language model's tokenizer: what its words mean does not matter here."""
    torch.manual_seed(0)
    config = transformers.MBartConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.MBartForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # what is generated depends on the source
    model.bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text((SHIPPED / "tokenizer.json").read_text())
    return folder


def bytes_of_blocks(num_layers: int, num_kv_heads: int, head_size: int) -> int:
    """Of NUM_BLOCKS and the null block."""
    return (NUM_BLOCKS + 1) * BLOCK * 2 * num_layers * num_kv_heads * (head_size + 4)


NETWORKS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "decoder": (lambda folder: SHIPPED, bytes_of_blocks(6, 2, 64)),
    "encoder-decoder": (save_mbart, bytes_of_blocks(3, 2, 32)),
}


def make_lane(folder: Path, num_bytes: int, **config: Any) -> GenerationLane:
    spec = ModelSpec(key="m@1", folder=str(folder), dtype="bfloat16", kv_cache_dtype="int8", kv_cache_bytes=num_bytes)
    settings = WorkerConfig(models=[spec], block_size=BLOCK, **config)
    lane = load_lane(spec, settings, lambda done, total: None, lambda: None)
    assert isinstance(lane, GenerationLane)
    return lane


def make_crowd(*, encodes: bool) -> list[Generate]:
    """Nine texts that begin alike: greedy ones, beams and sampled ones."""
    chance = random.Random(3)
    shared = [chance.randrange(40, VOCAB) for _ in range(40)]
    crowd = []
    for number in range(9):
        own = [chance.randrange(40, VOCAB) for _ in range(chance.choice([1, 7, 20]))]
        text = shared[: chance.choice([16, 32, 40])] + own
        sampling = SamplingParams(max_tokens=30, seed=number, **SAMPLINGS[number % 3])
        prompt, source = ([2], text) if encodes else (text, [])
        crowd.append(Generate(request_id=number, model="m@1", prompt_ids=prompt, encoder_ids=source, sampling=sampling))
    return crowd


def tokens_of(lane: GenerationLane, requests: list[Generate]) -> tuple[dict[int, list[int]], int]:
    """What each is given, and how often one was put back."""
    found: dict[int, list[int]] = {request.request_id: [] for request in requests}
    num_preempted = 0
    for request in requests:
        lane.submit(request, 0.0)
    while lane.has_work:
        step = lane.step(0.0)
        for output in step.tokens:
            assert output.error is None
            found[output.request_id] += output.token_ids
        num_preempted += 0 if step.stats is None else step.stats.num_preempted
    return found, num_preempted


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_crowd_with_few_blocks_gets_the_tokens_of_each_alone(kind: str, tmp_path: Path) -> None:
    """Prefixes are shared, beams' blocks copied, sequences put back and computed anew; sources lie in blocks, too."""
    save, num_bytes = NETWORKS[kind]
    folder, encodes = save(tmp_path), kind == "encoder-decoder"
    alone: dict[int, list[int]] = {}
    for request in make_crowd(encodes=encodes):
        alone |= tokens_of(make_lane(folder, ROOM, prefix_caching=False), [request])[0]
    lane = make_lane(folder, num_bytes, max_batch_tokens=64)
    assert (lane.loaded.kv_cache_dtype, lane.loaded.num_blocks) == ("int8", NUM_BLOCKS)
    found, num_preempted = tokens_of(lane, make_crowd(encodes=encodes))
    assert found == alone
    assert num_preempted > 0
