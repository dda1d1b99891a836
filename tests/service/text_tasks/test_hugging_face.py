"""`/hf/summarization` and `/hf/translation` as the real `huggingface_hub.InferenceClient` sends and parses them."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient

from service.engine.models import LoadedModel

TEXT = "The king of the old city lost a great war in 1912."


async def test_summarization(load: Callable[..., LoadedModel], base_url: str, post: Callable[..., Any]) -> None:
    load("bart")
    own = await post("/v1/summarize", input=TEXT, num_beams=2, max_tokens=12)
    async with AsyncInferenceClient(model=f"{base_url}/hf/summarization") as client:
        found = await client.summarization(TEXT, generate_parameters={"num_beams": 2, "max_new_tokens": 12})
    assert found.summary_text == own["data"][0]["summary"]


async def test_translation(load: Callable[..., LoadedModel], base_url: str, post: Callable[..., Any]) -> None:
    load("nllb")
    own = await post("/v1/translate", input=TEXT, source="en", target="fr", max_tokens=12)
    async with AsyncInferenceClient(model=f"{base_url}/hf/translation") as client:
        found = await client.translation(
            TEXT, src_lang="eng_Latn", tgt_lang="fra_Latn", generate_parameters={"max_new_tokens": 12}
        )
    assert found.translation_text == own["data"][0]["translation"]


async def test_lengths_are_counted_as_the_pipelines_do_and_sampling_is_sampling(
    load: Callable[..., LoadedModel], engine: Any, base_url: str
) -> None:
    """`min_length` was refused, `max_length` was one too many, `do_sample` alone was ignored."""
    load("bart")
    parameters = {"min_length": 5, "max_length": 9, "do_sample": True, "num_beams": 1}
    async with AsyncInferenceClient(model=f"{base_url}/hf/summarization") as client:
        await client.summarization(TEXT, generate_parameters=parameters)
    sampling = engine.generated[-1].sampling
    assert (sampling.min_tokens, sampling.max_tokens, sampling.temperature) == (4, 8, 1.0)


async def test_what_is_cut_is_told_in_a_header(load: Callable[..., LoadedModel], client: httpx.AsyncClient) -> None:
    model = load("bart")
    parameters = {"truncation": "longest_first", "generate_parameters": {"max_new_tokens": 4}}
    long = "The king of the old city. " * 200
    response = await client.post("/hf/summarization", json={"inputs": long, "parameters": parameters})
    cut = len(model.tokenizer.encode(long)) - model.description.context_length
    assert response.headers["x-truncated-tokens"] == str(cut)
    whole = await client.post("/hf/summarization", json={"inputs": TEXT, "parameters": parameters})
    assert "x-truncated-tokens" not in whole.headers


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"stream": True}, "stream"),
        ({"priority": 1000}, "priority"),
        ({"model": "other"}, "model"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"diversity_penalty": 0.5}, "diversity_penalty"),
        ({"do_sample": "no"}, "do_sample"),
        ({"num_beams": "four"}, "num_beams"),
        ({"max_new_tokens": 5, "max_length": 5}, "max_length"),
    ],
)
@pytest.mark.parametrize("task", ["summarization", "translation"])
async def test_only_what_generate_takes_and_is_served_is_let_through(
    load: Callable[..., LoadedModel], engine: Any, refused: Callable[..., Any], task: str, given: Any, param: str
) -> None:
    """Any field of our own was let through: `stream` ended in a 500, and left its generation behind."""
    load("bart" if task == "summarization" else "nllb")
    languages = {} if task == "summarization" else {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}
    error = await refused(f"/hf/{task}", inputs=TEXT, parameters={**languages, "generate_parameters": given})
    assert error["param"] == f"parameters.generate_parameters.{param}"
    assert not engine.generated
