"""Proper names in novels, told by their capitals, which an uncased network cannot see: labels without annotators.

A word with a capital inside a sentence is (part of) a name, days, peoples and forms of address among them. Where its
capital says nothing, as at a sentence's start, it is neither learnt from nor judged. Knows text only: no tokenizer, no
tensors. Runs in the training process.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from model.training.sources import split_sentences

_WORD = re.compile(r"[^\W\d_]+")
_INSIDE = re.compile(r"\.? |[-.'’]")  # Mr. Darcy, Jean-Paul
_OPENING = re.compile(r"""[^\w\s,)]\s*$""")  # what may begin a sentence or a speech
_NO_NAMES = frozenset({"I", "O", "Oh", "Ah"})


@dataclass(frozen=True, slots=True)
class Word:
    """Characters `start` to `end` of a sentence, in lower case; `is_name` is None where its capital says nothing."""

    text: str
    start: int
    end: int
    is_name: bool | None


def words_of(sentence: str) -> list[Word]:
    """Worked example: of "Then Mr. Darcy left." the first is unsure, the next two are names and the last is not."""
    found: list[Word] = []
    for match in _WORD.finditer(sentence):
        text, (start, end) = match.group(), match.span()
        is_name: bool | None = text[0].isupper() and text not in _NO_NAMES
        goes_on = bool(found) and found[-1].is_name and _INSIDE.fullmatch(sentence, found[-1].end, start)
        begins = not found or (_OPENING.search(sentence[:start]) and not goes_on)
        if is_name and (begins or (len(text) > 1 and text.isupper())):
            is_name = None
        found.append(Word(text.lower(), start, end, is_name))
    return found


def gaps_inside_names(sentence: str, words: Sequence[Word]) -> list[tuple[int, int]]:
    """The characters between neighbouring words of one name: the stop of "Mr. Darcy" belongs to it."""
    return [
        (left.end, right.start)
        for left, right in pairwise(words)
        if left.is_name and right.is_name and _INSIDE.fullmatch(sentence, left.end, right.start)
    ]


def sentences_with_names(texts: Iterable[str], *, per_text: int, seed: int) -> list[str]:
    """At most so many whole sentences of each text, drawn; headings, where most words have capitals, are left out."""
    rng, found = random.Random(seed), []
    for text in texts:
        whole = [s for s in split_sentences(text) if 30 < len(s) < 300 and not s[0].islower() and s[-1] in ".!?\"'”’"]
        prose = [s for s in whole if 2 * sum(word[0].isupper() for word in _WORD.findall(s)) < len(_WORD.findall(s))]
        found += rng.sample(prose, min(per_text, len(prose)))
    return found


def known_names(sentences: Iterable[str]) -> dict[str, bool]:
    """Of every word that was sure somewhere, whether it was a name more often than not: the baseline."""
    names, others = Counter[str](), Counter[str]()
    for sentence in sentences:
        for word in words_of(sentence):
            if word.is_name is not None:
                (names if word.is_name else others)[word.text] += 1
    return {text: names[text] > others[text] for text in names | others}
