"""Sparse vectors through HTTP: SparseEncoder's numbers in both shapes, and refusals that say what is possible."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from lane_engine import LaneEngine
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from transformers import PreTrainedTokenizerFast

from service.api import embeddings, native, tei
from service.engine import protocol
from service.engine.protocol import Step, frame
from service.engine.self_test import Golden, check_golden
from service.errors import SwapFailed
from tests.service.encoding.conftest import note_threads

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill", "not a dog"]
LONG = "the cat sat on the mat " * 20

MakeSparse = Callable[..., SparseEncoder]


def dense(rows: list[dict[str, list[Any]]], like: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors as long as the vocabulary, of `{"indices", "values"}`."""
    found = np.zeros_like(like)
    for vector, row in zip(found, rows, strict=True):
        assert row["indices"] == sorted(set(row["indices"]))
        assert all(row["values"])
        vector[row["indices"]] = row["values"]
    return found


def of_tei(rows: list[list[dict[str, Any]]]) -> list[dict[str, list[Any]]]:
    assert all(set(entry) == {"index", "value"} for row in rows for entry in row)
    return [{"indices": [entry["index"] for entry in row], "values": [entry["value"] for entry in row]} for row in rows]


def encode(reference: SparseEncoder, texts: list[str], **settings: Any) -> NDArray[np.float32]:
    vectors = reference.encode(texts, **settings)
    assert isinstance(vectors, torch.Tensor)
    found: NDArray[np.float32] = vectors.to_dense().numpy()
    return found


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("strategy", ["max", "sum"])
async def test_both_shapes_have_the_entries_of_sparse_encoder(
    strategy: str, activation: str, make_sparse: MakeSparse, post: Any
) -> None:
    """A batch as each text alone; one text is a list of one vector, too."""
    reference = make_sparse(pooling_strategy=strategy, activation_function=activation)
    expected = encode(reference, TEXTS)
    assert_allclose(dense(of_tei(await post("/embed_sparse", inputs=TEXTS)), expected), expected, atol=1e-4)
    answer = await post("/v1/sparse_embeddings", input=TEXTS)
    assert [(row["object"], row["index"]) for row in answer["data"]] == [("sparse_embedding", i) for i in range(4)]
    assert_allclose(dense([row["sparse"] for row in answer["data"]], expected), expected, atol=1e-4)
    num_tokens = sum(len(ids) for ids in reference.tokenizer(TEXTS)["input_ids"])
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    for text, vector in zip(TEXTS, expected, strict=True):
        alone = of_tei(await post("/embed_sparse", inputs=text))
        alone += [(await post("/v1/sparse_embeddings", input=text))["data"][0]["sparse"]]
        assert_allclose(dense(alone, expected[:2]), [vector, vector], atol=1e-4)


async def test_prompts_go_before_texts_and_count(make_sparse: MakeSparse, post: Any) -> None:
    reference = make_sparse(prompts={"query": "query : ", "document": "passage : "}, default_prompt_name="document")
    for fields, name in (({}, "document"), ({"prompt_name": "query"}, "query"), ({"input_type": "query"}, "query")):
        expected = encode(reference, TEXTS, prompt_name=name)
        answer = await post("/v1/sparse_embeddings", input=TEXTS, **fields)
        assert_allclose(dense([row["sparse"] for row in answer["data"]], expected), expected, atol=1e-4)
        if "input_type" not in fields:
            rows = await post("/embed_sparse", inputs=TEXTS, **fields)
            assert_allclose(dense(of_tei(rows), expected), expected, atol=1e-4)


@pytest.mark.parametrize("direction", ["right", "left"])
async def test_texts_are_cut_where_that_is_asked_for_and_told(
    direction: str, make_sparse: MakeSparse, client: httpx.AsyncClient, post: Any
) -> None:
    reference = make_sparse()
    reference.tokenizer.truncation_side = direction
    texts = [f"good {LONG}film", "good"]
    expected = encode(reference, texts)
    body = {"inputs": texts, "truncate": True, "truncation_direction": direction.title()}
    response = await client.post("/embed_sparse", json=body)
    assert_allclose(dense(of_tei(response.json()), expected), expected, atol=1e-4)
    headers = response.headers
    assert (headers["x-truncated-tokens"], headers["x-compute-tokens"]) == ("60", "67")
    assert headers["x-compute-type"] == "cpu"
    assert int(headers["x-total-time"]) >= int(headers["x-inference-time"])
    answer = await post("/v1/sparse_embeddings", input=texts, truncate=True, truncation_side=direction)
    assert_allclose(dense([row["sparse"] for row in answer["data"]], expected), expected, atol=1e-4)
    assert [row.get("kept_tokens") for row in answer["data"]] == [64, None]
    assert answer["usage"]["truncated_tokens"] == 60
    assert (await client.post("/embed_sparse?truncate=true", json={"inputs": texts})).json() is not None


async def test_a_text_that_fails_fails_alone_or_in_the_bare_shape_by_its_name(
    make_sparse: MakeSparse, engine: LaneEngine, client: httpx.AsyncClient, post: Any
) -> None:
    make_sparse()
    engine.poison = set(engine.models["sparse"].tokenizer.encode("poison", add_special_tokens=False))
    good, bad = (await post("/v1/sparse_embeddings", input=["good", "poison"]))["data"]
    assert good["sparse"]["indices"]
    assert bad["sparse"] is None
    assert bad["error"]["code"] == "generation_failed"
    response = await client.post("/embed_sparse", json={"inputs": ["good", "poison"]})
    assert (response.status_code, response.json()["error"]["param"]) == (500, "inputs.1")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "good", "model": "sparse"}),
        ("/v1/similarity", {"source": "good", "targets": ["a dog"], "model": "sparse"}),
        ("/v1/rerank", {"query": "good", "documents": ["a dog"], "model": "sparse"}),
        ("/v1/classify", {"input": "good", "model": "sparse"}),
        ("/v1/completions", {"prompt": "good", "model": "sparse"}),
        ("/embed?model=sparse", {"inputs": "good"}),
        ("/embed_all?model=sparse", {"inputs": "good"}),
        ("/v1/sparse_embeddings", {"input": "good", "model": "embedder"}),
        ("/embed_sparse?model=embedder", {"inputs": "good"}),
    ],
)
async def test_what_a_checkpoint_cannot_do_is_refused_with_what_it_can(
    path: str, body: dict[str, Any], make_sparse: MakeSparse, make_embedder: Any, refused: Any
) -> None:
    make_sparse()
    make_embedder()
    error = await refused(path, **body)
    assert (error["code"], error["param"]) == ("task_not_supported", "model")
    if "sparse" in body.get("model", path.partition("=")[2]):
        assert "it can do: embed_sparse" in error["message"]
    else:
        assert "it can do: embed, similarity" in error["message"]
        assert "'embed_sparse' is done by: sparse" in error["message"]


async def test_unnamed_the_sparse_encoder_answers_and_is_told_of(
    make_sparse: MakeSparse, make_embedder: Any, client: httpx.AsyncClient, post: Any
) -> None:
    make_embedder()
    error = (await client.post("/embed_sparse", json={"inputs": "good"})).json()["error"]
    assert error["code"] == "model_not_found"
    assert "no loaded checkpoint can do 'embed_sparse'; together they can do: embed, similarity" in error["message"]
    make_sparse()
    expected = await post("/embed_sparse", inputs=TEXTS)
    assert await post("/?model=sparse", inputs=TEXTS) == expected
    info = (await client.get("/info?model=sparse")).json()
    assert info["model_type"] == {"embedding": {"pooling": "splade"}}
    cards = {card["id"]: card["tasks"] for card in (await client.get("/v1/models")).json()["data"]}
    assert cards["sparse"] == ["embed_sparse"]
    assert "embed_sparse" not in cards["embedder"]


async def test_a_bare_masked_language_model_embeds_both_ways(
    make_model: Any, engine: LaneEngine, client: httpx.AsyncClient, post: Any
) -> None:
    folder: Path = make_model("BertForMaskedLM", "bare")[0]
    engine.load(folder)
    expected = encode(SparseEncoder(str(folder), device="cpu"), TEXTS)
    assert_allclose(dense(of_tei(await post("/embed_sparse", inputs=TEXTS)), expected), expected, atol=1e-4)
    vectors = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    rows = (await post("/v1/embeddings", input=TEXTS))["data"]
    assert_allclose([row["embedding"] for row in rows], vectors, atol=1e-4)
    assert (await client.get("/info")).json()["model_type"] == {"embedding": {"pooling": "mean"}}


async def test_a_text_of_no_entries_has_an_empty_vector(make_sparse: MakeSparse, engine: LaneEngine, post: Any) -> None:
    make_sparse()
    folder = engine.models["sparse"].description.folder
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.bias"] -= 100
    save_file(tensors, folder / "model.safetensors")
    engine.load(folder, "silent")
    assert await post("/embed_sparse?model=silent", inputs=["good", "not a dog"]) == [[], []]
    (row,) = (await post("/v1/sparse_embeddings", input="good", model="silent"))["data"]
    assert row["sparse"] == {"indices": [], "values": []}


async def test_a_steps_results_fit_a_frame_even_where_no_entry_is_zero(
    make_sparse: MakeSparse, engine: LaneEngine, tokenizer: PreTrainedTokenizerFast, post: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of an untrained network over a large vocabulary: a thousand texts' entries were more than a frame may have."""
    bytes_of_two = 2 * len(tokenizer) * 8
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 2 * bytes_of_two)
    reference = make_sparse()
    sizes = []
    lane = engine._lanes[engine.models["sparse"].key]
    step = lane.step

    def measured(now: float) -> Step:
        found = step(now)
        sizes.append(len(frame(found)))
        return found

    monkeypatch.setattr(lane, "step", measured)
    expected = encode(reference, TEXTS)
    assert_allclose(dense(of_tei(await post("/embed_sparse", inputs=TEXTS)), expected), expected, atol=1e-4)
    assert len(sizes) == 2
    assert max(sizes) < protocol.MAX_FRAME_BYTES


async def test_a_golden_answer_is_a_vector_as_long_as_the_vocabulary(
    make_sparse: MakeSparse, engine: LaneEngine
) -> None:
    vector = encode(make_sparse(), TEXTS[:1])[0]
    model = engine.models["sparse"]
    await check_golden(engine, model, Golden(input=TEXTS[0], embedding=vector.tolist()))
    vector[vector.argmax()] += 0.1
    with pytest.raises(SwapFailed, match=r"off by 0\.1"):
        await check_golden(engine, model, Golden(input=TEXTS[0], embedding=vector.tolist()))


@pytest.mark.parametrize(("path", "param"), [("/embed_sparse", "inputs"), ("/v1/sparse_embeddings", "input")])
async def test_an_answer_of_too_many_entries_is_refused_with_the_numbers(
    path: str, param: str, make_sparse: MakeSparse, client: httpx.AsyncClient, engine: LaneEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    num_entries = int((encode(make_sparse(), TEXTS) > 0).sum())
    monkeypatch.setattr(native, "MAX_NUMBERS", 2 * num_entries - 1)
    response = await client.post(path, json={param: TEXTS})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (413, param)
    assert f"4 vectors have more than {num_entries - 1} entries" in error["message"]
    assert engine.encoded[-1].max_numbers == 2 * (num_entries - 1)
    monkeypatch.setattr(native, "MAX_NUMBERS", 2 * num_entries)
    assert (await client.post(path, json={param: TEXTS})).status_code == 200


async def test_large_answers_are_written_as_small_ones_but_in_a_thread(
    make_sparse: MakeSparse, post: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sparse()
    small = [await post("/embed_sparse", inputs=TEXTS), await post("/v1/sparse_embeddings", input=TEXTS)]
    threads = note_threads(monkeypatch, (tei, "_sparse_rows"), (embeddings, "_sparse_items"))
    monkeypatch.setattr(native, "INLINE_NUMBERS", 10)
    assert [await post("/embed_sparse", inputs=TEXTS), await post("/v1/sparse_embeddings", input=TEXTS)] == small
    assert len(threads) == 2
    assert threading.main_thread() not in threads
