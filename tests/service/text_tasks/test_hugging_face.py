"""`/hf/summarization` and `/hf/translation` as the real `huggingface_hub.InferenceClient` sends and parses them."""

from collections.abc import Callable
from typing import Any

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
