"""What a classifier's labels say about sentiment, whatever it calls them, as valences from -1 to 1.

Understood are words (`positive`, `NEG`, `very negative`), stars (`1 star` .. `5 stars`), signed numbers (`-1`, `0`,
`1`) and unnamed outputs (`LABEL_0` ..), which by custom go from negative to positive. No torch; both processes.
"""

import re
from collections.abc import Sequence

WORDS = {
    "positive": 1.0, "pos": 1.0, "good": 1.0, "favorable": 1.0, "favourable": 1.0, "happy": 1.0, "bullish": 1.0,
    "neutral": 0.0, "neu": 0.0, "mixed": 0.0, "none": 0.0, "ok": 0.0,
    "negative": -1.0, "neg": -1.0, "bad": -1.0, "unfavorable": -1.0, "unfavourable": -1.0, "sad": -1.0, "bearish": -1.0,
}  # fmt: skip
STRONG = frozenset({"very", "extremely", "strongly", "highly", "most"})
WEAK = frozenset({"somewhat", "slightly", "weakly", "mildly", "moderately", "rather"})
STARS = re.compile(r"([1-5])(?: ?stars?)?")
UNNAMED = re.compile(r"(?:label )?([0-4])")
UNNAMED_COUNTS = (2, 3, 5)


def valences(labels: Sequence[str]) -> tuple[float, ...] | None:
    """A number for each label: 1 the most positive, 0 neutral; None where the labels do not speak of sentiment.

    `positive` beside `very positive` is 0.5, and stars 1 .. 5 are -1, -0.5, 0, 0.5, 1.
    """
    names = [_words(label) for label in labels]
    found = _from_words(names) or _from_stars(names) or _from_signs(labels)
    if not found or not (min(found) < 0 < max(found)):
        return None
    return found


def unnamed_valences(labels: Sequence[str]) -> tuple[float, ...] | None:
    """The same for two, three or five outputs without names (`LABEL_0`, or `0`): evenly from -1 to 1.

    Any unnamed classifier looks like that: a guess to be made only where the caller says that it is one of sentiment,
    or where there is nothing better.
    """
    numbers = [UNNAMED.fullmatch(_words(label)) for label in labels]
    order = [int(match[1]) for match in numbers if match is not None]
    if len(labels) not in UNNAMED_COUNTS or order != list(range(len(labels))):
        return None
    return _evenly(len(labels))


def _words(label: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", label.lower()))


def _from_words(names: Sequence[str]) -> tuple[float, ...] | None:
    plain, graded = [], any(name.split(" ")[0] in STRONG for name in names)
    for name in names:
        words = [word for word in name.split(" ") if word not in ("sentiment", "label")]
        degree = words.pop(0) if len(words) > 1 and words[0] in STRONG | WEAK else ""
        valence = WORDS.get(" ".join(words))
        if valence is None:
            return None
        strong = degree in STRONG or not (degree or graded)
        plain.append(valence if strong else valence / 2)
    return tuple(plain)


def _from_stars(names: Sequence[str]) -> tuple[float, ...] | None:
    matches = [STARS.fullmatch(name) for name in names]
    stars = [int(match[1]) for match in matches if match is not None]
    if len(stars) != len(names) or sorted(stars) != [1, 2, 3, 4, 5]:
        return None
    return tuple((star - 3) / 2 for star in stars)


def _from_signs(labels: Sequence[str]) -> tuple[float, ...] | None:
    signs = {"-1": -1.0, "0": 0.0, "1": 1.0, "+1": 1.0}
    found = [signs[label.strip()] for label in labels if label.strip() in signs]
    return tuple(found) if len(found) == len(labels) else None


def _evenly(count: int) -> tuple[float, ...]:
    return tuple(2 * index / (count - 1) - 1 for index in range(count))
