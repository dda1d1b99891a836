"""`/v1/embeddings`: the vectors of sentence-transformers, in both of OpenAI's encodings."""

import base64
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from numpy.testing import assert_allclose

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill", "not a dog"]
LONG = "the cat sat on the mat " * 20


async def test_vectors_are_those_of_sentence_transformers(make_embedder: Any, post: Any) -> None:
    reference = make_embedder()
    answer = await post("/v1/embeddings", input=TEXTS)
    assert_allclose([entry["embedding"] for entry in answer["data"]], reference.encode(TEXTS), atol=1e-5)
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]
    num_tokens = sum(len(ids) for ids in reference.tokenizer(TEXTS)["input_ids"])
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert (answer["model"], answer["model_version"], answer["object"]) == ("embedder", "1", "list")


async def test_base64_holds_the_same_numbers_as_float(make_embedder: Any, post: Any) -> None:
    make_embedder()
    plain = await post("/v1/embeddings", input=TEXTS, encoding_format="float")
    packed = await post("/v1/embeddings", input=TEXTS, encoding_format="base64")
    for one, other in zip(plain["data"], packed["data"], strict=True):
        numbers = np.frombuffer(base64.b64decode(other["embedding"]), dtype="<f4")
        assert numbers.tolist() == one["embedding"]


async def test_a_lone_text_is_as_in_a_list(make_embedder: Any, post: Any) -> None:
    make_embedder()
    alone = await post("/v1/embeddings", input=TEXTS[0])
    crowd = await post("/v1/embeddings", input=TEXTS)
    assert_allclose(alone["data"][0]["embedding"], crowd["data"][0]["embedding"], atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
async def test_cut_vectors_are_at_unit_length_again(make_embedder: Any, post: Any, normalize: bool) -> None:
    """infinity slices after it normalised, and every cosine is too small."""
    reference = make_embedder(normalize=normalize)
    answer = await post("/v1/embeddings", input=TEXTS, dimensions=8)
    found = np.array([entry["embedding"] for entry in answer["data"]])
    assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    theirs = reference.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    assert_allclose(found, theirs, atol=1e-5)
    whole = await post("/v1/embeddings", input=TEXTS, dimensions=32)
    plain = await post("/v1/embeddings", input=TEXTS)
    assert whole["data"] == plain["data"]


async def test_more_dimensions_than_there_are_is_an_error_with_both_numbers(make_embedder: Any, refused: Any) -> None:
    make_embedder()
    error = await refused("/v1/embeddings", input="a cat", dimensions=33)
    assert error["param"] == "dimensions"
    assert "33" in error["message"]
    assert "32" in error["message"]


PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.mark.parametrize("include_prompt", [True, False])
async def test_prompts_go_before_texts_as_in_sentence_transformers(
    make_embedder: Any, post: Any, include_prompt: bool
) -> None:
    reference = make_embedder(include_prompt=include_prompt, prompts=PROMPTS)
    for fields, theirs in (
        ({}, reference.encode(TEXTS)),
        ({"prompt_name": "query"}, reference.encode(TEXTS, prompt_name="query")),
        ({"input_type": "query"}, reference.encode_query(TEXTS)),
        ({"input_type": "document"}, reference.encode_document(TEXTS)),
    ):
        answer = await post("/v1/embeddings", input=TEXTS, **fields)
        assert_allclose([entry["embedding"] for entry in answer["data"]], theirs, atol=1e-5, err_msg=str(fields))


async def test_a_default_prompt_is_put_where_none_is_named(make_embedder: Any, post: Any) -> None:
    reference = make_embedder(prompts={"task": "query : passage : "}, default_prompt_name="task")
    for fields, theirs in (
        ({}, reference.encode(TEXTS)),
        ({"input_type": "query"}, reference.encode_query(TEXTS)),
        ({"input_type": "document"}, reference.encode_document(TEXTS)),
    ):
        answer = await post("/v1/embeddings", input=TEXTS, **fields)
        assert_allclose([entry["embedding"] for entry in answer["data"]], theirs, atol=1e-5, err_msg=str(fields))


async def test_an_unknown_prompt_is_an_error_that_lists_those_there_are(make_embedder: Any, refused: Any) -> None:
    make_embedder(prompts=PROMPTS)
    error = await refused("/v1/embeddings", input="a cat", prompt_name="nope")
    assert error["param"] == "prompt_name"
    assert "query" in error["message"]


@pytest.mark.parametrize("given", [[1, 2, 3], [[1, 2], [3]]])
async def test_token_ids_are_refused_with_advice(make_embedder: Any, refused: Any, given: Any) -> None:
    """LangChain sends ids of OpenAI's tokenizer; whoever takes them gives wrong vectors and no sign of it."""
    make_embedder()
    error = await refused("/v1/embeddings", input=given)
    assert error["param"] == "input"
    assert "check_embedding_ctx_length=False" in error["message"]


async def test_too_long_a_text_is_refused_with_the_numbers(make_embedder: Any, refused: Any) -> None:
    make_embedder()
    error = await refused("/v1/embeddings", input=LONG)
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert "122" in error["message"]
    assert "64" in error["message"]
    assert (await refused("/v1/embeddings", input=[LONG, LONG]))["param"] == "input.0"


async def test_truncation_is_as_asked_for_and_is_reported(make_embedder: Any, post: Any) -> None:
    reference = make_embedder()
    answer = await post("/v1/embeddings", input=["a cat", LONG], truncate=True)
    assert answer["usage"] == {"prompt_tokens": 4 + 64, "total_tokens": 4 + 64, "truncated_tokens": 122 - 64}
    assert_allclose(answer["data"][1]["embedding"], reference.encode(LONG), atol=1e-5)
    whole, cut = answer["data"]
    assert (cut["truncated"], cut["kept_tokens"]) == (True, 64)
    assert "truncated" not in whole


@pytest.mark.parametrize("limit", [16, -1])
async def test_truncate_prompt_tokens_cuts_to_so_many_or_to_the_limit_and_is_reported(
    make_embedder: Any, post: Any, limit: int
) -> None:
    """vLLM's name of it."""
    reference = make_embedder()
    reference.max_seq_length = kept = 64 if limit == -1 else limit
    answer = await post("/v1/embeddings", input=["a cat", LONG], truncate_prompt_tokens=limit)
    assert answer["usage"]["truncated_tokens"] == 122 - kept
    assert_allclose([entry["embedding"] for entry in answer["data"]], reference.encode(["a cat", LONG]), atol=1e-5)
    whole, cut = answer["data"]
    assert (cut["truncated"], cut["kept_tokens"]) == (True, kept)
    assert "truncated" not in whole


async def test_more_tokens_than_there_is_room_for_are_cut_to_the_room(make_embedder: Any, post: Any) -> None:
    make_embedder()
    answer = await post("/v1/embeddings", input=LONG, truncate_prompt_tokens=100)
    assert answer["data"][0]["kept_tokens"] == 64


async def test_truncation_side_says_at_which_end_texts_are_cut(make_embedder: Any, post: Any) -> None:
    reference = make_embedder()
    reference.tokenizer.truncation_side = "left"
    text = f"good {LONG}film"
    answer = await post("/v1/embeddings", input=text, truncate=True, truncation_side="left")
    assert_allclose(answer["data"][0]["embedding"], reference.encode(text), atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
async def test_normalize_decides_where_the_checkpoints_modules_do_not(
    make_embedder: Any, post: Any, normalize: bool
) -> None:
    reference = make_embedder(normalize=False)
    expected = reference.encode(TEXTS, normalize_embeddings=normalize)
    answer = await post("/v1/embeddings", input=TEXTS, normalize=normalize)
    assert_allclose([entry["embedding"] for entry in answer["data"]], expected, atol=1e-5, rtol=1e-4)
    answer = await post("/v1/embeddings", input=TEXTS, normalize=normalize, dimensions=8)
    expected = reference.encode(TEXTS, normalize_embeddings=normalize, truncate_dim=8)
    assert_allclose([entry["embedding"] for entry in answer["data"]], expected, atol=1e-5, rtol=1e-4)


async def test_normalize_false_is_refused_where_the_modules_normalise(
    make_embedder: Any, post: Any, refused: Any
) -> None:
    """There are no other vectors to give, and to give those would be to ignore it."""
    make_embedder()
    error = await refused("/v1/embeddings", input="a cat", normalize=False)
    assert (error["param"], error["code"]) == ("normalize", "unsupported_parameter")
    assert await post("/v1/embeddings", input="a cat", normalize=True)


async def test_nothing_is_connected_to_unasked(
    make_embedder: Any, app: FastAPI, engine: Any, post: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """infinity reports home unless it is told not to."""
    make_embedder()
    reached: list[Any] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda self, *rest: reached.append(rest))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *rest, **more: reached.append(rest))
    engine.load(tmp_path / "embedder", "again")
    async with app.router.lifespan_context(app):
        assert len((await post("/v1/embeddings", input=TEXTS, model="again"))["data"]) == len(TEXTS)
    assert not reached


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_a_text_that_fails_fails_alone(make_embedder: Any, engine: Any, post: Any, form: str) -> None:
    """Be it too long, or poison to the network: a batch of 2,048 is not lost for one of them."""
    make_embedder()
    engine.poison = set(engine.models["embedder"].tokenizer.encode("poison", add_special_tokens=False))
    alone = await post("/v1/embeddings", input=[TEXTS[0], TEXTS[1]], encoding_format=form)
    answer = await post("/v1/embeddings", input=[TEXTS[0], LONG, "poison", TEXTS[1]], encoding_format=form)
    first, long, poisoned, second = answer["data"]
    assert [first["embedding"], second["embedding"]] == [entry["embedding"] for entry in alone["data"]]
    assert long["embedding"] is poisoned["embedding"] is None
    assert (long["error"]["code"], poisoned["error"]["code"]) == ("context_length_exceeded", "generation_failed")
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]


async def test_a_lone_text_that_fails_in_the_network_fails_the_request(
    make_embedder: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    make_embedder()
    engine.poison = set(engine.models["embedder"].tokenizer.encode("poison", add_special_tokens=False))
    response = await client.post("/v1/embeddings", json={"input": "poison"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed"


async def test_a_checkpoint_that_gives_no_vectors_says_what_it_does(
    make_classifier: Any, make_embedder: Any, refused: Any
) -> None:
    make_classifier(["ham", "spam"])
    make_embedder()
    error = await refused("/v1/embeddings", input="a cat", model="classifier")
    assert (error["param"], error["code"]) == ("model", "task_not_supported")
    assert "embedder" in error["message"]


async def test_the_openai_client_reads_the_vectors(make_embedder: Any, app: Any) -> None:
    """It asks for base64 where the caller names nothing."""
    reference = make_embedder()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport) as http:
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
        answer = await client.embeddings.create(model="embedder", input=TEXTS, dimensions=16, user="me")
        partly = await client.embeddings.create(model="embedder", input=["a cat", LONG])
    theirs = reference.encode(TEXTS, truncate_dim=16, normalize_embeddings=True)
    assert_allclose([entry.embedding for entry in answer.data], theirs, atol=1e-5)
    assert partly.data[0].embedding
    assert partly.data[1].embedding is None
