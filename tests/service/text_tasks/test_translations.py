"""Translations: languages by many names, the directions there are, which checkpoint is chosen."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from model.languages import Languages
from service.engine.models import LoadedModel
from service.tasks.translation import english_name

TEXT = "Who won the game in Paris?"


@pytest.mark.parametrize(
    ("source", "target"), [("en", "fr"), ("eng_Latn", "fra_Latn"), ("en-GB", "fr-CA"), (None, "fr")]
)
async def test_languages_have_many_names(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any, source: str | None, target: str
) -> None:
    model = load("nllb")
    answer = await post("/v1/translate", input=TEXT, source=source, target=target, max_tokens=5)
    assert (answer["source"], answer["target"]) == ("eng_Latn", "fra_Latn")
    (request,) = engine.generated
    assert request.encoder_ids[0] == model.tokenizer.token_id("eng_Latn")
    assert request.sampling.forced_bos_id == model.tokenizer.token_id("fra_Latn")


@pytest.mark.parametrize(
    ("checkpoint_name", "languages", "param", "listed"),
    [
        ("nllb", {"source": "en", "target": "it"}, "target", ["deu_Latn", "eng_Latn", "fra_Latn", "zho_Hans"]),
        ("nllb", {"source": "it", "target": "en"}, "source", ["deu_Latn", "eng_Latn", "fra_Latn", "zho_Hans"]),
        ("nllb", {"source": "en"}, "target", ["deu_Latn"]),
        ("t5", {"source": "en", "target": "it"}, "target", ["en to de", "en to fr"]),
        ("t5", {"source": "de", "target": "en"}, "source", ["en to de", "en to fr"]),
        ("t5", {}, "target", ["en to de", "en to fr"]),
    ],
)
async def test_an_unknown_pair_is_told_which_there_are(
    load: Callable[..., LoadedModel],
    refused: Callable[..., Any],
    checkpoint_name: str,
    languages: dict[str, str],
    param: str,
    listed: list[str],
) -> None:
    load(checkpoint_name)
    error = await refused("/v1/translate", input=TEXT, **languages)
    assert error["param"] == param
    assert all(entry in error["message"] for entry in listed)


async def test_the_checkpoint_that_knows_the_pair_is_chosen(
    load: Callable[..., LoadedModel], post: Callable[..., Any], refused: Callable[..., Any]
) -> None:
    load("t5")
    load("nllb")
    assert (await post("/v1/translate", input=TEXT, source="en", target="de", max_tokens=4))["model"] == "t5"
    assert (await post("/v1/translate", input=TEXT, source="en", target="zh", max_tokens=4))["model"] == "nllb"
    error = await refused("/v1/translate", input=TEXT, source="en", target="it")
    assert "t5: " in error["message"]
    assert "nllb: " in error["message"]


async def test_a_target_written_into_the_source_goes_before_the_text(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any
) -> None:
    """Marian's way, on another checkpoint: its token is text here, which shows in what is read."""
    model = load("bart")
    model.description = dataclasses.replace(model.description, tasks=("generate", "translate"))
    model.languages = Languages(targets=("fra", "spa"), written_targets=True)
    await post("/v1/translate", input=TEXT, target="fr", max_tokens=4)
    assert engine.generated[0].encoder_ids == model.tokenizer.encode(f">>fra<< {TEXT}")


async def test_a_list_has_an_item_for_each_text_and_their_tokens_together(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any
) -> None:
    load("nllb")
    texts = ["The king.", "word " * 400, "The queen."]
    body = {"source": "en", "target": "fr", "max_tokens": 4, "min_tokens": 1, "num_beams": 1}
    answer = await post("/v1/translate", input=texts, **body)
    assert [("translation" in item, item["index"]) for item in answer["data"]] == [(True, 0), (False, 1), (True, 2)]
    error = answer["data"][1]["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is ")
    assert answer["usage"]["prompt_tokens"] == sum(len(request.encoder_ids) + 1 for request in engine.generated)
    assert answer["usage"]["completion_tokens"] == 8


SENTENCES = [f"The king of city {letter} lost a war in {1800 + n}." for n, letter in enumerate("abcdefghij" * 8)]


def words_of(text: str) -> str:
    """The tiny vocabulary has no full stop behind a number."""
    return "".join(text.lower().replace(".", " ").split())


async def test_a_text_past_the_context_is_translated_whole_in_pieces_and_every_token_counted(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any
) -> None:
    """It was refused; others cut it."""
    model = load("nllb")
    text = " ".join(SENTENCES[:60]) + "\n\n" + " ".join(SENTENCES[60:])
    answer = await post("/v1/translate", input=text, source="en", target="fr", max_tokens=6)
    pieces = [model.tokenizer.decode(request.encoder_ids) for request in engine.generated]
    assert words_of(" ".join(pieces)) == words_of(text)
    assert all(len(request.encoder_ids) <= model.description.context_length for request in engine.generated)
    assert all(any(words_of(sentence) in words_of(piece) for piece in pieces) for sentence in SENTENCES)
    item, usage = answer["data"][0], answer["usage"]
    assert item["pieces"] == usage["map_calls"] == len(pieces) > 2
    assert item["finish_reason"] == "length"
    assert usage["prompt_tokens"] == usage["map_prompt_tokens"]
    assert usage["prompt_tokens"] == sum(len(request.encoder_ids) + 1 for request in engine.generated)
    assert usage["completion_tokens"] == usage["map_completion_tokens"] == 6 * len(pieces)


async def test_pieces_leave_room_for_translations_that_are_longer_than_their_texts(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any
) -> None:
    """This checkpoint writes 29 tokens at most: pieces of 300 would all break off."""
    load("nllb")
    await post("/v1/translate", input=" ".join(SENTENCES), source="en", target="fr")
    assert max(len(request.encoder_ids) for request in engine.generated) <= 29 / 1.5 + 4


async def test_what_is_cut_is_said_to_be(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any
) -> None:
    model = load("nllb")
    body = {"input": "word " * 400, "source": "en", "target": "fr", "max_tokens": 4}
    answer = await post("/v1/translate", **body, truncate=True)
    (request,) = engine.generated
    assert len(request.encoder_ids) == model.description.context_length
    assert request.encoder_ids[-1] == 2
    assert answer["data"][0]["truncated"]
    assert answer["usage"]["truncated_tokens"] > 0


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("en", "English"),
        ("deu", "German"),
        ("pt-BR", "Portuguese (as in BR)"),
        ("zh-Hant-TW", "Chinese (traditional, as in TW)"),
        ("eng_Latn", "English (in Latin script)"),
        ("french", "French"),
        ("tlh", None),
    ],
)
def test_tags_are_named_in_english(tag: str, name: str | None) -> None:
    assert english_name(tag) == name
