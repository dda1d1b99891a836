"""Questions for the span head: real ones (XQuAD, COVID-QA), and cloze questions made from sentences.

A cloze question hides a name or a number of a sentence behind a question word and loses some other words, so that the
head must match meaning rather than copy (after arXiv:1906.04980). Runs in the training process; knows text only.
"""

import random
import re
from dataclasses import replace
from pathlib import Path

from model.training import corpus, sources
from model.training.sources import Question

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = re.compile(rf"\b(?:\d{{1,2}} )?{_MONTH}(?: \d{{1,2}},?)?(?: \d{{4}})?|\b(?:1[0-9]{{3}}|20[0-2][0-9])\b")
_NUMBER = re.compile(r"[$£]?\b\d[\d,.]*(?:%| percent| million| billion)?(?: [a-z]{3,})?\b")
_NAME = re.compile(r"(?<=[\w,;] )[A-Z][\w'-]+(?: (?:of |the |de )*[A-Z][\w'-]+){0,3}")
_WORDS = r"(?:[a-z-]{3,} ){0,2}[a-z-]{4,}(?=[,.;:])"
_PHRASE = re.compile(rf"(?:(?<= the )|(?<= of )|(?<= by )|(?<= for )|(?<= as )){_WORDS}")
_LED = re.compile(rf"(?:(?<= is )|(?<= was )|(?<= in ))(?:an? |the )?{_WORDS}")
_PATTERNS = (
    (_DATE, ("when", "in what year", "in which year", "what year", "on what date")),
    (_NUMBER, ("how many", "how much", "what number of")),
    (_NAME, ("who", "who", "what", "which", "where", "what person", "what place", "what country", "what group")),
    (_NAME, ("who", "what", "where", "what is the name of")),
    (_PHRASE, ("what", "what", "what kind of", "which", "how")),
    (_LED, ("what", "what", "what type of", "how")),
)


def crop(question: Question, *, before: int, after: int) -> Question:
    """The question with its context cut to whole words, at most so many characters each side of the first answer."""
    start, text = question.answers[0]
    first = max(0, start - before)
    first = 0 if first == 0 else question.context.find(" ", first, start) + 1 or start
    last = min(len(question.context), start + len(text) + after)
    if last < len(question.context):
        last = max(start + len(text), question.context.rfind(" ", start + len(text), last))
    return replace(question, context=question.context[first:last], answers=((start - first, text),))


def _ask(left: list[str], right: list[str], asked: str, rng: random.Random) -> str:
    """The words around an answer as a question: a subject asked for, a question at the end, or a bag of words."""
    form = rng.random()
    if form < 0.35 and len(right) > 2:
        words = [asked, *right, *(left if rng.random() < 0.4 else [])]
    elif form < 0.6:
        words = [*left, asked]
    else:
        kept = [word for word in [*left, *right] if rng.random() > 0.25]
        moved = sorted(range(len(kept)), key=lambda place: place + rng.uniform(0, 4))
        words = [asked, *(kept[place] for place in moved)]
    return " ".join(words).strip(" .,;:") + "?"


def cloze(paragraph: str, rng: random.Random) -> Question | None:
    """One question about a name, number, date or phrase of a sentence of the paragraph; None when it has none."""
    sentences = [s for s in sources.split_sentences(paragraph) if 40 < len(s) < 300]
    rng.shuffle(sentences)
    for sentence in sentences:
        start = paragraph.find(sentence)
        kinds = [(list(pattern.finditer(sentence)), words) for pattern, words in _PATTERNS]
        kinds = [(matches, words) for matches, words in kinds if matches]
        if not kinds or start < 0:
            continue
        matches, words = rng.choice(kinds)
        match = rng.choice(matches)
        reach = rng.randrange(4, 11)
        left, right = sentence[: match.start()].split()[-reach:], sentence[match.end() :].split()[:reach]
        if len(left) + len(right) > 3:
            text = _ask(left, right, rng.choice(words), rng)
            return Question("cloze", text, paragraph, ((start + match.start(), match.group()),))
    return None


def _passages(data: Path, real: list[Question]) -> list[str]:
    """Paragraphs of 200 to 1,000 characters in which clozes are made; encyclopedic ones twice."""
    whole = sources.wikitext(data) * 2 + list(dict.fromkeys(question.context for question in real)) * 6
    whole += [abstract.document for abstract in sources.scitldr(data, "train")]
    found = []
    for text in whole:
        while len(text) > 1000:
            cut = text.rfind(". ", 200, 1000) + 1 or 1000
            found.append(text[:cut])
            text = text[cut:].lstrip()
        found.append(text)
    return [text for text in found if len(text) > 200]


def training_questions(data: Path, *, num_cloze: int, seed: int) -> list[Question]:
    """All training questions, shuffled; XQuAD's appear whole and cropped, the others cropped."""
    rng = random.Random(seed)
    real, _ = corpus.questions(data)
    found = list(real)
    for _ in range(4):
        found += [crop(question, before=rng.randrange(600), after=rng.randrange(60, 600)) for question in real]
    medical = [question for question in corpus.medical_questions(data) if len(question.answers[0][1]) < 120]
    for _ in range(2):
        found += [crop(question, before=rng.randrange(500), after=rng.randrange(60, 500)) for question in medical]
    passages = _passages(data, real)
    made = [cloze(rng.choice(passages), rng) for _ in range(num_cloze)]
    found += [question for question in made if question is not None]
    rng.shuffle(found)
    return found
