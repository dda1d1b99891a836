"""Wrong requests for vectors, similarity and ranking: each gets a 4xx that names the field."""

from typing import Any

import httpx

HUGE = 10**30
GOOD: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a cat"},
    "/v1/similarity": {"source": "a cat", "targets": ["a dog"]},
    "/v1/rerank": {"query": "a cat", "documents": ["a dog"]},
    "/v2/rerank": {"query": "a cat", "documents": ["a dog"]},
    "/embed": {"inputs": "a cat"},
    "/embed_all": {"inputs": "a cat"},
    "/embed_sparse": {"inputs": "a cat"},
    "/v1/sparse_embeddings": {"input": "a cat"},
    "/predict": {"inputs": "a cat"},
    "/rerank": {"query": "a cat", "texts": ["a dog"]},
    "/similarity": {"inputs": {"source_sentence": "a cat", "sentences": ["a dog"]}},
    "/tokenize": {"inputs": "a cat"},
    "/decode": {"ids": [5, 6]},
}
COMMON: dict[str, list[Any]] = {
    "model": [5, "", "nope", "../../etc/passwd", "reader"],
    "priority": ["high", 1001],
    "timeout": [0, -1, "5"],
    "truncate": ["yes", 1],
    "no_such_field": [1],
}
FIELDS: dict[str, dict[str, list[Any]]] = {
    "/v1/embeddings": {
        **COMMON,
        "input": [5, True, {}, [], "", [1, 2], [[1, 2]], "the cat sat " * 50, ["a"] * 2049],
        "input.1": [["a", ""], ["a", 5], ["a", ["b"]]],
        "encoding_format": ["hex", 5],
        "dimensions": [0, -1, 33, 1.5, "8", HUGE],
        "normalize": ["no", 1, False],
        "truncate_prompt_tokens": [0, -2, 1.5, "8", HUGE],
        "truncation_side": ["Left", 5],
        "input_type": ["question", 5],
        "prompt_name": ["nope", "", 5],
    },
    "/v1/similarity": {
        **COMMON,
        "source": [5, "", [], ["a"]],
        "targets": [5, "a", [], {}],
        "targets.1": [["a", ""], ["a", 5]],
        "pairs": [[["a", "b"]], "a", []],
        "pairs.1": [[["a", "b"], ["a"]], [["a", "b"], ["a", "b", "c"]]],
        "pairs.1.0": [[["a", "b"], ["", "b"]], [["a", "b"], [5, "b"]]],
    },
    "/v1/rerank": {
        **COMMON,
        "query": [5, "", ["a"], {}],
        "documents": [5, "a", [], {}],
        "documents.1": [["a", 5], ["a", ["b"]]],
        "documents.1.text": [["a", {"text": 5}], ["a", {}]],
        "top_n": [0, -1, 1.5, "2"],
        "return_documents": ["yes", 1],
        "raw_scores": ["no"],
        "max_tokens_per_doc": [0, -1, 1.5, "8", HUGE],
        "max_chunks_per_doc": [0, 2, "1"],
        "rank_fields": [[], "title", 5],
        "rank_fields.1": [["title", ""], ["title", 5]],
        "truncate_prompt_tokens": [0, -2, 1.5, "8", HUGE],
    },
    "/v2/rerank": {
        "query": [5, "", ["a"], {}],
        "documents": [5, "a", [], {}],
        "documents.1": [["a", 5], ["a", ["b"]]],
        "documents.1.text": [["a", {"text": 5}], ["a", {}]],
        "top_n": [0, -1, 1.5, "2"],
        "max_tokens_per_doc": [0, -1, 1.5, "8", HUGE],
        "priority": [-1, 1000, "high"],
        "no_such_field": [1],
    },
    "/embed": {
        "inputs": [5, [], {}, [1, 2], [[1], [2]]],
        "inputs.1": [["a", 5], ["a", "the cat sat " * 50]],
        "normalize": ["no"],
        "truncation_direction": ["Up", 5],
        "dimensions": [0, 33],
        "prompt_name": ["nope"],
        "no_such_field": [1],
    },
    "/embed_all": {"inputs": [5, [], "the cat sat " * 50], "inputs.1": [["a", 5]]},
    "/embed_sparse": {
        "inputs": [5, [], {}, "", [1, 2], [[1], [2]], "the cat sat " * 50, ["a"] * 2049],
        "inputs.1": [["a", 5], ["a", ""], ["a", "the cat sat " * 50]],
        "truncate": ["yes", 1],
        "truncation_direction": ["Up", 5],
        "prompt_name": ["nope", "", 5],
        "normalize": [True],
        "dimensions": [8],
    },
    "/v1/sparse_embeddings": {
        **COMMON,
        "input": [5, True, {}, [], "", [1, 2], [[1, 2]], "the cat sat " * 50, ["a"] * 2049],
        "input.1": [["a", ""], ["a", 5], ["a", ["b"]]],
        "truncate_prompt_tokens": [0, -2, 1.5, "8", HUGE],
        "truncation_side": ["Left", 5],
        "input_type": ["question", 5],
        "prompt_name": ["nope", "", 5],
        "encoding_format": ["base64"],
        "dimensions": [8],
        "normalize": [True],
    },
    "/predict": {
        "inputs": [5, [], {}, ["a", "b", "c"], "the cat sat " * 50],
        "inputs.0": [[["a", "b", "c"]], [[]]],
        "inputs.1": [[["a"], ["the cat sat " * 50]]],
        "raw_scores": ["no"],
    },
    "/rerank": {"query": [5], "texts": [5, [], "a"], "texts.1": [["a", 5], ["a", "the cat sat " * 50]]},
    "/similarity": {
        "inputs": [5, "a", []],
        "inputs.sentences": [{"source_sentence": "a"}, {"source_sentence": "a", "sentences": []}],
        "inputs.source_sentence": [{"sentences": ["a"]}, {"source_sentence": "the cat sat " * 50, "sentences": ["a"]}],
        "inputs.sentences.1": [{"source_sentence": "a", "sentences": ["a", "the cat sat " * 50]}],
        "parameters": [5],
    },
    "/tokenize": {"inputs": [5, []], "add_special_tokens": ["no"]},
    "/decode": {"ids": [5, "a", [], [10**9], [99999]], "ids.0": [[-1]]},
}
MISSING = [("/v1/embeddings", "input"), ("/v1/similarity", "source"), ("/v1/rerank", "query"), ("/decode", "ids")]


async def test_a_wrong_field_is_named_and_the_next_request_answered(
    make_embedder: Any,
    make_sparse: Any,
    make_reranker: Any,
    make_model: Any,
    make_classifier: Any,
    engine: Any,
    client: httpx.AsyncClient,
) -> None:
    """One test for the table, so that the checkpoints are made once."""
    make_classifier(["ham", "spam"])
    make_embedder()
    make_sparse()
    make_reranker()
    engine.load(make_model("BertForQuestionAnswering", "reader")[0])
    count, faults = 0, []
    for path, fields in FIELDS.items():
        for param, values in fields.items():
            for value in values:
                body = GOOD[path] | {param.split(".")[0]: value}
                faults += await fault_of(client, path, body, param)
                count += 1
        for name, body in GOOD.items():
            response = await client.post(name, json=body)
            assert response.status_code == 200, (name, response.text)
    for path, param in MISSING:
        faults += await fault_of(client, path, {}, param)
    assert not faults, "\n".join(map(str, faults))
    assert count >= 100


async def fault_of(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> list[Any]:
    """Nothing, where the request was refused for that field."""
    response = await client.post(path, json=body)
    error = response.json().get("error", {}) if response.status_code != 200 else {}
    right = 400 <= response.status_code < 500 and error["param"] == param and len(error["message"]) < 2000
    return [] if right else [(path, param, str(body)[:100], response.status_code, response.text[:200])]
