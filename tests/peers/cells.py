"""What is measured: one cell is one load on one server; every server is given the same work from the same seed.

Cells are sized so that one takes a few seconds. Texts are words of one token each, so that two special tokens make a
sentence of the length that is said. Knows the bench tool and the running servers, not tables.
"""

import itertools
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from service.bench.command import make_parser, measure
from service.bench.shapes import SHAPES
from service.bench.workload import Workload
from tests.peers.servers import Running

SPECIAL_TOKENS = 2
# Requests by streams: a round of a stream of 64 tokens takes about a second alone, and half a minute among 64.
REQUESTS = {"smollm2-135m": {1: 5, 4: 12, 16: 48, 64: 128}, "qwen2.5-0.5b": {1: 2, 4: 8, 16: 32, 64: 64}}
LONG_PROMPT = 512
LONGEST_SECONDS = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`streams` clients in closed loop: `requests` in all to generate; or `items` texts a request, for `seconds`."""

    shape: str
    prompt_tokens: int
    streams: int
    output_tokens: int = 0
    requests: int = 0
    items: int = 1
    seconds: float = LONGEST_SECONDS

    @property
    def is_embedding(self) -> bool:
        return self.output_tokens == 0

    @property
    def name(self) -> str:
        if self.is_embedding:
            return f"{self.prompt_tokens} tokens, {self.items} a request, {self.streams} clients"
        return f"{self.prompt_tokens} in, {self.output_tokens} out, {self.streams} streams"


def generation_cells(
    shape: str, *, streams: tuple[int, ...], prompts: tuple[int, ...], output_tokens: int
) -> list[Cell]:
    def requests(prompt_tokens: int, count: int) -> int:
        number = REQUESTS[shape].get(count, max(2 * count, 4))
        return max(number // 2, count) if prompt_tokens >= LONG_PROMPT else number

    return [
        Cell(
            shape=shape, prompt_tokens=tokens, streams=count, output_tokens=output_tokens,
            requests=requests(tokens, count),
        )
        for tokens in prompts
        for count in streams
    ]  # fmt: skip


def embedding_cells(shape: str, *, clients: tuple[int, ...], seconds: float) -> list[Cell]:
    """All of 16 and 128 tokens, 1 and 32 a request; of the large encoder without 1,024 long sentences at once."""
    cells = [
        Cell(shape=shape, prompt_tokens=tokens, items=items, streams=count, seconds=seconds)
        for tokens, items, count in itertools.product((16, 128), (1, 32), clients)
    ]
    return [c for c in cells if shape == "minilm" or c.prompt_tokens * c.items * c.streams <= 128 * 32 * 8]


def measured(running: Running, cell: Cell, *, seed: int, cache: Path) -> dict[str, Any]:
    """The figures of one cell, as `slimpajama bench` gives them. The first requests warm up and are not counted."""
    if running.peer.piped:
        return _piped(running, cell, seed)
    arguments = ["--url", running.url, "--seed", str(seed), "--concurrency", str(cell.streams)]
    arguments += ["--seconds", str(cell.seconds), "--fields", json.dumps(running.peer.fields)]
    arguments += running.peer.options
    if cell.is_embedding:
        arguments += ["--endpoint", "embeddings", "--items", str(cell.items), "--encoding-format", "base64"]
        arguments += ["--prompt-tokens", str(cell.prompt_tokens - SPECIAL_TOKENS)]
    else:
        arguments += ["--requests", str(cell.requests), "--output-tokens", str(cell.output_tokens)]
        arguments += [
            "--prompt-tokens",
            str(cell.prompt_tokens),
            "--token-ids",
            f"1:{SHAPES[cell.shape]['vocab_size']}",
        ]
        if running.peer.text:
            arguments += ["--prompts", str(_prompts(cell, seed, cache))]
    if running.model:
        arguments += ["--model", running.model]
    (figures,) = uvloop.run(measure(make_parser().parse_args(arguments)))
    return asdict(figures)


def _prompts(cell: Cell, seed: int, cache: Path) -> Path:
    """The token ids as words, for a server that takes text alone; enough of them that hardly one comes twice."""
    path = cache / f"prompts-{cell.shape}-{cell.prompt_tokens}-{seed}.txt"
    if not path.exists():
        draw = random.Random(seed)
        size = SHAPES[cell.shape]["vocab_size"]
        lines = (
            "".join(f"w{draw.randrange(1, size)} " for _ in range(cell.prompt_tokens)) for _ in range(20 * cell.streams)
        )
        path.write_text("\n".join(lines) + "\n")
    return path


def _piped(running: Running, cell: Cell, seed: int) -> dict[str, Any]:
    """In process, the texts of all clients go into one call."""
    jobs = Workload(
        endpoint="embeddings",
        items=cell.items * cell.streams,
        prompt_tokens=cell.prompt_tokens - SPECIAL_TOKENS,
        seed=seed,
    ).jobs()
    calls = 8 if cell.items * cell.streams >= 32 else 400
    inputs = [json.loads(job.body)["input"] for job in itertools.islice(jobs, calls)]
    texts = [[value] if isinstance(value, str) else value for value in inputs]
    assert running.process.stdin is not None
    assert running.process.stdout is not None
    for seconds in (0.0, cell.seconds):
        running.process.stdin.write(json.dumps({"texts": texts, "seconds": seconds}) + "\n")
        running.process.stdin.flush()
        answer = json.loads(running.process.stdout.readline())
    return {"items_per_second": answer["texts"] / answer["seconds"], "seconds": answer["seconds"], "failed": 0}
