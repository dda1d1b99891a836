"""Completions of encoder-decoders: the prompt is what the encoder reads. They used to fail with a 500."""

from collections.abc import Callable
from typing import Any

from service.engine.models import LoadedModel

TEXT = "Who won the game in Paris?"


async def test_a_completion_writes_of_its_prompt_and_begins_as_the_checkpoint_does(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any
) -> None:
    model = load("t5")
    answer = await post("/v1/completions", prompt=TEXT, max_tokens=6, temperature=0)
    (request,) = engine.generated
    assert request.encoder_ids == model.tokenizer.encode(TEXT)
    assert request.prompt_ids == [model.description.decoder_start_id]
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["text"]
    other = await post("/v1/completions", prompt=f"{TEXT} Why?", max_tokens=6, temperature=0)
    assert other["choices"][0]["text"] != answer["choices"][0]["text"]


async def test_a_source_longer_than_the_encoder_reads_is_refused_with_the_numbers(
    load: Callable[..., LoadedModel], refused: Callable[..., Any]
) -> None:
    load("t5", max_model_len=16)
    error = await refused("/v1/completions", prompt=[5] * 17, max_tokens=2)
    assert error["code"] == "context_length_exceeded"
    assert "17" in error["message"]
    assert error["message"].startswith("This model's maximum context length is 16 tokens. ")


async def test_a_source_is_not_echoed(load: Callable[..., LoadedModel], refused: Callable[..., Any]) -> None:
    load("t5")
    assert (await refused("/v1/completions", prompt=TEXT, echo=True))["param"] == "echo"
