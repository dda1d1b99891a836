"""`/v1/score` and `/score`: vLLM's pairs, by a cross-encoder or by cosines."""

from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder

TEXTS = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill", "not a dog"]
LONG = "the cat sat on the mat " * 20
CLOSE = {"abs": 2e-5}
NAMES = [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"), ("queries", "items")]


def scores(answer: Any) -> list[float]:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return [entry["score"] for entry in answer["data"]]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(("first", "second"), NAMES)
async def test_pairs_are_one_to_one_one_to_all_or_two_by_two(
    make_reranker: Any, post: Any, path: str, first: str, second: str
) -> None:
    reference = CrossEncoder(str(make_reranker()), device="cpu")
    for left, right, pairs in (
        (TEXTS[0], TEXTS[1], [(TEXTS[0], TEXTS[1])]),
        (TEXTS[0], TEXTS[1:], [(TEXTS[0], text) for text in TEXTS[1:]]),
        ([TEXTS[0]], TEXTS[1:], [(TEXTS[0], text) for text in TEXTS[1:]]),
        (TEXTS[:2], TEXTS[2:], list(zip(TEXTS[:2], TEXTS[2:], strict=True))),
    ):
        answer = await post(path, model="reranker", **{first: left, second: right})
        assert scores(answer) == pytest.approx(reference.predict(pairs).tolist(), **CLOSE)
    assert (answer["object"], answer["model"]) == ("list", "reranker")
    assert {entry["object"] for entry in answer["data"]} == {"score"}
    assert answer["id"].startswith("score-")
    assert answer["created"] > 10**9
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"]


async def test_without_its_activation_a_cross_encoder_gives_logits(make_reranker: Any, post: Any) -> None:
    reference = CrossEncoder(str(make_reranker()), device="cpu")
    expected = reference.predict([(TEXTS[0], text) for text in TEXTS], activation_fn=torch.nn.Identity())
    answer = await post("/score", text_1=TEXTS[0], text_2=TEXTS, use_activation=False)
    assert scores(answer) == pytest.approx(expected.tolist(), abs=1e-4)


async def test_vectors_are_compared_by_their_cosine_whatever_the_checkpoint_is_for(
    make_embedder: Any, post: Any
) -> None:
    reference = make_embedder(normalize=False, similarity_fn_name="dot")
    vectors = torch.nn.functional.normalize(torch.from_numpy(reference.encode(TEXTS)))
    answer = await post("/score", text_1=TEXTS[0], text_2=TEXTS)
    assert scores(answer) == pytest.approx((vectors @ vectors[0]).tolist(), **CLOSE)


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
async def test_a_pair_that_fails_fails_alone_and_one_that_is_cut_says_so(
    make_embedder: Any, make_reranker: Any, post: Any, kind: str
) -> None:
    (make_embedder if kind == "embedder" else make_reranker)()
    answer = await post("/score", text_1="the cat", text_2=["good", LONG])
    assert "score" in answer["data"][0]
    assert answer["data"][1]["error"]["code"] == "context_length_exceeded"
    for fields in ({"truncate": True}, {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 16}):
        answer = await post("/score", text_1="the cat", text_2=["good", LONG], **fields)
        assert "truncated" not in answer["data"][0]
        assert answer["data"][1]["truncated"] is True
        assert answer["usage"]["truncated_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ({"text_2": "a"}, "text_1"),
        ({"text_1": "a"}, "text_2"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a", "text_2": ["a", 5]}, "text_2.1"),
        ({"queries": "a", "documents": ["a", ""]}, "documents.1"),
        ({"text_1": "a", "queries": "a", "text_2": "a"}, "queries"),
        ({"text_1": "a", "text_2": "a", "label_token_ids": [1]}, "label_token_ids"),
        ({"text_1": LONG, "text_2": ["a", "b"]}, "text_1"),
        ({"text_1": "a", "text_2": [LONG]}, "text_2.0"),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ],
)
async def test_what_is_wrong_is_named(make_embedder: Any, refused: Any, body: dict[str, Any], param: str) -> None:
    make_embedder()
    assert (await refused("/score", **body))["param"] == param
