"""Incremental decoding against decoding everything at once, over random texts and random ids."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from model.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the data folder ../shared/data is not here")

GPT2 = DATA / "tokenizers" / "gpt2"
STORIES = DATA / "stories260K-hf"
BERT = DATA / "tokenizers" / "bert-base-uncased"
LOADED: dict[Path, Tokenizer] = {}


def load(folder: Path) -> Tokenizer:
    if folder not in LOADED:
        LOADED[folder] = Tokenizer.load(folder)
    return LOADED[folder]


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True, continues: bool = False) -> Iterator[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, continues=continues)
    for id in ids:
        yield detokenizer.push([id])
    yield detokenizer.flush()


FOLDERS = [pytest.param(GPT2, id="gpt2"), pytest.param(STORIES, id="stories"), pytest.param(BERT, id="bert")]
texts = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("a <s>é你🦙\n'.", max_size=40)


@pytest.mark.parametrize("folder", FOLDERS)
@given(text=texts, skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_of_a_text_join_to_its_full_decode(folder: Path, text: str, skip: bool) -> None:
    tokenizer = load(folder)
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("folder", FOLDERS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=250, deadline=None)
def test_pieces_of_random_ids_join_to_their_full_decode(folder: Path, data: st.DataObject, skip: bool) -> None:
    """Random ids are mostly broken UTF-8; low ids are the byte tokens, where runs and half characters are."""
    tokenizer = load(folder)
    low = st.integers(0, 260)
    ids = data.draw(st.lists(low | st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("folder", [GPT2, STORIES])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
@settings(max_examples=150, deadline=None)
def test_no_piece_of_valid_text_shows_a_broken_character(folder: Path, text: str) -> None:
    tokenizer = load(folder)
    assert not any("\ufffd" in piece for piece in stream(tokenizer, tokenizer.encode(text)))


@pytest.mark.parametrize("folder", FOLDERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_how_ids_are_grouped_does_not_change_the_text(folder: Path, data: st.DataObject) -> None:
    tokenizer = load(folder)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    detokenizer = tokenizer.detokenizer()
    text = "".join(detokenizer.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True))
    assert text + detokenizer.flush() == "".join(stream(tokenizer, ids))


@pytest.mark.parametrize("folder", FOLDERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_pending_text_is_what_would_come_if_it_ended_now(folder: Path, data: st.DataObject) -> None:
    tokenizer = load(folder)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 260), max_size=12))
    detokenizer, text = tokenizer.detokenizer(), ""
    for count, id in enumerate(ids, start=1):
        text += detokenizer.push([id])
        assert text + detokenizer.pending == tokenizer.decode(ids[:count])


@pytest.mark.parametrize("folder", [GPT2, STORIES])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_continued_text_is_the_rest_of_the_full_decode(folder: Path, data: st.DataObject) -> None:
    """ "▁world" after "▁Hello" adds " world", though it decodes to "world" alone."""
    tokenizer = load(folder)
    words = st.text("abc de", min_size=1, max_size=20)
    prompt = tokenizer.encode(data.draw(words.filter(str.strip)))
    ids = tokenizer.encode(data.draw(words), add_special_tokens=False)
    rest = "".join(stream(tokenizer, ids, continues=True))
    assert tokenizer.decode(prompt) + rest == tokenizer.decode(prompt + ids)


def test_a_character_is_given_out_with_its_last_token() -> None:
    tokenizer = load(GPT2)
    ids = tokenizer.encode("a 🦙b")
    assert [tokenizer.token(id) for id in ids] == ["a", "ĠðŁ", "¦", "Ļ", "b"]
    assert list(stream(tokenizer, ids)) == ["a", " ", "", "🦙", "b", ""]


def test_an_unfinished_character_shows_at_the_end_as_in_a_full_decode() -> None:
    tokenizer = load(GPT2)
    ids = tokenizer.encode("🦙")[:-1]
    assert list(stream(tokenizer, ids)) == [""] * len(ids) + ["\ufffd"]


def test_special_ids_can_be_kept() -> None:
    tokenizer = load(STORIES)
    detokenizer = tokenizer.detokenizer(keep=frozenset({2}))
    assert detokenizer.push([1, 2]) == "</s>"


DECODERS = {
    "metaspace": decoders.Metaspace(),
    "metaspace without prefix": decoders.Metaspace(prepend_scheme="never"),
    "none": None,
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "strip two": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "wordpiece, no cleanup": decoders.WordPiece(cleanup=False),
}


@pytest.mark.parametrize("decoder", DECODERS)
@given(ids=st.lists(st.integers(0, 12), max_size=12))
@settings(max_examples=150, deadline=None)
def test_every_decoder_streams_as_it_decodes(decoder: str, ids: list[int]) -> None:
    vocabulary = ["▁", "▁▁a", "a", "▁b", "##c", ".", "n't", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "<0x41>", "'"]
    backend = Backend(models.WordLevel({token: id for id, token in enumerate(vocabulary)}, unk_token="a"))
    if DECODERS[decoder] is not None:
        backend.decoder = DECODERS[decoder]
    tokenizer = Tokenizer(backend)
    assert tokenizer.pieces.kind != "window"
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_decoder_of_another_kind_streams_whole_characters() -> None:
    backend = Backend.from_str(json.dumps(json.loads((STORIES / "tokenizer.json").read_text())))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("zzz", "y")]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.pieces.kind == "window"
    ids = tokenizer.encode("Once upon a 🦙 time, 你好.")
    pieces = list(stream(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
