"""The work that chaos runs give the service: streams whose texts are known, and single-pass requests beside them."""

import asyncio
from typing import Any

from tests.chaos.service import Service, Stream

PROMPTS = (
    "Once upon a time",
    "Lily and Tom went to the park",
    "The little dog",
    "One day, a girl named Mia",
    "Tim had",
)
SINGLE_PASS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/embeddings", {"input": ["a red ball", "the dog ran home and slept until the evening"]}),
    ("/v1/sentiment", {"input": "the film was long and I would see it again"}),
    ("/v1/classify", {"input": "the train to the coast is late", "labels": ["travel", "sport", "food"]}),
    ("/v1/similarity", {"source": "a small dog", "targets": ["a puppy", "the stock market", "a large cat"]}),
)


def body_of(number: int, max_tokens: int) -> dict[str, Any]:
    """Every second stream is greedy, the others are sampled with a seed of their own; none ends early."""
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": number} if number % 2 else {"temperature": 0}
    prompt = f"{PROMPTS[number % len(PROMPTS)]}{' and' * (number % 7)}"
    return {"model": "lm", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **sampled}


async def stream_all(service: Service, num_streams: int, max_tokens: int) -> list[Stream]:
    return await asyncio.gather(*(service.stream(**body_of(number, max_tokens)) for number in range(num_streams)))


async def ask_single_pass(service: Service, number: int) -> str:
    """One single-pass request; "" or what was wrong with the answer."""
    path, body = SINGLE_PASS[number % len(SINGLE_PASS)]
    response = await service.client.post(path, json=body)
    return "" if response.status_code == 200 else f"{path} answered {response.status_code}: {response.text[:200]}"
