"""Texts made for training: words put into sentences, and questions whose answers are where they say."""

import random

from model.training.corpus import distinct, texts_with_words
from model.training.questions import cloze, crop

SENTENCE = "The castle of Edinburgh was built by engineers before the kingdom fell in 1603, on volcanic rock."
PARAGRAPH = f"It is an old town. {SENTENCE} Nobody remembers how many people lived there."


def test_every_word_is_asked_for_and_stands_in_for_one_word_of_a_sentence():
    made = texts_with_words(["quokka"], [SENTENCE], copies=1, seed=0)
    assert made[:2] == ["quokka", "What is quokka?"]
    changed = [(old, new) for old, new in zip(SENTENCE.split(), made[2].split(), strict=True) if old != new]
    assert [new for _, new in changed] == ["quokka"]


def test_texts_appear_once_in_an_order_that_the_seed_gives():
    texts = [f"text number {number}" for number in range(50)]
    assert sorted(distinct([*texts, "text  number 3"], seed=1)) == sorted(texts)
    assert distinct(texts, seed=1) == distinct(texts[::-1], seed=1) != distinct(texts, seed=2)


def test_a_cloze_hides_its_answer_and_says_where_it_is():
    rng = random.Random(0)
    found = [question for _ in range(40) if (question := cloze(PARAGRAPH, rng)) is not None]
    assert {"Edinburgh", "1603"} <= {question.answers[0][1] for question in found}
    for question in found:
        start, answer = question.answers[0]
        assert question.context[start : start + len(answer)] == answer
        assert answer not in question.question


def test_a_cropped_context_still_holds_the_answer_at_its_place():
    rng = random.Random(1)
    question = next(q for _ in range(40) if (q := cloze(PARAGRAPH, rng)) is not None)
    short = crop(question, before=10, after=5)
    start, answer = short.answers[0]
    assert short.context[start : start + len(answer)] == answer
    assert len(short.context) < len(question.context)
