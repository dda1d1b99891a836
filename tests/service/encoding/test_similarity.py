"""`/v1/similarity` and `/v1/rerank`: the scores of sentence-transformers, and what becomes of texts that fail."""

from typing import Any

import httpx
import pytest
import torch
from sentence_transformers import CrossEncoder

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill", "not a dog"]
LONG = "the cat sat on the mat " * 20
CLOSE = {"abs": 2e-5}


@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("normalize", [True, False])
async def test_similarities_are_those_of_sentence_transformers(
    make_embedder: Any, post: Any, measure: str, normalize: bool
) -> None:
    reference = make_embedder(normalize=normalize, similarity_fn_name=measure)
    vectors = reference.encode(TEXTS)
    expected = reference.similarity(vectors, vectors)
    for row, source in enumerate(TEXTS):
        answer = await post("/v1/similarity", source=source, targets=TEXTS)
        assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]
        found = [entry["score"] for entry in answer["data"]]
        assert found == pytest.approx(expected[row].tolist(), abs=2e-4, rel=1e-5)
    pairs = [[TEXTS[0], TEXTS[1]], [TEXTS[2], TEXTS[3]]]
    answer = await post("/v1/similarity", pairs=pairs)
    diagonal = [float(expected[0, 1]), float(expected[2, 3])]
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(diagonal, abs=2e-4, rel=1e-5)


async def test_a_text_that_is_there_twice_is_read_once(make_embedder: Any, post: Any, engine: Any) -> None:
    make_embedder()
    await post("/v1/similarity", source=TEXTS[0], targets=[TEXTS[1], TEXTS[0], TEXTS[1]])
    assert [len(request.inputs) for request in engine.encoded] == [2]


async def test_the_prompt_goes_before_both_sides(make_embedder: Any, post: Any) -> None:
    reference = make_embedder(prompts={"task": "query : "})
    vectors = reference.encode(TEXTS, prompt_name="task")
    answer = await post("/v1/similarity", source=TEXTS[0], targets=TEXTS[1:], prompt_name="task")
    expected = reference.similarity(vectors[:1], vectors[1:])[0].tolist()
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected, **CLOSE)


async def test_a_target_that_cannot_be_read_leaves_the_others_their_scores(make_embedder: Any, post: Any) -> None:
    make_embedder()
    answer = await post("/v1/similarity", source=TEXTS[0], targets=[TEXTS[1], LONG])
    assert "score" in answer["data"][0]
    assert answer["data"][1]["error"]["code"] == "context_length_exceeded"
    whole = await post("/v1/similarity", source=TEXTS[0], targets=[TEXTS[1], LONG], truncate=True)
    assert "score" in whole["data"][1]
    assert (whole["data"][1]["truncated"], whole["data"][1]["kept_tokens"]) == (True, 8 + 64)
    assert "truncated" not in whole["data"][0]
    assert whole["usage"]["truncated_tokens"] == 58


async def test_a_cross_encoder_reads_each_pair_together(make_reranker: Any, post: Any) -> None:
    """It says that it can do similarity, and every request for it failed."""
    reference = CrossEncoder(str(make_reranker()), device="cpu")
    expected = reference.predict([(TEXTS[0], text) for text in TEXTS[1:]]).tolist()
    answer = await post("/v1/similarity", source=TEXTS[0], targets=TEXTS[1:])
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected, **CLOSE)
    partly = await post("/v1/similarity", pairs=[["a", LONG], ["a", "b"]])
    assert [set(entry) for entry in partly["data"]] == [{"index", "error"}, {"index", "score"}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"source": LONG, "targets": TEXTS}, "source"),
        ({"source": "a", "targets": [LONG]}, "targets.0"),
        ({"pairs": [["a", LONG], [LONG, "a"]]}, "pairs.0"),
    ],
)
async def test_nothing_left_to_score_is_the_requests_error(
    make_embedder: Any, refused: Any, body: dict[str, Any], param: str
) -> None:
    """A source that is too long gave 200 and an error for each target."""
    make_embedder()
    error = await refused("/v1/similarity", **body)
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")


DOCUMENTS = ["sat on the mat", "very bad film and the dog ran to the far hill", "not", "the cat", "good good dog"]


async def test_scores_of_a_cross_encoder_are_those_of_predict(make_reranker: Any, post: Any) -> None:
    folder = make_reranker()
    reference = CrossEncoder(str(folder), device="cpu")
    pairs = [("the cat", document) for document in DOCUMENTS]
    expected = reference.predict(pairs).tolist()
    answer = await post("/v1/rerank", query="the cat", documents=DOCUMENTS)
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    assert [found[index] for index in range(len(DOCUMENTS))] == pytest.approx(expected, **CLOSE)
    ranked = reference.rank("the cat", DOCUMENTS)
    assert [entry["index"] for entry in answer["results"]] == [entry["corpus_id"] for entry in ranked]
    raw = await post("/v1/rerank", query="the cat", documents=DOCUMENTS, raw_scores=True)
    logits = reference.predict(pairs, activation_fn=torch.nn.Identity()).tolist()
    found = {entry["index"]: entry["relevance_score"] for entry in raw["results"]}
    assert [found[index] for index in range(len(DOCUMENTS))] == pytest.approx(logits, abs=1e-4)


@pytest.mark.parametrize("name", ["ReLU", "GELU", "SiLU", "Tanh", "Identity"])
async def test_a_cross_encoders_own_activation_is_applied(make_reranker: Any, post: Any, name: str) -> None:
    """ReLU, GELU and SiLU were taken for none at all."""
    folder = make_reranker(sbert_ce_default_activation_function=f"torch.nn.modules.activation.{name}")
    reference = CrossEncoder(str(folder), device="cpu", activation_fn=getattr(torch.nn, name)())
    expected = reference.predict([("the cat", document) for document in DOCUMENTS]).tolist()
    answer = await post("/v1/rerank", query="the cat", documents=DOCUMENTS)
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    assert [found[index] for index in range(len(DOCUMENTS))] == pytest.approx(expected, **CLOSE)


async def test_an_embedding_checkpoint_ranks_by_similarity_under_its_prompts(make_embedder: Any, post: Any) -> None:
    reference = make_embedder(prompts={"query": "query : ", "document": "passage : "})
    expected = reference.similarity(reference.encode_query(["the cat"]), reference.encode_document(DOCUMENTS))[0]
    answer = await post("/v1/rerank", query="the cat", documents=DOCUMENTS)
    order = torch.argsort(expected, descending=True).tolist()
    assert [entry["index"] for entry in answer["results"]] == order
    scores = [entry["relevance_score"] for entry in answer["results"]]
    assert scores == pytest.approx(expected[order].tolist(), **CLOSE)


async def test_top_n_keeps_the_best_and_documents_come_back_where_asked_for(make_reranker: Any, post: Any) -> None:
    make_reranker()
    whole = await post("/v1/rerank", query="the cat", documents=DOCUMENTS)
    assert all("document" not in entry for entry in whole["results"])
    mixed = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]
    best = await post("/v1/rerank", query="the cat", documents=mixed, top_n=2, return_documents=True)
    assert [entry["index"] for entry in best["results"]] == [entry["index"] for entry in whole["results"][:2]]
    for entry in best["results"]:
        assert entry["document"] == {"text": DOCUMENTS[entry["index"]]}
    more = await post("/v1/rerank", query="the cat", documents=DOCUMENTS, top_n=100)
    assert more["results"] == whole["results"]


async def test_equal_scores_stay_in_their_order(make_reranker: Any, post: Any) -> None:
    make_reranker()
    answer = await post("/v1/rerank", query="the cat", documents=["good"] * 5)
    assert [entry["index"] for entry in answer["results"]] == [0, 1, 2, 3, 4]


async def test_a_document_that_is_too_long_is_cut_where_asked_for_and_marked(make_reranker: Any, post: Any) -> None:
    """What is cut is the document: the query is what every document is compared by."""
    folder = make_reranker()
    answer = await post("/v1/rerank", query="the cat", documents=["good", LONG], truncate=True)
    entries = {entry["index"]: entry for entry in answer["results"]}
    assert "truncated" not in entries[0]
    assert (entries[1]["truncated"], entries[1]["kept_tokens"]) == (True, 64)
    expected = CrossEncoder(str(folder), device="cpu").predict([("the cat", LONG)])[0]
    assert entries[1]["relevance_score"] == pytest.approx(float(expected), **CLOSE)
    assert answer["usage"]["truncated_tokens"] == 2 + 120 + 3 - 64


@pytest.mark.parametrize("fault", ["long", "poison"])
async def test_a_document_that_fails_leaves_the_others_their_scores(
    make_reranker: Any, engine: Any, post: Any, fault: str
) -> None:
    make_reranker()
    alone = await post("/v1/rerank", query="the cat", documents=["good", "a dog"])
    engine.poison = set(engine.models["reranker"].tokenizer.encode("poison", add_special_tokens=False))
    bad = LONG if fault == "long" else "poison"
    answer = await post("/v1/rerank", query="the cat", documents=["good", bad, "a dog"])
    scores = sorted(entry["relevance_score"] for entry in answer["results"])
    assert scores == pytest.approx(sorted(entry["relevance_score"] for entry in alone["results"]), **CLOSE)
    assert [entry["index"] for entry in answer["errors"]] == [1]
    code = "context_length_exceeded" if fault == "long" else "generation_failed"
    assert answer["errors"][0]["error"]["code"] == code


async def test_a_query_that_leaves_no_room_is_an_error(
    make_reranker: Any, make_embedder: Any, refused: Any, client: httpx.AsyncClient
) -> None:
    make_reranker()
    make_embedder()
    error = await refused("/v1/rerank", query=LONG, documents=["good"], truncate=True, model="reranker")
    assert error["code"] == "context_length_exceeded"
    error = await refused("/v1/rerank", query=LONG, documents=["good"], model="embedder")
    assert (error["param"], error["code"]) == ("query", "context_length_exceeded")
