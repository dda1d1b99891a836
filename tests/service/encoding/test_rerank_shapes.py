"""Ranking as clients of Cohere, Jina, vLLM and infinity ask for it: their fields, their scores, their addresses."""

from typing import Any

import httpx
import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from service.tasks.embeddings import within_unit

DOCUMENTS = ["sat on the mat", "very bad film and the dog ran to the far hill", "not", "the cat", "good good dog"]
LONG = "the cat sat on the mat " * 20
CLOSE = {"abs": 2e-5}


def scores(answer: Any) -> list[float]:
    """In the order of the documents."""
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("activation", ["Identity", "Sigmoid", "Tanh"])
async def test_relevance_by_a_cross_encoder_is_its_logits_sigmoid(
    make_reranker: Any, post: Any, activation: str
) -> None:
    """Most cross-encoders give bare logits, and Cohere's clients expect 0 to 1."""
    name = "torch.nn.modules.linear.Identity" if activation == "Identity" else f"torch.nn.{activation}"
    folder = make_reranker(sbert_ce_default_activation_function=name)
    raw = await post("/v1/rerank", query="the cat", documents=DOCUMENTS, raw_scores=True)
    answer = await post("/v2/rerank", model=folder.name, query="the cat", documents=DOCUMENTS)
    assert scores(answer) == pytest.approx(1 / (1 + np.exp(-np.array(scores(raw)))), **CLOSE)
    assert [entry["index"] for entry in answer["results"]] == [entry["index"] for entry in raw["results"]]
    assert answer["id"]
    assert answer["meta"]["billed_units"] == {"search_units": 1}


@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
async def test_relevance_by_an_embedding_checkpoint_keeps_the_order_within_unit(
    make_embedder: Any, post: Any, measure: str
) -> None:
    make_embedder(normalize=False, similarity_fn_name=measure)
    own = await post("/v1/rerank", query="the cat", documents=DOCUMENTS)
    answer = await post("/v2/rerank", query="the cat", documents=DOCUMENTS)
    assert [entry["index"] for entry in answer["results"]] == [entry["index"] for entry in own["results"]]
    found = [entry["relevance_score"] for entry in answer["results"]]
    assert sorted(found, reverse=True) == found
    assert 0 <= found[-1] < found[0] <= 1
    if measure == "cosine":
        assert scores(answer) == pytest.approx([(1 + score) / 2 for score in scores(own)], **CLOSE)


def test_large_dot_products_stay_apart() -> None:
    """A sigmoid would give 1 for all of them."""
    assert within_unit(80.0, "dot") < within_unit(81.0, "dot") < 1
    assert [within_unit(score, "dot") for score in (-3.0, 0.0, 4.0)] == [0.125, 0.5, 0.9]
    assert [within_unit(score, "euclidean") for score in (-1.0, 0.0)] == [0.5, 1.0]
    assert within_unit(1.0000001, "cosine") == 1.0


async def test_documents_are_cut_under_v2_and_say_so(make_reranker: Any, post: Any) -> None:
    """Cohere's service cuts them by itself; under /v1 they are refused unless it is asked for."""
    folder = make_reranker()
    answer = await post("/v2/rerank", query="the cat", documents=["good", LONG])
    entries = {entry["index"]: entry for entry in answer["results"]}
    assert (entries[1]["truncated"], entries[1]["kept_tokens"]) == (True, 64)
    assert "truncated" not in entries[0]
    assert answer["usage"]["truncated_tokens"] == 2 + 120 + 3 - 64
    expected = CrossEncoder(str(folder), device="cpu").predict([("the cat", LONG)])[0]
    assert entries[1]["relevance_score"] == pytest.approx(float(expected), **CLOSE)
    error = (await post("/v1/rerank", query="the cat", documents=["good", LONG]))["errors"][0]
    assert error["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_max_tokens_per_doc_counts_the_documents_own_tokens(make_reranker: Any, post: Any, path: str) -> None:
    make_reranker()
    whole = await post(path, query="the cat", documents=["the cat sat on", "good"])
    cut = await post(path, query="the cat", documents=["the cat sat on the mat", "good"], max_tokens_per_doc=4)
    assert scores(cut) == pytest.approx(scores(whole), **CLOSE)
    entries = {entry["index"]: entry for entry in cut["results"]}
    assert (entries[0]["truncated"], entries[0]["kept_tokens"]) == (True, 2 + 4 + 3)
    assert cut["usage"]["truncated_tokens"] == 2


async def test_max_tokens_per_doc_leaves_the_query_of_an_embedding_checkpoint_whole(
    make_embedder: Any, post: Any
) -> None:
    make_embedder()
    query = "the cat sat on the mat"
    whole = await post("/v1/rerank", query=query, documents=["the dog", "good"])
    cut = await post("/v1/rerank", query=query, documents=["the dog ran", "good"], max_tokens_per_doc=2)
    assert scores(cut) == pytest.approx(scores(whole), **CLOSE)
    assert cut["usage"]["truncated_tokens"] == 1


async def test_a_query_that_is_cut_is_counted(make_embedder: Any, post: Any) -> None:
    """An embedding checkpoint's query was cut where that was asked for, and nothing told of it."""
    make_embedder()
    answer = await post("/v1/rerank", query=LONG, documents=["the dog"], truncate=True)
    assert answer["usage"]["truncated_tokens"] == 122 - 64
    assert answer["usage"]["prompt_tokens"] == 64 + 4
    assert "truncated" not in answer["results"][0]


@pytest.mark.parametrize("limit", [16, -1])
async def test_truncate_prompt_tokens_is_of_query_and_document_together(
    make_reranker: Any, post: Any, limit: int
) -> None:
    make_reranker()
    answer = await post("/v1/rerank", query="the cat", documents=["good", LONG], truncate_prompt_tokens=limit)
    entries = {entry["index"]: entry for entry in answer["results"]}
    assert (entries[1]["truncated"], entries[1]["kept_tokens"]) == (True, 64 if limit == -1 else limit)
    assert "truncated" not in entries[0]


async def test_documents_may_be_objects_with_more_than_text(make_reranker: Any, post: Any) -> None:
    make_reranker()
    plain = await post("/v1/rerank", query="the cat", documents=DOCUMENTS[:2])
    objects = [{"text": DOCUMENTS[0], "title": "good", "year": 1999}, {"text": DOCUMENTS[1], "tags": ["film"]}]
    answer = await post("/v1/rerank", query="the cat", documents=objects, return_documents=True)
    assert scores(answer) == scores(plain)
    assert [entry["document"] for entry in answer["results"]] == [objects[e["index"]] for e in answer["results"]]


async def test_rank_fields_say_what_is_read_of_objects(make_reranker: Any, post: Any, refused: Any) -> None:
    make_reranker()
    plain = await post("/v1/rerank", query="the cat", documents=["good\nthe dog", "not"])
    objects = [{"title": "good", "body": "the dog", "text": "bad"}, "not"]
    asked = {"rank_fields": ["title", "body"], "max_chunks_per_doc": 1}
    answer = await post("/v1/rerank", query="the cat", documents=objects, **asked)
    assert scores(answer) == scores(plain)
    error = await refused("/v1/rerank", query="the cat", documents=objects, rank_fields=["title", "none"])
    assert error["param"] == "documents.0.none"


async def test_the_body_tells_whose_shape_rerank_at_the_root_has(make_reranker: Any, post: Any) -> None:
    """vLLM, infinity and Jina have `documents` there, text-embeddings-inference has `texts`."""
    make_reranker()
    expected = await post("/v1/rerank", query="the cat", documents=DOCUMENTS, top_n=2)
    answer = await post("/rerank", model="reranker", query="the cat", documents=DOCUMENTS, top_n=2)
    assert answer["results"] == expected["results"]
    rows = await post("/rerank", query="the cat", texts=DOCUMENTS)
    assert rows[:2] == [{"index": e["index"], "score": e["relevance_score"]} for e in expected["results"]]


async def test_priority_under_v2_is_the_other_way_round(make_reranker: Any, engine: Any, post: Any) -> None:
    make_reranker()
    await post("/v2/rerank", query="the cat", documents=["good"], priority=7)
    assert engine.encoded[-1].priority == -7


@pytest.mark.parametrize(
    "body", [{"priority": -1}, {"priority": 1000}, {"raw_scores": True}, {"max_chunks_per_doc": 1}, {"rank": 1}]
)
async def test_what_v2_does_not_take_is_named(make_reranker: Any, refused: Any, body: dict[str, Any]) -> None:
    make_reranker()
    error = await refused("/v2/rerank", query="the cat", documents=["good"], **body)
    assert error["param"] == next(iter(body))


async def test_one_document_that_fails_under_v2_fails_alone(
    make_reranker: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    make_reranker()
    engine.poison = set(engine.models["reranker"].tokenizer.encode("poison", add_special_tokens=False))
    response = await client.post("/v2/rerank", json={"query": "the cat", "documents": ["good", "poison"]})
    assert response.status_code == 200
    answer = response.json()
    assert [entry["index"] for entry in answer["results"]] == [0]
    assert [entry["index"] for entry in answer["errors"]] == [1]
