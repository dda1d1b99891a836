"""The routes of text-embeddings-inference: its shapes, right numbers, and headers that agree with each other."""

import copy
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sentence_transformers import CrossEncoder
from transformers import PreTrainedTokenizerFast, pipeline

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill", "not a dog"]
LONG = "the cat sat on the mat " * 20


@pytest.mark.parametrize("normalize", [True, False])
async def test_embed_gives_rows_at_unit_length_unless_told_otherwise(
    make_embedder: Any, post: Any, normalize: bool
) -> None:
    """Always two dimensions, also for one text; the checkpoint itself does not normalise here."""
    reference = make_embedder(normalize=False)
    expected = reference.encode(TEXTS, normalize_embeddings=normalize)
    found = await post("/embed", inputs=TEXTS, normalize=normalize)
    assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert_allclose(await post("/embed", inputs=TEXTS[0], normalize=normalize), expected[:1], atol=1e-5, rtol=1e-4)
    assert_allclose(np.linalg.norm(await post("/embed", inputs=TEXTS), axis=1), 1, atol=1e-6)


async def test_embed_cuts_to_dimensions_then_normalises(make_embedder: Any, post: Any) -> None:
    reference = make_embedder()
    found = await post("/embed", inputs=TEXTS, dimensions=8)
    assert_allclose(found, reference.encode(TEXTS, truncate_dim=8, normalize_embeddings=True), atol=1e-5)


async def test_embed_takes_prompts_by_name_and_truncates_where_asked_for(make_embedder: Any, post: Any) -> None:
    reference = make_embedder(prompts={"query": "query : "})
    found = await post("/embed", inputs=[*TEXTS, LONG], prompt_name="query", truncate=True)
    assert_allclose(found, reference.encode([*TEXTS, LONG], prompt_name="query"), atol=1e-5)


@pytest.mark.parametrize("direction", ["Right", "Left"])
async def test_texts_are_cut_at_the_end_that_is_asked_for_and_a_header_says_how_much(
    make_embedder: Any, make_classifier: Any, tokenizer: PreTrainedTokenizerFast, client: httpx.AsyncClient,
    direction: str,
) -> None:  # fmt: skip
    """Cutting at the start was refused, and neither was told: these shapes have no place for it."""
    reference = make_embedder()
    model = make_classifier(LABELS)
    texts = [f"good {LONG}film", "good"]
    reference.tokenizer.truncation_side = direction.lower()
    cutting = {"truncate": True, "truncation_direction": direction}
    found = await client.post("/embed", json={"inputs": texts, **cutting})
    assert_allclose(found.json(), reference.encode(texts), atol=1e-5)
    num_cut = len(tokenizer(texts[0]).input_ids) - 64
    assert found.headers["x-truncated-tokens"] == str(num_cut)
    assert "x-truncated-tokens" not in (await client.post("/embed", json={"inputs": "good", **cutting})).headers
    pair = [texts[0], "the cat"]
    cutter = copy.deepcopy(tokenizer)
    cutter.truncation_side = direction.lower()
    inputs = cutter(*pair, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].sort(descending=True).values
    found = await client.post("/predict", json={"inputs": pair, "raw_scores": True, **cutting})
    assert_allclose([row["score"] for row in found.json()], expected, atol=1e-4)
    assert int(found.headers["x-truncated-tokens"]) > num_cut


@pytest.mark.parametrize("path", ["/embed", "/embed_all", "/predict", "/hf/feature-extraction", "/tokenize"])
async def test_an_address_that_asks_for_what_there_is_not_is_refused(
    path: str, make_embedder: Any, make_classifier: Any, client: httpx.AsyncClient
) -> None:
    make_embedder()
    make_classifier(LABELS)
    response = await client.post(f"{path}?modle=embedder", json={"inputs": "the cat"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "modle")


@pytest.mark.parametrize("path", ["/embed", "/embed_all", "/predict", "/rerank", "/similarity"])
async def test_the_address_may_ask_for_texts_to_be_cut(
    path: str, make_embedder: Any, make_classifier: Any, make_reranker: Any, client: httpx.AsyncClient
) -> None:
    """Some clients can put no field into the body; what was cut is told in the header all the same."""
    make_embedder()
    make_classifier(LABELS)
    make_reranker()
    body = {
        "/rerank": {"query": "the cat", "texts": ["good", LONG]},
        "/similarity": {"inputs": {"source_sentence": "good", "sentences": [LONG]}},
    }.get(path, {"inputs": LONG})
    assert (await client.post(path, json=body)).status_code == 400
    by_body = body | ({"parameters": {"truncate": True}} if path == "/similarity" else {"truncate": True})
    expected = await client.post(path, json=by_body)
    found = await client.post(f"{path}?truncate=true", json=body)
    assert (found.status_code, found.json()) == (200, expected.json())
    assert int(found.headers["x-truncated-tokens"]) == int(expected.headers["x-truncated-tokens"]) > 0
    assert (await client.post(f"{path}?truncate=false", json=body)).status_code == 400
    wrong = await client.post(f"{path}?truncate=yes", json=body)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "truncate")


async def test_embed_all_gives_a_vector_per_token(make_embedder: Any, post: Any) -> None:
    reference = make_embedder()
    expected = reference.encode(TEXTS, output_value="token_embeddings")
    found = await post("/embed_all", inputs=TEXTS)
    for rows, wanted in zip(found, expected, strict=True):
        assert_allclose(rows, wanted.numpy(), atol=1e-4)


LABELS = ["joy", "anger", "fear"]


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
async def test_predict_scores_as_the_pipeline_does(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, post: Any, problem_type: str | None
) -> None:
    """That server takes a softmax over labels that do not exclude each other."""
    model = make_classifier(LABELS, problem_type=problem_type)
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer)(TEXTS, top_k=None)
    check(await post("/predict", inputs=[[text] for text in TEXTS]), expected)
    check([await post("/predict", inputs=TEXTS[0])], expected[:1])


async def test_two_texts_in_a_list_are_one_pair(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, post: Any
) -> None:
    """The trap of this shape: `["a", "b"]` is a pair, two texts are `[["a"], ["b"]]`, and a lone list stays flat."""
    reference = pipeline("text-classification", model=make_classifier(LABELS), tokenizer=tokenizer)
    pair = reference([{"text": "the cat", "text_pair": "a dog"}], top_k=None)
    lone = reference(["good"], top_k=None)
    check([await post("/predict", inputs=["the cat", "a dog"])], pair)
    check([await post("/predict", inputs=["good"])], lone)
    check(await post("/predict", inputs=[["the cat", "a dog"]]), pair)
    check(await post("/predict", inputs=[["good"], ["the cat", "a dog"]]), [*lone, *pair])


async def test_predict_gives_logits_for_raw_scores(
    make_classifier: Any, tokenizer: PreTrainedTokenizerFast, post: Any
) -> None:
    model = make_classifier(LABELS)
    reference = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")
    check([await post("/predict", inputs=TEXTS[0], raw_scores=True)], reference(TEXTS[:1], top_k=None))


def check(found: list[Any], expected: list[Any]) -> None:
    for rows, wanted in zip(found, expected, strict=True):
        assert [row["label"] for row in rows] == [row["label"] for row in wanted]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in wanted], abs=1e-5)


async def test_rerank_is_sorted_and_scores_as_predict_does(make_reranker: Any, post: Any) -> None:
    reference = CrossEncoder(str(make_reranker()), device="cpu")
    ranked = reference.rank("the cat", TEXTS)
    found = await post("/rerank", query="the cat", texts=TEXTS)
    assert [set(row) for row in found] == [{"index", "score"}] * len(TEXTS)
    assert [row["index"] for row in found] == [row["corpus_id"] for row in ranked]
    assert [row["score"] for row in found] == pytest.approx([float(row["score"]) for row in ranked], abs=1e-5)
    with_text = await post("/rerank", query="the cat", texts=TEXTS, return_text=True)
    assert [row["text"] for row in with_text] == [TEXTS[row["index"]] for row in found]
    raw = await post("/rerank", query="the cat", texts=TEXTS, raw_scores=True)
    scores = 1 / (1 + np.exp(-np.array([row["score"] for row in raw])))
    assert scores == pytest.approx([row["score"] for row in found], abs=1e-6)


async def test_similarity_gives_bare_scores(make_embedder: Any, post: Any) -> None:
    reference = make_embedder(prompts={"query": "query : "})
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    for parameters in ({}, {"prompt_name": "query"}):
        vectors = reference.encode(TEXTS, **parameters)
        expected = reference.similarity(vectors[:1], vectors[1:])[0].tolist()
        assert await post("/similarity", inputs=inputs, parameters=parameters) == pytest.approx(expected, abs=1e-5)


async def test_tokens_come_with_their_offsets_and_decode_to_their_text(
    make_embedder: Any, tokenizer: PreTrainedTokenizerFast, post: Any
) -> None:
    make_embedder()
    [tokens] = await post("/tokenize", inputs="the catzz sat")
    theirs = tokenizer("the catzz sat", return_offsets_mapping=True)
    assert [token["id"] for token in tokens] == theirs["input_ids"]
    assert [(token["start"], token["stop"]) for token in tokens] == theirs["offset_mapping"]
    assert [token["text"] for token in tokens] == tokenizer.convert_ids_to_tokens(theirs["input_ids"])
    assert [token["special"] for token in tokens] == [True, *[False] * 5, True]
    bare = await post("/tokenize", inputs=["the catzz sat", "good"], add_special_tokens=False)
    assert [len(row) for row in bare] == [5, 1]
    ids = [token["id"] for token in tokens]
    assert await post("/decode", ids=ids) == [tokenizer.decode(ids, skip_special_tokens=True)]
    rows = [ids, [tokens[1]["id"]]]
    expected = [tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    assert await post("/decode", ids=rows, skip_special_tokens=False) == expected


@pytest.mark.parametrize("kind", ["embedding", "classifier", "reranker"])
async def test_info_says_what_is_served(
    kind: str, make_embedder: Any, make_classifier: Any, make_reranker: Any, client: httpx.AsyncClient
) -> None:
    make = {
        "embedding": lambda: make_embedder("tiny"),
        "classifier": lambda: make_classifier(LABELS, "tiny"),
        "reranker": lambda: make_reranker("tiny"),
    }
    make[kind]()
    answer = (await client.get("/info")).json()
    assert (answer["model_id"], answer["model_sha"]) == ("tiny", "1")
    assert list(answer["model_type"]) == [kind]
    assert answer["max_input_length"] == 64
    assert answer["auto_truncate"] is False
    if kind == "embedding":
        assert answer["model_type"][kind] == {"pooling": "mean"}
    if kind == "classifier":
        assert answer["model_type"][kind]["id2label"] == {"0": "joy", "1": "anger", "2": "fear"}


async def test_without_a_checkpoint_info_is_not_there_yet(client: httpx.AsyncClient) -> None:
    response = await client.get("/info")
    assert response.status_code == 503
    assert "retry-after" in response.headers


REQUESTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "/embed": ({"inputs": ["the cat", "good"]}, 4 + 3, 7 + 4),
    "/embed_all": ({"inputs": ["the cat", "good"]}, 4 + 3, 7 + 4),
    "/predict": ({"inputs": [["the cat", "good"], ["good"]]}, 6 + 3, 7 + 4 + 4),
    "/rerank": ({"query": "the cat", "texts": ["good", "a dog"]}, 6 + 7, 4 + 5),
    "/similarity": ({"inputs": {"source_sentence": "the cat", "sentences": ["good"]}}, 4 + 3, 7 + 4),
}


@pytest.mark.parametrize("path", REQUESTS)
async def test_headers_tell_what_it_took_and_agree(
    path: str, make_embedder: Any, make_classifier: Any, make_reranker: Any, client: httpx.AsyncClient
) -> None:
    """Time in the network was always nought for /predict."""
    make_classifier(LABELS)
    make_reranker()
    make_embedder()
    body, num_tokens, num_characters = REQUESTS[path]
    response = await client.post(path, json=body)
    headers = {name: value for name, value in response.headers.items() if name.startswith("x-")}
    assert headers["x-compute-type"] == "cpu"
    assert int(headers["x-compute-tokens"]) == num_tokens
    assert int(headers["x-compute-characters"]) == num_characters
    parts = [int(headers[f"x-{part}-time"]) for part in ("tokenization", "queue", "inference")]
    tokenization, queue, inference = parts
    assert min(parts) >= 0
    assert int(headers["x-total-time"]) == tokenization + queue + inference
    assert int(headers["x-compute-time"]) == tokenization + inference
    assert inference > 0 or int(headers["x-total-time"]) == 0


async def test_a_request_is_counted_once_under_its_path_and_status(
    make_classifier: Any, client: httpx.AsyncClient
) -> None:
    """That server counts `/predict` of one text twice, and never as a success."""
    make_classifier(LABELS)
    for body in ({"inputs": "good"}, {"inputs": [["good"], ["not a dog"]]}, {"inputs": 5}):
        await client.post("/predict", json=body)
    lines = (await client.get("/metrics")).text.splitlines()
    counts = [line for line in lines if line.startswith("slimpajama_requests_total") and "/predict" in line]
    assert sorted(counts) == [
        'slimpajama_requests_total{endpoint="/predict",method="POST",status="200"} 2.0',
        'slimpajama_requests_total{endpoint="/predict",method="POST",status="400"} 1.0',
    ]


async def test_one_text_that_fails_fails_the_request_by_name(
    make_embedder: Any, make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    make_classifier(LABELS)
    make_embedder()
    engine.poison = set(engine.models["embedder"].tokenizer.encode("poison", add_special_tokens=False))
    for path, body, param in (
        ("/embed", {"inputs": ["good", "poison"]}, "inputs.1"),
        ("/predict", {"inputs": [["good"], ["poison"]]}, "inputs.1"),
        ("/similarity", {"inputs": {"source_sentence": "poison", "sentences": ["a"]}}, "inputs.source_sentence"),
    ):
        response = await client.post(path, json=body)
        assert response.status_code == 500
        assert response.json()["error"]["param"] == param
