"""Where the sentences of a text are: spans of it, in order, with nothing but white space between them.

By rules alone, for scripts that mark the ends of sentences: a mark ends one unless what stands around it says otherwise
(an abbreviation, an initial, a decimal, a word that goes on in lower case). Knows no model. Runs in the API process.
"""

import re
from dataclasses import dataclass

TITLES = frozenset(
    "mr mrs ms mx dr prof st sen rep gov gen col capt cmdr lt sgt maj rev hon pres fr sr sra srta mme mlle hr fam "
    "messrs mt ft vs cf viz approx ca resp al".split()
)
"""Never the last word of a sentence (`al` for `et al.`, which a year or a name follows)."""
BEFORE_NUMBERS = frozenset("no nos nr vol vols p pp fig figs eq eqs sec sect ch chap art tab ex ed app".split())
"""Abbreviations where a number follows, words of their own elsewhere."""
MAY_END = frozenset(
    "etc inc ltd co corp llc plc jr bros dept univ assn ave blvd rd jan feb mar apr jun jul aug sep sept oct nov dec "
    "mon tue tues wed thu thur thurs fri sat sun est min max e.g i.e a.m p.m a.d b.c u.s u.k u.n e.u ph.d m.d b.a m.a "
    "z.b d.h u.a usw bzw".split()
)
"""May end a sentence: they do where the next word is one that sentences begin with."""
STARTERS = frozenset(
    "a after all also although an and another as at because before both but by despite during each every finally "
    "first for from he her here his how however i if in it its later many meanwhile moreover most my no nobody now of "
    "on once one only or our several she since so some still such that the their then there therefore these they this "
    "those though thus to today under until we what when where whether which while who why with yet you your".split()
)

MARKS = ".!?…‼⁇⁈⁉؟۔।॥።։"
WIDE_MARKS = "。！？｡．"
"""End a sentence without a space behind them."""
CLOSERS = "\"'”’)]}»›」』）】》〉〕］｠｣"
OPENERS = "\"'“‘«‹([{「『（【《〈〔［¿¡„‚-–—*_"
QUOTE_GOES_ON = ("と", "って", "、", "，", "，", "の", "など", "は", "が", "を", "に", "も", "という")
"""What stands behind a Japanese quotation whose sentence is not over."""

BREAK = re.compile(r"\n[^\S\n]*\n\s*|\n(?=[^\S\n]*(?:[-*•‣◦–]|\d{1,3}[.)])[^\S\n])|[\u2028\u2029\f\v]")
"""A blank line, or a line that begins a list's item."""
MARK = re.compile(f"[{re.escape(MARKS + WIDE_MARKS)}]+[{re.escape(CLOSERS)}]*")
LIST_NUMBER = re.compile(r"(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,4})\Z")
LETTERS = re.compile(r"[^\W\d_](?:\.[^\W\d_])+|[A-ZÀ-ÖØ-Þ]")
"""An initial, or letters with full stops: `U.S.A`, `J.R`."""
LAST_WORD = re.compile(r"[^\W_](?:[\w.'’-]*\w)?\Z")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` of a text."""

    start: int
    end: int


def split_sentences(text: str) -> list[Span]:
    """Each sentence without the white space around it; together they hold every character that is not white space."""
    spans: list[Span] = []
    start = 0
    for found in BREAK.finditer(text):
        _split_block(text, start, found.start(), spans)
        start = found.end()
    _split_block(text, start, len(text), spans)
    return spans


def _split_block(text: str, start: int, end: int, spans: list[Span]) -> None:
    """Adds the sentences of text[start:end], which has no break in it."""
    begin = start
    for mark in MARK.finditer(text, start, end):
        if _ends_sentence(text, begin, mark, end):
            _add(text, begin, mark.end(), spans)
            begin = mark.end()
    _add(text, begin, end, spans)


def _add(text: str, start: int, end: int, spans: list[Span]) -> None:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        spans.append(Span(start, end))


def _ends_sentence(text: str, begin: int, mark: re.Match[str], end: int) -> bool:
    """Whether the sentence that began at `begin` ends with this mark."""
    after = mark.end()
    if after >= end or not text[after:end].strip():
        return True
    symbols = mark.group()
    if any(symbol in WIDE_MARKS for symbol in symbols):
        quoted = symbols[-1] in CLOSERS
        return not (quoted and text.startswith(QUOTE_GOES_ON, after))
    if not text[after].isspace():
        return False
    following = _next_word(text, after, end)
    if following[:1].islower():
        return False
    if not symbols.startswith(".") or symbols.startswith(".."):
        return True
    return _period_ends(text, begin, mark.start(), following)


def _period_ends(text: str, begin: int, period: int, following: str) -> bool:
    """A single full stop with a space and no lower case behind it: does it belong to the word before it alone?"""
    before = text[max(begin, period - 40) : period]
    if LIST_NUMBER.fullmatch(before.lstrip("( \t\n-*•")) and not before[-1:].isspace():
        # The number of a list's item, or one letter and nothing before it.
        return False
    found = LAST_WORD.search(before)
    if found is None:
        return True
    word = found.group()
    lowered = word.lower()
    starts = following.lower() in STARTERS
    if lowered in TITLES:
        return False
    if lowered in BEFORE_NUMBERS:
        return not following[:1].isdigit()
    if lowered in MAY_END or LETTERS.fullmatch(word):
        return starts
    return True


def _next_word(text: str, start: int, end: int) -> str:
    """The word behind white space and opening quotation marks; "" where something else stands there."""
    while start < end and (text[start].isspace() or text[start] in OPENERS):
        start += 1
    stop = start
    while stop < end and (text[stop].isalnum() or text[stop] in "'’"):
        stop += 1
    return text[start:stop]
