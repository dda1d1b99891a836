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

_YEAR = re.compile(r"\b(1[0-9]{3}|20[0-2][0-9])\b")
_NUMBER = re.compile(r"\b\d[\d,.]*\d\b|\b\d\b")
_NAME = re.compile(r"(?<=[a-z,;] )(?:[A-Z][a-z]+)(?: (?:of |the )?[A-Z][a-z]+){0,3}")


def crop(question: Question, *, before: int, after: int) -> Question:
    """The question with its context cut to whole words, at most so many characters each side of the first answer."""
    start, text = question.answers[0]
    first = max(0, start - before)
    first = 0 if first == 0 else question.context.find(" ", first, start) + 1 or start
    last = min(len(question.context), start + len(text) + after)
    if last < len(question.context):
        last = max(start + len(text), question.context.rfind(" ", start + len(text), last))
    return replace(question, context=question.context[first:last], answers=((start - first, text),))


def cloze(paragraph: str, rng: random.Random) -> Question | None:
    """One question about a name or number of a sentence of the paragraph; None when it has neither."""
    sentences = [s for s in sources.split_sentences(paragraph) if 40 < len(s) < 250]
    rng.shuffle(sentences)
    for sentence in sentences:
        found = [(match.group(), word) for pattern, word in _PATTERNS for match in pattern.finditer(sentence)]
        start = paragraph.find(sentence)
        if not found or start < 0:
            continue
        answer, word = rng.choice(found)
        at = sentence.find(answer)
        left = sentence[:at].split()[-9:]
        right = sentence[at + len(answer) :].split()[:9]
        words = [w for w in [*left, *right] if rng.random() > 0.2]
        rng.shuffle(words) if rng.random() < 0.2 else None
        text = f"{word} {' '.join(words).strip(' .,;')}?" if rng.random() < 0.6 else f"{' '.join(left)} {word} ?"
        return Question("cloze", text, paragraph, ((start + at, answer),))
    return None


_PATTERNS = ((_YEAR, "when"), (_NUMBER, "how many"), (_NAME, "who"), (_NAME, "what"), (_NAME, "which"))


def training_questions(data: Path, *, num_cloze: int, seed: int) -> list[Question]:
    """All training questions, shuffled; XQuAD's appear whole and cropped, the others cropped."""
    rng = random.Random(seed)
    real, _ = corpus.questions(data)
    found = list(real)
    found += [crop(question, before=rng.randrange(300), after=rng.randrange(100, 300)) for question in real]
    medical = [question for question in corpus.medical_questions(data) if len(question.answers[0][1]) < 120]
    found += [crop(question, before=rng.randrange(400), after=rng.randrange(100, 300)) for question in medical]
    paragraphs = [text for text in sources.wikitext(data) if 200 < len(text) < 1000]
    paragraphs += list(dict.fromkeys(question.context for question in real)) * 4
    made = [cloze(rng.choice(paragraphs), rng) for _ in range(num_cloze * 2)]
    found += [question for question in made if question is not None][:num_cloze]
    rng.shuffle(found)
    return found
