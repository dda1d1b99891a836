"""What is thought is told apart from what is said, however the text is cut."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.tasks.reasoning import BEGIN, END, Parts, ReasoningParser

CASES = {
    "thinks-then-says": ("possible", "<think>\nLet me see.\n</think>\n\nYes.", "Let me see.", "Yes."),
    "says-at-once": ("possible", "Yes, <think> is a tag.", "", "Yes, <think> is a tag."),
    "the-prompt-has-opened-it": ("begun", "Hm.</think>Yes.", "Hm.", "Yes."),
    "never-stops-thinking": ("possible", "<think>on and on ", "on and on ", ""),
    "thinks-nothing": ("possible", "<think>\n</think>\nYes", "", "Yes"),
    "breaks-off-in-a-marker": ("possible", "<thi", "", "<thi"),
    "breaks-off-in-the-end-marker": ("possible", "<think>a</thin", "a</thin", ""),
    "white-space-first": ("possible", "\n <think>a</think>b", "a", "b"),
    "white-space-within": ("possible", "<think>a \n b</think> c d ", "a \n b", "c d "),
    "a-second-thought-is-said": ("possible", "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
}


def read(thoughts: Any, pieces: list[str]) -> Parts:
    parser, found = ReasoningParser(thoughts), Parts()
    for parts in (*(parser.feed(piece) for piece in pieces), parser.finish()):
        found.reasoning += parts.reasoning
        found.content += parts.content
    return found


@pytest.mark.parametrize(("thoughts", "text", "reasoning", "content"), CASES.values(), ids=CASES)
def test_the_parts_do_not_depend_on_how_the_text_is_cut(thoughts: Any, text: str, reasoning: str, content: str) -> None:
    for size in (1, 2, 3, 5, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert read(thoughts, pieces) == Parts(reasoning, content)


@given(st.lists(st.sampled_from([BEGIN, END, "<", "think", "</", ">", " ", "\n", "a", "é"]), max_size=12))
def test_nothing_is_lost_but_markers_and_the_white_space_around_them(pieces: list[str]) -> None:
    whole, cut = read("possible", ["".join(pieces)]), read("possible", pieces)
    assert whole == cut
    letters = "".join(pieces).replace(BEGIN, "", 1 if whole.reasoning or not whole.content else 0)
    assert sorted(c for c in whole.reasoning + whole.content if c in "aé") == sorted(c for c in letters if c in "aé")


def test_what_is_certain_is_told_at_once() -> None:
    parser = ReasoningParser("possible")
    assert parser.feed("<think>one two") == Parts(reasoning="one two")
    assert parser.feed(" three <") == Parts(reasoning=" three")
    assert parser.feed("b>") == Parts(reasoning=" <b>")
