"""Which text each stage learns from: the training parts of the data sets, held-out rows and their duplicates removed.

Every list is in a fixed order (file order, then a seeded draw), so a run sees the same data again after a resume.
Knows text only: no tokenizer, no tensors. Runs in the training process.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from model.training import sources
from model.training.sources import Fable, LabelledText, Question
from model.training.splits import held_out, normalized, without


@dataclass(frozen=True, slots=True)
class LabelledParts:
    """A classification task: what it trains on and what it is judged on."""

    train: list[LabelledText]
    test: list[LabelledText]


def _parts(train: list[LabelledText], test: list[LabelledText]) -> LabelledParts:
    hidden = {normalized(row.text) for row in test}
    return LabelledParts([row for row in train if normalized(row.text) not in hidden], test)


def sentiment(data: Path) -> LabelledParts:
    """Test: the 500 sentence-polarity rows, then the 500 UCI rows."""
    ids = held_out("sentiment")
    polarity, uci = sources.sentence_polarity(data), sources.uci_sentences(data)
    polarity_ids, uci_ids = ids["sentence-polarity"], ids["uci-sentiment-sentences"]
    test = [polarity[i] for i in polarity_ids] + [uci[i] for i in uci_ids]
    return _parts(without(polarity, polarity_ids) + without(uci, uci_ids), test)


def intents(data: Path) -> LabelledParts:
    return _parts(sources.banking77(data, "train"), sources.banking77(data, "test"))


def spam(data: Path) -> LabelledParts:
    rows, ids = sources.sms_spam(data), held_out("spam")
    return _parts(without(rows, ids), [rows[i] for i in ids])


def questions(data: Path) -> tuple[list[Question], list[Question]]:
    """XQuAD questions (train, test), parted by article."""
    articles, ids = sources.xquad(data), held_out("xquad")
    train = [question for article in without(articles, ids) for question in article]
    return train, [question for index in ids for question in articles[index]]


def medical_questions(data: Path) -> list[Question]:
    return [question for article in sources.covid_qa(data) for question in article]


def novels(data: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Books (train, test), parted by book."""
    books, names = sources.novels(data), set(held_out("novels"))
    train = {name: text for name, text in books.items() if name not in names}
    return train, {name: text for name, text in books.items() if name in names}


def stories(data: Path) -> tuple[list[str], list[str]]:
    rows, ids = sources.stories(data), held_out("stories")
    hidden = {normalized(rows[i])[:200] for i in ids}
    train = [text for text in without(rows, ids) + sources.story_excerpt(data) if normalized(text)[:200] not in hidden]
    return train, [rows[i] for i in ids]


def fables(data: Path) -> tuple[list[Fable], list[Fable]]:
    rows, ids = sources.fables(data), held_out("fables")
    return without(rows, ids), [rows[i] for i in ids]


def encoder_texts(data: Path, *, seed: int, sentences_per_book: int) -> list[str]:
    """The distinct texts on which the student learns the teacher's embeddings: mostly sentences, some paragraphs."""
    rng = random.Random(seed)
    texts: list[str] = []
    for parts in (sentiment(data), intents(data), spam(data)):
        texts += [row.text for row in parts.train]
    for part in ("train", "val"):
        texts += [row.text for row in sources.clinc150(data, part)]
    for label in {row.label for row in sources.banking77(data, "train") + sources.clinc150(data, "train")}:
        texts.append(label.replace("_", " ").lower())
    texts += sources.english_sentences(data) + sources.prompts(data)
    texts += _question_texts(data) + _science_texts(data)
    texts += _prose(data, rng, sentences_per_book) + _encyclopedia(data)
    return distinct(texts, seed=seed)


def distinct(texts: list[str], *, seed: int) -> list[str]:
    """Every text once, spaces evened out, in a seeded order."""
    kept = sorted(text for text in {" ".join(text.split())[:2000] for text in texts} if len(text) > 3)
    random.Random(seed).shuffle(kept)
    return kept


def texts_with_words(words: list[str], texts: list[str], *, copies: int, seed: int) -> list[str]:
    """Each word alone, asked for, and `copies` times in place of a word of a sentence.

    From such texts a student whose vocabulary has lost the words learns where the teacher places them."""
    rng = random.Random(seed)
    sentences = [text for text in texts if 40 < len(text) < 160]
    found = []
    for word in words:
        found += [word, f"What is {word}?"]
        for sentence in rng.sample(sentences, copies):
            parts = sentence.split(" ")
            places = [place for place, part in enumerate(parts) if len(part) > 4 and part.isalpha()]
            if places:
                parts[rng.choice(places)] = word
                found.append(" ".join(parts))
    return found


def _question_texts(data: Path) -> list[str]:
    train, _ = questions(data)
    medical = medical_questions(data)
    texts = [question.question for question in train + medical]
    for context in dict.fromkeys(question.context for question in train):
        texts += [context, *sources.split_sentences(context)]
    papers = dict.fromkeys(question.context for question in medical)
    passages = [passage for paper in papers for passage in paper.split("\n\n") if passage]
    texts += [passage for passage in passages if 200 < len(passage) < 1500]
    return texts + [s for passage in passages for s in sources.split_sentences(passage) if 30 < len(s) < 400]


def _science_texts(data: Path) -> list[str]:
    texts: list[str] = []
    for part in ("train", "dev"):
        for abstract in sources.scitldr(data, part):
            texts += [abstract.title, abstract.document, *abstract.summaries[:1]]
            texts += sources.split_sentences(abstract.document)
    return texts


def _prose(data: Path, rng: random.Random, sentences_per_book: int) -> list[str]:
    texts: list[str] = []
    books, _ = novels(data)
    for text in books.values():
        sentences = [s for s in sources.split_sentences(text) if 20 < len(s) < 400]
        texts += rng.sample(sentences, min(len(sentences), sentences_per_book))
    reviews = [line for row in sources.movie_reviews(data) for line in row.text.split("\n") if 20 < len(line) < 400]
    texts += rng.sample(reviews, min(len(reviews), 100 * sentences_per_book))
    story_rows, _ = stories(data)
    story_sentences = [s for story in story_rows for s in sources.split_sentences(story)]
    texts += story_sentences + story_rows[:1000]
    fable_rows, _ = fables(data)
    for fable in fable_rows:
        texts += [fable.title, fable.lesson, fable.text, *sources.split_sentences(fable.text)]
    return texts


def _encyclopedia(data: Path) -> list[str]:
    paragraphs = sources.wikitext(data)
    return [s for paragraph in paragraphs for s in sources.split_sentences(paragraph)] + paragraphs
