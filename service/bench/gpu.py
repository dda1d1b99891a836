"""`make bench-gpu`: what the engine makes of a GPU, against what the same GPU copies and multiplies, in one table.

Random weights of well-known shapes, made on the device. Decode at batch 1 is held against the copy bandwidth measured
there, prefill and embeddings against the matrix rate; the crowd is the workload that nano-vllm and its kin publish
(256 requests of 100 to 1,024 tokens in and out). No service around it: `make bench` measures that.
A tool; nothing of the service imports it.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from model.batch import SamplingParams
from model.compiled_layers import weight_bytes
from model.decoder import Decoder
from model.encoder_runner import EncodeItem
from service.bench.on_device import make_decoder, make_embedder, make_lane
from service.bench.own import write_between
from service.engine.generation_lane import GenerationLane
from service.engine.memory import keep_what_is_here
from service.engine.protocol import Generate

BEGIN, END = "<!-- gpu -->\n", "<!-- /gpu -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is run; the toy exercises the same code on any machine."""

    decoders: tuple[str, ...]
    crowd_decoder: str
    encoder: str
    prompt_tokens: int = 128
    output_tokens: int = 256
    crowd: int = 256
    crowd_range: tuple[int, int] = (100, 1024)
    prefill_tokens: int = 65536
    prefill_length: int = 1024
    texts: int = 512
    text_length: int = 128
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    kv_tokens: int = 300_000
    max_batch_tokens: int = 16384
    repeats: int = 3


REAL = Sizes(decoders=("llama-3.1-8b", "qwen3-0.6b"), crowd_decoder="qwen3-0.6b", encoder="bert-base")
TOY = Sizes(
    decoders=("toy-llama", "toy-qwen3"), crowd_decoder="toy-qwen3", encoder="toy-bert", prompt_tokens=8,
    output_tokens=16, crowd=12, crowd_range=(4, 24), prefill_tokens=64, prefill_length=16, texts=8, text_length=12,
    copy_bytes=1 << 20, matrix=64, kv_tokens=2048, max_batch_tokens=128, repeats=1,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table; `share` is what was reached of the limit, `target` what the project set itself."""

    what: str
    measured: str
    limit: str = ""
    share: float | None = None
    target: float | None = None

    def text(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%}"
        target = "" if self.target is None else f"≥ {self.target:.0%}"
        return f"| {self.what} | {self.measured} | {self.limit} | {share} | {target} |"


class Bench:
    """One device, its measured limits, and the lines so far."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes, block_size: int) -> None:
        self.device = device
        self.dtype = dtype
        self.sizes = sizes
        self.block_size = block_size
        self.copy_rate = self._copy_rate()
        """Bytes read and written a second."""
        self.matrix_rate = self._matrix_rate()
        """Floating-point operations a second."""

    def seconds(self, run: Callable[[], object]) -> float:
        """The least of some runs, after one that is not counted."""
        run()
        best = float("inf")
        for _ in range(self.sizes.repeats):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            best = min(best, time.perf_counter() - started)
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _copy_rate(self) -> float:
        source = torch.zeros(self.sizes.copy_bytes // 4, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() * 4 / self.seconds(lambda: target.copy_(source))

    def _matrix_rate(self) -> float:
        size = self.sizes.matrix
        a, b = (torch.randn((size, size), device=self.device).to(self.dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def lane(self, network: Decoder) -> GenerationLane:
        return make_lane(
            network,
            self.device,
            self.dtype,
            num_blocks=-(-self.sizes.kv_tokens // self.block_size),
            block_size=self.block_size,
            max_batch_tokens=self.sizes.max_batch_tokens,
            max_sequences=max(self.sizes.crowd, 256),
        )


def run_requests(lane: GenerationLane, requests: list[Generate]) -> tuple[int, float]:
    """Output tokens, and the seconds from the first submission to the last token."""
    started = time.perf_counter()
    for request in requests:
        lane.submit(request, 0.0)
    count = 0
    while lane.has_work:
        for output in lane.step(time.monotonic()).tokens:
            if output.error is not None:
                raise RuntimeError(output.error)
            count += len(output.token_ids)
    return count, time.perf_counter() - started


def request_of(number: int, prompt_ids: list[int], max_tokens: int, temperature: float = 0.0) -> Generate:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=number)
    return Generate(request_id=number, model="bench@1", prompt_ids=prompt_ids, sampling=sampling)


def crowd_requests(sizes: Sizes, vocab_size: int) -> list[Generate]:
    """The published workload: seed 0, ids below 10,000, temperature 0.6, no end of text; 133,966 tokens out."""
    chance = random.Random(0)
    low, high = sizes.crowd_range
    prompts = [[chance.randint(0, 10000) for _ in range(chance.randint(low, high))] for _ in range(sizes.crowd)]
    lengths = [chance.randint(low, high) for _ in range(sizes.crowd)]
    return [
        request_of(index, [token % vocab_size for token in prompt], length, temperature=0.6)
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def single_stream(bench: Bench, shape: str, network: Decoder) -> Line:
    """Decode at batch 1: every token reads every weight once, but for the rows of the input embedding."""
    sizes = bench.sizes
    read = weight_bytes(network)
    if network.embedding.weight.data_ptr() != network.output.weight.data_ptr():
        read -= network.embedding.weight.numel() * network.embedding.weight.element_size()
    lane = bench.lane(network)
    rates = []
    for number in range(sizes.repeats + 1):
        chance = random.Random(number)
        prompt = [chance.randrange(network.config.vocab_size) for _ in range(sizes.prompt_tokens)]
        _, short = run_requests(lane, [request_of(2 * number, prompt, 1)])
        count, whole = run_requests(lane, [request_of(2 * number + 1, prompt, sizes.output_tokens)])
        rates.append((count - 1) / (whole - short))
    rate = max(rates[1:])
    limit = bench.copy_rate / read
    return Line(f"{shape}, decode, 1 stream", f"{rate:,.0f} tok/s", f"{limit:,.0f} tok/s (copy)", rate / limit, 0.8)


def prefill(bench: Bench, shape: str, network: Decoder) -> Line:
    """Whole prompts, against the products of their layers and of attention (logits are of last tokens only)."""
    sizes = bench.sizes
    config = network.config
    lane = bench.lane(network)
    numbers, chance = itertools.count(), random.Random(0)
    count = sizes.prefill_tokens // sizes.prefill_length
    rounds = iter(
        [
            [[chance.randrange(config.vocab_size) for _ in range(sizes.prefill_length)] for _ in range(count)]
            for _ in range(sizes.repeats + 1)
        ]
    )

    def run() -> None:
        run_requests(lane, [request_of(next(numbers), prompt, 1) for prompt in next(rounds)])

    rate = sizes.prefill_tokens / bench.seconds(run)
    heads = config.num_heads + 2 * config.num_kv_heads + config.num_heads
    parameters = config.num_layers * config.hidden_size * (heads * config.head_size + 3 * config.intermediate_size)
    attention = 2 * config.num_layers * config.num_heads * config.head_size * sizes.prefill_length  # half is masked
    limit = bench.matrix_rate / (2 * parameters + attention)
    return Line(f"{shape}, prefill", f"{rate:,.0f} tok/s", f"{limit:,.0f} tok/s (matmul)", rate / limit, 0.6)


def crowd(bench: Bench, shape: str, network: Decoder) -> Line:
    lane = bench.lane(network)
    requests = crowd_requests(bench.sizes, network.config.vocab_size)
    # Once with other prompts: what is compiled and captured for each size of the batch is not counted.
    warm_up = [
        msgspec.structs.replace(request, request_id=10**6 + request.request_id, prompt_ids=request.prompt_ids[::-1])
        for request in requests
    ]
    run_requests(lane, warm_up)
    count, seconds = run_requests(lane, requests)
    assert count == sum(request.sampling.max_tokens for request in requests)
    return Line(f"{shape}, {len(requests)} requests, {count:,} tokens out", f"{count / seconds:,.0f} tok/s")


def embeddings(bench: Bench) -> Line:
    sizes = bench.sizes
    runner = make_embedder(sizes.encoder, bench.device, bench.dtype)
    config = runner.network.config
    chance = random.Random(0)
    items = [
        EncodeItem(ids=[chance.randrange(config.vocab_size) for _ in range(sizes.text_length)], output="embedding")
        for _ in range(sizes.texts)
    ]
    rate = sizes.texts * sizes.text_length / bench.seconds(lambda: runner.run(items))
    matrices = sum(
        p.numel() for name, p in runner.network.named_parameters() if p.dim() == 2 and "embedding" not in name
    )
    attention = 4 * config.num_layers * config.hidden_size * sizes.text_length
    limit = bench.matrix_rate / (2 * matrices + attention)
    what = f"{sizes.encoder}, {sizes.texts} texts of {sizes.text_length} tokens"
    return Line(what, f"{rate:,.0f} tok/s", f"{limit:,.0f} tok/s (matmul)", rate / limit)


def table(bench: Bench, lines: list[Line], quantization: str) -> str:
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    head = [
        f"`make bench-gpu`: {name}, torch {torch.__version__}, {str(bench.dtype).removeprefix('torch.')}"
        f"{'' if quantization == 'none' else ', ' + quantization}, blocks of {bench.block_size}; copies "
        f"{bench.copy_rate / 1e9:,.0f} GB/s, multiplies {bench.matrix_rate / 1e12:,.1f} TFLOP/s.",
        "",
        "| what | measured | limit | share | target |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(line.text() for line in lines)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "fp8", "int8", "int4"), default="none")
    parser.add_argument("--block-size", type=int, default=16, help="256 lets PyTorch's flash kernels read the cache")
    parser.add_argument("--toy", action="store_true", help="sizes for a look at whether it runs")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args(arguments)
    sizes = TOY if options.toy else REAL
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    keep_what_is_here()  # as the worker does
    bench = Bench(device, dtype, sizes, options.block_size)
    lines = []
    for shape in sizes.decoders:
        network = make_decoder(shape, device, dtype, options.quantization)
        lines += [single_stream(bench, shape, network), prefill(bench, shape, network)]
        if shape == sizes.crowd_decoder:
            lines.append(crowd(bench, shape, network))
        del network
        torch.cuda.empty_cache()
    lines.append(embeddings(bench))
    text = table(bench, lines, options.quantization)
    sys.stdout.write(text + "\n")
    if options.write:
        write_between(BEGIN, END, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
