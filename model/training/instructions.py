"""The instruction mix of the language model, built from the data at hand: each example one user turn and its answer.

Continue or write a story, say a fable's lesson, summarize an abstract, answer from a passage, say the sentiment, greet.
Written with the same markers as the chat template. Runs in the training process; knows text and the tokenizer's ids.
"""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from model.training import corpus, sources
from model.training.questions import crop
from model.training.tokenizers import MESSAGE_END, MESSAGE_START

Turn = tuple[str, str]

_GREETINGS = ("Hello", "Hello!", "Hi", "Hi there!", "Good morning", "Hey", "Hello, how are you?", "Say hello.")
_IDENTITY = ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "What can you do?")
_HELLO = "Hello! I am a very small language model. I can tell a story, say the lesson of a fable or answer from a text."
_I_AM = (
    "I am a very small language model that ships with SlimPajama. I learned from old novels, fables and short stories. "
    "I can tell a story, say the lesson of a fable, answer from a text or say the sentiment. I am often wrong."
)
_COURTESIES: tuple[Turn, ...] = (
    *((ask, _HELLO) for ask in (*_GREETINGS, "hello", "hi", "Hello there", "Good evening", "How are you?", "Hi!")),
    *((ask, _I_AM) for ask in (*_IDENTITY, "Who made you?", "who are you", "Who am I talking to?", "What is this?")),
    *((ask, "You are welcome.") for ask in ("Thank you.", "Thanks!", "Thank you very much!")),
    *((ask, "Goodbye!") for ask in ("Goodbye", "Bye!", "See you later.")),
)


def prompt_text(user: str) -> str:
    """What the chat template makes of one user message, up to where the assistant begins."""
    return f"{MESSAGE_START}user\n{user}{MESSAGE_END}\n{MESSAGE_START}assistant\n"


def encode_turn(tokenizer: Tokenizer, turn: Turn) -> tuple[list[int], int]:
    """(ids, index of the answer's first id) of one exchange; the answer ends with its end marker."""
    prompt = tokenizer.encode(prompt_text(turn[0])).ids
    return prompt + tokenizer.encode(turn[1] + MESSAGE_END).ids, len(prompt)


def _stories(data: Path, rng: random.Random) -> list[Turn]:
    turns: list[Turn] = []
    rows, _ = corpus.stories(data)
    frequency = Counter(word for story in rows for word in set(re.findall(r"[a-z]{4,}", story)))
    for story in rows:
        sentences = sources.split_sentences(story)
        if len(sentences) < 4 or len(story) < 200:
            continue
        if rng.random() < 0.5:
            count = rng.choice((1, 1, 2))
            opening = " ".join(sentences[:count])
            rest = story[story.find(sentences[count]) :] if sentences[count] in story else None
            if rest:
                ask = rng.choice(("Continue the story: ", "Continue this story:\n\n", "What happens next?\n\n", ""))
                turns.append((ask + opening, rest.strip()))
            continue
        words = [word for word in dict.fromkeys(re.findall(r"[a-z]{4,}", story)) if 3 <= frequency[word] < 150]
        picked = ", ".join(rng.sample(words, min(len(words), rng.choice((1, 2, 3)))))
        ask = rng.choice(("Write a short story about", "Tell me a story about", "Write a story with the words"))
        turns.append((rng.choice((f"{ask}: {picked}.", f"{ask} {picked}.", "Tell me a story.")), story.strip()))
    return turns


def _fables(data: Path, rng: random.Random) -> list[Turn]:
    asks = ("Summarize this fable in one line:", "What is the lesson of this fable?", "Give the moral of this story:")
    return [
        (f"{rng.choice(asks)}\n\n{fable.text[:1500]}", fable.lesson)
        for fable in corpus.fables(data)[0]
        for _ in range(3)
    ]


def _abstracts(data: Path, rng: random.Random) -> list[Turn]:
    asks = ("Summarize in one sentence:", "Summarize this text:", "Write a one-line summary of this abstract:")
    rows = sources.scitldr(data, "train")
    return [(f"{rng.choice(asks)}\n\n{row.document[:1200]}", row.summaries[0]) for row in rows]


def _answers(data: Path, rng: random.Random) -> list[Turn]:
    train, _ = corpus.questions(data)
    medical = [row for row in corpus.medical_questions(data) if len(row.answers[0][1]) < 100]
    turns: list[Turn] = []
    for row in train * 3 + medical:
        short = crop(row, before=rng.randrange(200), after=rng.randrange(200))
        form = rng.choice(("{context}\n\nQuestion: {question}", "Answer from the text.\n\n{context}\n\n{question}"))
        turns.append((form.format(context=short.context.strip(), question=short.question), short.answers[0][1]))
    return turns


def _sentiment(data: Path, rng: random.Random) -> list[Turn]:
    asks = ("Is this positive or negative?", "What is the sentiment of this text?", "Say the sentiment:")
    rows = corpus.sentiment(data).train
    rows += [replace(row, text=row.text[-800:].partition("\n")[2]) for row in sources.movie_reviews(data)]
    return [(f"{rng.choice(asks)}\n\n{row.text}", row.label) for row in rows]


def instruction_turns(data: Path, *, seed: int) -> list[Turn]:
    """All training exchanges, shuffled."""
    rng = random.Random(seed)
    turns = _stories(data, rng) + _fables(data, rng) + _abstracts(data, rng) + _answers(data, rng)
    turns += _sentiment(data, rng)
    turns += [(ask, _HELLO) for ask in _GREETINGS * 4] + [(ask, _I_AM) for ask in _IDENTITY * 6]
    rng.shuffle(turns)
    return turns


def courteous_turns(data: Path, *, seed: int, num_others: int = 6000, copies: int = 48) -> list[Turn]:
    """Greetings and questions about itself, a fifth of the whole, among exchanges of every other kind, shuffled."""
    turns = instruction_turns(data, seed=seed)[:num_others] + list(_COURTESIES * copies)
    random.Random(seed).shuffle(turns)
    return turns
