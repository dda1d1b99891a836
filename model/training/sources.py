"""Readers of the open data sets: one function per set, from the files as they lie in the data folder to plain Python.

Every function takes the data folder and returns rows in the order of the file, so that an index names a row for ever;
the split files rely on that. What is held out, and what a text is used for, is decided elsewhere (`splits`, `corpus`).
Runs in the training process only; knows neither tensors nor tokens.
"""

import gzip
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One classification example."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Question:
    """One extractive question; `answers` are (first character, text) within `context`, empty when there is none."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Abstract:
    """One scientific abstract, sentence by sentence, with its reference summaries."""

    title: str
    document: str
    summaries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fable:
    """One fable and the lesson printed under it."""

    title: str
    text: str
    lesson: str


def read_text(path: Path) -> str:
    """The text of a file, gunzipped where its name ends in .gz."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_text(path).split("\n") if line.strip()]


def sentence_polarity(data: Path) -> list[LabelledText]:
    rows = read_jsonl(data / "sentence-polarity" / "rt-polarity.jsonl.gz")
    return [LabelledText(row["text"], "positive" if row["label"] else "negative") for row in rows]


def uci_sentences(data: Path) -> list[LabelledText]:
    rows = read_jsonl(data / "uci-sentiment-sentences" / "sentences.jsonl")
    return [LabelledText(row["text"], "positive" if row["label"] else "negative") for row in rows]


def movie_reviews(data: Path) -> list[LabelledText]:
    rows = read_jsonl(data / "movie-reviews" / "movie_reviews.jsonl.gz")
    return [LabelledText(row["text"], "positive" if row["label"] else "negative") for row in rows]


def banking77(data: Path, part: str) -> list[LabelledText]:
    """`part` is "train" or "test", as published."""
    name = "train.jsonl.gz" if part == "train" else "test.jsonl"
    return [LabelledText(row["text"], row["label"]) for row in read_jsonl(data / "banking77" / name)]


def clinc150(data: Path, part: str) -> list[LabelledText]:
    """`part` is "train", "val" or "test", out-of-scope rows left out."""
    rows = read_jsonl(data / "clinc150" / "data_full.jsonl.gz")
    return [LabelledText(row["text"], row["label"]) for row in rows if row["split"] == part]


def sms_spam(data: Path) -> list[LabelledText]:
    return [LabelledText(row["text"], row["label"]) for row in read_jsonl(data / "sms-spam" / "sms.jsonl.gz")]


def scitldr(data: Path, part: str) -> list[Abstract]:
    """`part` is "train", "dev" or "test", as published."""
    rows = read_jsonl(data / "scitldr" / f"{part}.jsonl.gz")
    return [Abstract(row["title"], row["document"], tuple(row["summaries"])) for row in rows]


def fables(data: Path) -> list[Fable]:
    rows = read_jsonl(data / "aesop-fables" / "aesop4children.jsonl")
    return [Fable(row["title"], row["text"], row["lesson"]) for row in rows]


def stories(data: Path) -> list[str]:
    return [row["text"] for row in read_jsonl(data / "tinystories-text" / "tinystories_stories.jsonl.gz")]


def story_excerpt(data: Path) -> list[str]:
    """The running excerpt, cut where a story's usual first words follow a newline (it has no separators)."""
    text = read_text(data / "tinystories-text" / "tinystories_valid_excerpt.txt.gz")
    return [part.strip() for part in re.split(r"\n(?=Once upon a time|One day, |There was once)", text) if part.strip()]


def novels(data: Path) -> dict[str, str]:
    """Book name (author_title_year) to text, sorted by name; lines are paragraphs."""
    books = {}
    with tarfile.open(data / "english-novels" / "95_english_novels.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".txt") else None
            if file is not None:
                text = file.read().decode("utf-8-sig").replace("\r\n", "\n")
                books[Path(member.name).stem] = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return dict(sorted(books.items()))


def wikitext(data: Path) -> list[str]:
    """Paragraphs of WikiText-2 valid and test with its token spacing undone; headings and `<unk>` lines left out."""
    lines: list[str] = []
    for part in ("valid", "test"):
        lines += read_text(data / "wikitext-2" / f"{part}.txt.gz").split("\n")
    kept = [line.strip() for line in lines if len(line) > 80 and not line.startswith(" =")]
    return [_join_tokens(line) for line in kept if line.count("<unk>") <= 2]


def _join_tokens(line: str) -> str:
    line = re.sub(r" @(.)@ ", r"\1", line.replace("<unk>", "it"))
    line = re.sub(r" ([,.;:!?%)\]]|'s|n't)(?= |$)", r"\1", line)
    line = re.sub(r"([(\[$]) ", r"\1", line)
    return re.sub(r'" ([^"]*?) "', r'"\1"', line)


def xquad(data: Path) -> list[list[Question]]:
    """English XQuAD: one list of questions per article, in file order."""
    return _squad(data / "xquad" / "xquad.en.json.gz")


def covid_qa(data: Path) -> list[list[Question]]:
    """COVID-QA: one list of questions per article; the contexts are whole papers."""
    return _squad(data / "covid-qa" / "200423_covidQA.json.gz")


def _squad(path: Path) -> list[list[Question]]:
    articles = json.loads(read_text(path))["data"]
    return [
        [
            Question(
                str(entry["id"]),
                entry["question"].strip(),
                paragraph["context"],
                tuple((answer["answer_start"], answer["text"]) for answer in entry["answers"]),
            )
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
        for article in articles
    ]


def english_sentences(data: Path) -> list[str]:
    """The distinct English sides of the Tatoeba pairs."""
    rows = read_text(data / "tatoeba-en-zh" / "en-zh.tsv.gz").lstrip("\ufeff").split("\n")
    return list(dict.fromkeys(row.split("\t")[0] for row in rows if row.strip()))


def prompts(data: Path) -> list[str]:
    """Questions and instructions people wrote: GSM8K, MT-bench, Vicuna, self-instruct."""
    folder = data / "prompts"
    found = [row["question"] for row in read_jsonl(folder / "gsm8k_train.jsonl.gz")]
    for name in ("mt_bench_question.jsonl", "vicuna_question.jsonl"):
        found += [turn for row in read_jsonl(folder / name) for turn in row["turns"]]
    for name in ("self_instruct_seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        found += [row["instruction"] for row in read_jsonl(folder / name)]
    return found


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z0-9])|\n+")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|vs|etc|e\.g|i\.e|Fig|No|al)\.|\b[A-Z]\.)$")


def split_sentences(text: str) -> list[str]:
    """Sentences of a running text, by punctuation followed by a capital; common abbreviations do not end one."""
    sentences: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if "\n" not in match.group() and _ABBREVIATION.search(text[start : match.start()]):
            continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]
