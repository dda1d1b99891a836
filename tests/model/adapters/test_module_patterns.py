"""Patterns of module names fit what Python's `re` says, as PEFT asks it, and no pattern takes its time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.adapters.config import read_adapter_config
from model.adapters.module_patterns import ModulePattern
from model.errors import CheckpointError
from tests.model.adapters.conftest import Store, pair

CHARACTERS = ["a", "b", ".", r"\.", "_", r"\d", "1", "[ab1]", "[^a]", r"[\d.]", "[]a]", r"\w"]
QUANTIFIERS = ["", "*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{1,2}"]


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    opened = st.tuples(st.sampled_from(["(", "(?:"]), inner, st.sampled_from(QUANTIFIERS))
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        opened.map(lambda parts: f"{parts[0]}{parts[1]}){parts[2]}"),
    )


PATTERNS = st.recursive(
    st.one_of(
        st.tuples(st.sampled_from(CHARACTERS), st.sampled_from(QUANTIFIERS)).map("".join), st.sampled_from(["^", "$"])
    ),
    larger,
    max_leaves=6,
)


@given(PATTERNS, st.lists(st.text("ab1._", max_size=9), min_size=1, max_size=8))
def test_a_pattern_fits_what_re_matches(pattern: str, names: list[str]) -> None:
    found = ModulePattern(pattern)
    for name in names:
        assert found.fits(name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None), name


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj", False),
        ("^model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.k_proj", True),
        ("^layers.0.self_attn.k_proj", "model.layers.0.self_attn.k_proj", False),
        (r"layers\.(1[0-9]|2[0-3])\..*\.(q|v)_proj", "model.layers.17.self_attn.v_proj", True),
        (r"layers\.(1[0-9]|2[0-3])\..*\.(q|v)_proj", "model.layers.7.self_attn.v_proj", False),
        (r"h\.\d+\.attn\.c_attn", "transformer.h.11.attn.c_attn", True),
    ],
)
def test_patterns_as_they_are_written_fit(pattern: str, name: str, fits: bool) -> None:
    assert ModulePattern(pattern).fits(name) is fits


@pytest.mark.parametrize("pattern", ["([a-z_.0-9]+)+!", "(a|a|_)*!", "(.*)*(.*)*(.*)*(.*)*!", "(((a*)*)*)*!"])
def test_no_pattern_takes_its_time(pattern: str) -> None:
    """A loader thread backtracked for ever, holding all others, until the worker was killed."""
    began = time.process_time()
    assert not ModulePattern(pattern).fits("a" * 60 + ".layers.0.self_attn.q_proj")
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "a)", "*", "a**", "a*+", "^*", "[a", "[b-a]", "a{3,1}", "a{1001}", "a{", "\\", "(?i)q"),
        *("(?!vision).*", "(?<=a)b", r"(a)\1", r"\bq", "((a{99}){99}){99}", "((){999}){999}", "(" * 21 + ")" * 21),
        "a" * 500 + "+" + "b" * 500,
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_key(store: Store, pattern: str) -> None:
    folder = store(pair("model.layers.0.self_attn.q_proj", 8, 8), rank_pattern={pattern: 2})
    with pytest.raises(CheckpointError, match="rank_pattern"):
        read_adapter_config(folder)


@pytest.mark.parametrize(
    "names", [[f"h.{index}" for index in range(10_001)], [f"{index}(a{{99}}){{9}}" for index in range(60)]]
)
def test_patterns_that_are_too_many_are_refused(store: Store, names: list[str]) -> None:
    folder = store(pair("model.layers.0.self_attn.q_proj", 8, 8), rank_pattern=dict.fromkeys(names, 2))
    with pytest.raises(CheckpointError, match=r"rank_pattern.*at most"):
        read_adapter_config(folder)
