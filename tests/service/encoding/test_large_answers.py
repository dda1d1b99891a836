"""Answers of many numbers: bounded before the network runs, and never all of them Python's floats at once."""

import threading
import tracemalloc
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from lane_engine import LaneEngine
from numpy.testing import assert_allclose, assert_array_equal

from model.tokenizer import Tokenizer
from service.api import embeddings, native
from service.tasks import encoding
from tests.service.encoding.conftest import note_threads

WIDTH = 32


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/embed_all", {"inputs": ["the cat", "sat on the mat"]}, 10),
        ("/embed", {"inputs": ["a", "cat"] * 5}, 10),
        ("/hf/feature-extraction", {"inputs": ["a", "cat"] * 5}, 10),
        ("/v1/embeddings", {"input": ["a", "cat"] * 5}, 10),
    ],
)
async def test_an_answer_of_too_many_numbers_is_refused_before_the_network_runs(
    make_embedder: Any, client: httpx.AsyncClient, engine: LaneEngine, monkeypatch: pytest.MonkeyPatch,
    path: str, body: dict[str, Any], count: int,
) -> None:  # fmt: skip
    """2,048 texts of 500 tokens were 400 million numbers, and the process had no memory for them."""
    make_embedder()
    monkeypatch.setattr(native, "MAX_NUMBERS", count * WIDTH - 1)
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 413
    assert error["code"] == "payload_too_large"
    assert error["param"] in body
    assert f"{count} vectors of 32 numbers" in error["message"]
    assert f"the limit is {count * WIDTH - 1:,}" in error["message"]
    assert not engine.encoded
    monkeypatch.setattr(native, "MAX_NUMBERS", count * WIDTH)
    assert (await client.post(path, json=body)).status_code == 200


async def test_dimensions_left_out_do_not_count(make_embedder: Any, post: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_embedder()
    monkeypatch.setattr(native, "MAX_NUMBERS", 16)
    assert np.shape(await post("/embed", inputs=["a", "cat"], dimensions=8)) == (2, 8)


async def test_large_answers_are_written_as_small_ones_but_in_a_thread(
    make_embedder: Any, post: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_embedder()
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/embed", {"inputs": ["a", "cat"]}),
        ("/embed_all", {"inputs": ["a", "the cat"]}),
        ("/v1/embeddings", {"input": ["a", "cat"]}),
        ("/v1/embeddings", {"input": ["a", "cat"], "encoding_format": "base64"}),
    ]
    small = [await post(path, **body) for path, body in requests]
    threads = note_threads(monkeypatch, (native, "_written"), (embeddings, "_items"))
    monkeypatch.setattr(native, "INLINE_NUMBERS", 10)
    assert [await post(path, **body) for path, body in requests] == small
    assert len(threads) == len(requests)
    assert threading.main_thread() not in threads


async def test_no_more_than_a_vector_at_a_time_is_pythons_floats() -> None:
    rows = [np.random.default_rng(seed).normal(size=(400, 64)).astype(np.float32) for seed in range(20)]
    tracemalloc.start()
    response = await native.vectors_response(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * len(response.body)
    assert_array_equal(np.array(msgspec.json.decode(response.body), np.float32), rows)
    assert (await native.vectors_response([np.zeros(0, np.float32)])).body == b"[[]]"


LONG = "cat " * 2_000


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/tokenize", {"inputs": ["a", LONG]}, "encode_with_offsets"),
        ("/tokenize", {"prompt": LONG, "return_token_strs": True}, "token"),
        ("/v1/tokenize", {"text": LONG, "return_tokens": True}, "token"),
        ("/decode", {"ids": [[5], [6] * 9_000]}, "decode"),
        ("/decode", {"ids": [[5], [6] * 9_000]}, "check_ids"),
        ("/detokenize", {"tokens": [6] * 9_000}, "decode"),
        ("/v1/detokenize", {"tokens": [6] * 9_000}, "check_ids"),
    ],
)
async def test_long_texts_and_many_ids_are_turned_into_each_other_in_a_thread(
    make_embedder: Any, post: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], name: str
) -> None:
    """Eight megabytes of them held up everybody's requests for seconds."""
    make_embedder()
    threads = set()
    original = getattr(Tokenizer, name)

    def noted(self: Tokenizer, *args: Any, **options: Any) -> Any:
        threads.add(threading.current_thread())
        return original(self, *args, **options)

    monkeypatch.setattr(Tokenizer, name, noted)
    await post(path, **body)
    assert threads
    assert threading.main_thread() not in threads


async def test_what_cannot_be_tokenized_or_decoded_is_named(make_embedder: Any, refused: Any) -> None:
    make_embedder()
    assert (await refused("/decode", ids=[[5], [10**6] * 9_000]))["param"] == "ids"
    assert (await refused("/detokenize", tokens=[10**6] * 9_000))["param"] == "tokens"


async def test_many_texts_are_tokenized_some_at_a_time(
    make_embedder: Any, post: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer says five things of every token; of eight megabytes of text at once that took two gigabytes."""
    make_embedder(prompts={"query": "query : "})
    texts = ["the cat sat", "good", LONG, "", "a very bad film " * 3, "dog"] * 3
    whole = await post("/embed", inputs=[text or "a" for text in texts], truncate=True, prompt_name="query")
    sizes: list[int] = []
    original = Tokenizer.encode_batch

    def noted(self: Tokenizer, given: list[str], **options: Any) -> Any:
        sizes.append(sum(map(len, given)) if len(given) > 1 else 0)
        return original(self, given, **options)

    monkeypatch.setattr(Tokenizer, "encode_batch", noted)
    monkeypatch.setattr(encoding, "PIECE_CHARS", 100)
    found = await post("/embed", inputs=[text or "a" for text in texts], truncate=True, prompt_name="query")
    assert_allclose(found, whole, atol=1e-6)
    assert len(sizes) > 3
    assert max(sizes) <= 100 + len(texts) * len("query : ")
