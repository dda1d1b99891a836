"""With a GPU: the whole engine there gives the tokens that it gives on a CPU, whatever path a step takes."""

import copy

import pytest
import torch

from model.batch import SamplingParams
from model.decoder import Decoder
from model.gpu_network import fuse_layers
from service.bench.on_device import make_decoder, make_lane
from service.engine.generation_lane import GenerationLane
from service.engine.protocol import Generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_REQUESTS = 24


def requests(temperature: float) -> list[Generate]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 90, (NUM_REQUESTS,), generator=generator).tolist()
    return [
        Generate(
            request_id=number,
            model="bench@1",
            prompt_ids=torch.randint(0, 500, (length,), generator=generator).tolist(),
            sampling=SamplingParams(
                max_tokens=20 + number,
                temperature=temperature,
                seed=number,
                logprobs=2,
                repetition_penalty=1.2 if number % 5 == 0 else 1.0,  # whose sampling waits for the step before
            ),
        )
        for number, length in enumerate(lengths)
    ]


def tokens_of(lane: GenerationLane, work: list[Generate]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {request.request_id: [] for request in work}
    for request in work:
        lane.submit(request, 0.0)
    while lane.has_work:
        for output in lane.step(0.0).tokens:
            assert output.error is None
            found[output.request_id] += output.token_ids
    return found


def lane_on(network: Decoder, device: str, num_blocks: int) -> GenerationLane:
    return make_lane(
        network, torch.device(device), torch.float32, num_blocks=num_blocks, block_size=16, max_batch_tokens=64,
        max_sequences=NUM_REQUESTS,
    )  # fmt: skip


@pytest.mark.parametrize("shape", ["toy-llama", "toy-qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "seeded"])
@pytest.mark.parametrize("num_blocks", [256, 24], ids=["room for all", "preempts"])
def test_a_gpu_and_a_cpu_say_the_same(shape, temperature, num_blocks):
    network = make_decoder(shape, torch.device("cpu"), torch.float32)
    work = requests(temperature)
    expected = tokens_of(lane_on(network, "cpu", num_blocks), work)
    assert [len(expected[request.request_id]) for request in work] == [r.sampling.max_tokens for r in work]
    there = copy.deepcopy(network).cuda()
    for table in there.rotary_tables:
        table.table = table.table.cuda()
    fuse_layers(there)
    lane = lane_on(there, "cuda", num_blocks)
    assert tokens_of(lane, work) == expected
    assert tokens_of(lane, work) == expected, "with the prefix cache warm and every graph captured"
