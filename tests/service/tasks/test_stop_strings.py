"""Stop strings against a reader that looks at one character at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.tasks.stop_strings import StopStrings

letters = st.text("abc", max_size=30)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def by_character(text: str, stops: list[str]) -> str:
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


def feed(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    finder, given_out = StopStrings(stops), []
    for piece in pieces:
        text, stopped = finder.feed(piece)
        given_out.append(text)
        if stopped:
            return given_out, True
    given_out.append(finder.flush())
    return given_out, False


@given(text=letters, stops=stop_lists, data=st.data())
@settings(max_examples=500, deadline=None)
def test_the_text_ends_at_the_stop_that_is_complete_first_however_it_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    given_out, stopped = feed(stops, pieces)
    assert "".join(given_out) == by_character(text, stops)
    assert stopped == any(stop in text for stop in stops)


@given(text=letters, stops=stop_lists)
@settings(max_examples=300, deadline=None)
def test_nothing_goes_out_that_may_begin_a_stop_and_nothing_else_is_held(text: str, stops: list[str]) -> None:
    finder, out = StopStrings(stops), ""
    for end, character in enumerate(text, start=1):
        piece, stopped = finder.feed(character)
        out += piece
        if stopped:
            break
        held = text[len(out) : end]
        assert not held or any(stop.startswith(held) for stop in stops)
        for longer in range(len(held) + 1, end + 1):
            assert not any(stop.startswith(text[end - longer : end]) for stop in stops)


@given(text=letters, stops=stop_lists, inclusive=st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_stop_that_ended_the_text_is_told(text: str, stops: list[str], inclusive: bool) -> None:
    finder = StopStrings(stops, inclusive=inclusive)
    out, stopped = finder.feed(text)
    assert (finder.found is not None) == stopped
    if finder.found is not None:
        assert finder.found in stops
        before = out.removesuffix(finder.found) if inclusive else out
        assert text.startswith(before + finder.found)


def test_text_that_turns_out_to_be_no_stop_is_given_out_later() -> None:
    finder = StopStrings(["</s>"])
    assert finder.feed("a <") == ("a ", False)
    assert finder.feed("/") == ("", False)
    assert finder.feed("b") == ("</b", False)
    assert finder.feed("</") == ("", False)
    assert finder.flush() == "</"


def test_no_stops_hold_nothing_back() -> None:
    finder = StopStrings([])
    assert not finder
    assert finder.feed("anything") == ("anything", False)
    assert not finder.would_stop("anything")


@pytest.mark.parametrize(("held", "text", "stops"), [("a\n", "\n", True), ("a\n", "b", False)])
def test_would_stop_foresees_feed(held: str, text: str, stops: bool) -> None:
    finder = StopStrings(["\n\n"])
    finder.feed(held)
    assert finder.would_stop(text) is stops
    assert finder.feed(text)[1] is stops
