"""`/v1/embed` and `/v2/embed` as Cohere's clients ask and read: fields, kinds of numbers, cuts, prompts."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sentence_transformers.util import quantize_embeddings

from service.api.cohere import signed_bytes

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill"]
LONG = "the cat sat on the mat " * 20
TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]


async def test_each_kind_of_numbers_is_what_its_name_says(make_embedder: Any, post: Any) -> None:
    expected = make_embedder().encode(TEXTS)
    answer = await post("/v2/embed", texts=TEXTS, input_type="search_document", embedding_types=TYPES)
    found = answer["embeddings"]
    assert_allclose(found["float"], expected, atol=2e-6)
    given = np.array(found["float"], dtype=np.float32)
    decoded = [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in found["base64"]]
    assert_array_equal(decoded, given)
    for name in ("binary", "ubinary"):
        assert_array_equal(found[name], quantize_embeddings(given, precision=name))
    assert np.abs(found["int8"]).max(axis=1).tolist() == [127] * 3
    assert_array_equal(np.array(found["uint8"]) - 128, found["int8"])
    assert_allclose(cosines(np.array(found["int8"], dtype=np.float32)), cosines(given), atol=0.01)
    assert (answer["response_type"], answer["texts"]) == ("embeddings_by_type", TEXTS)
    assert answer["meta"]["api_version"] == {"version": "2"}
    assert answer["meta"]["billed_units"]["input_tokens"] == 8 + 3 + 13


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def test_bytes_are_shares_of_the_greatest_number() -> None:
    assert signed_bytes(np.array([0.1, -0.4, 0.2], dtype=np.float32)).tolist() == [32, -127, 64]
    assert signed_bytes(np.zeros(3, dtype=np.float32)).tolist() == [0, 0, 0]


async def test_the_first_version_gives_a_list_unless_kinds_are_asked_for(make_embedder: Any, post: Any) -> None:
    expected = make_embedder().encode(TEXTS)
    bare = await post("/v1/embed", texts=TEXTS)
    assert (bare["response_type"], bare["meta"]["api_version"]) == ("embeddings_floats", {"version": "1"})
    assert_allclose(bare["embeddings"], expected, atol=2e-6)
    named = await post("/v1/embed", texts=TEXTS, embedding_types=["float"])
    assert (named["response_type"], named["embeddings"]) == ("embeddings_by_type", {"float": bare["embeddings"]})


async def test_the_input_type_chooses_the_prompt(make_embedder: Any, post: Any) -> None:
    prompts = {"query": "query: ", "document": "passage: ", "clustering": "good "}
    reference = make_embedder(prompts=prompts)
    for kind, name in [("search_query", "query"), ("search_document", "document"), ("clustering", "clustering")]:
        found = await post("/v2/embed", texts=TEXTS, input_type=kind)
        assert_allclose(found["embeddings"]["float"], reference.encode(TEXTS, prompt_name=name), atol=2e-6)
    found = await post("/v2/embed", texts=TEXTS, input_type="classification")
    assert_allclose(found["embeddings"]["float"], reference.encode(TEXTS), atol=2e-6)


async def test_texts_are_cut_where_it_is_asked_and_that_is_told(
    make_embedder: Any, post: Any, client: httpx.AsyncClient
) -> None:
    reference = make_embedder()
    response = await client.post("/v2/embed", json={"texts": [LONG]})
    assert response.headers["x-truncated-tokens"] == str(120 + 2 - 64)
    assert_allclose(response.json()["embeddings"]["float"], reference.encode([LONG]), atol=2e-6)
    for side, kept in (("START", "on the mat"), ("END", "the cat sat")):
        found = await post("/v2/embed", texts=[LONG], truncate=side, max_tokens=5)
        assert_allclose(found["embeddings"]["float"], reference.encode([kept]), atol=2e-6)
    refused = await client.post("/v2/embed", json={"texts": ["good", LONG], "truncate": "NONE"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "texts.1")


async def test_vectors_are_shortened_and_inputs_are_texts_in_parts(make_embedder: Any, post: Any) -> None:
    shorter = make_embedder().encode(["the cat\ngood"], truncate_dim=8, normalize_embeddings=True)
    inputs = [{"content": [{"type": "text", "text": "the cat"}, {"type": "text", "text": "good"}]}]
    found = await post("/v2/embed", inputs=inputs, output_dimension=8)
    assert_allclose(found["embeddings"]["float"], shorter, atol=2e-6)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v2/embed", {}, "texts"),
        ("/v2/embed", {"texts": ["a"], "inputs": [{"content": [{"type": "text", "text": "a"}]}]}, "inputs"),
        ("/v2/embed", {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "inputs.0.content.0.type"),
        ("/v2/embed", {"inputs": [{"content": [{"type": "text", "text": text}, {"type": "text", "text": ""}]}
                                  for text in ("a", "")]}, "inputs.1"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["int4"]}, "embedding_types.0"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": []}, "embedding_types"),
        ("/v2/embed", {"texts": ["a"], "output_dimension": 33}, "output_dimension"),
        ("/v2/embed", {"texts": ["a"], "truncate": "MIDDLE"}, "truncate"),
        ("/v2/embed", {"texts": ["a"], "input_type": "image"}, "input_type"),
        ("/v2/embed", {"texts": ["a"], "priority": -1}, "priority"),
        ("/v2/embed", {"texts": ["a"], "model": "nope"}, "model"),
        ("/v2/embed", {"texts": ["a"] * 2049}, "texts"),
        ("/v1/embed", {"texts": ["a", ""]}, "texts.1"),
        ("/v1/embed", {"texts": ["a"], "images": ["x"]}, "images"),
        ("/v1/embed", {"texts": "a"}, "texts"),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_named(make_embedder: Any, refused: Any, path: str, body: Any, param: str) -> None:
    make_embedder()
    assert (await refused(path, **body))["param"] == param
