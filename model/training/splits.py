"""What training never sees: held-out rows as ids in `splits/*.json`, never as copies of the text.

An id is a row's index in its file (novels: the book's name; XQuAD: the article's index). banking77, clinc150 and
SciTLDR keep their published test parts. `python -m model.training.splits DATA` writes the files once, from one seed;
everything else only reads them. Runs in the training process.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from model.training import sources

FOLDER = Path(__file__).parent / "splits"
HELD_OUT_BOOKS = (
    "Anon_Clara_1864",
    "Doyle_Hound_1902",
    "Hardy_Tess_1891",
    "Stevenson_Treasure_1883",
    "Woolf_Lighthouse_1927",
)


def held_out(name: str) -> Any:
    """The ids of one split file: "sentiment", "spam", "novels", "stories", "fables", "xquad", "sentence_pairs"."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def without(rows: list[Any], ids: list[int]) -> list[Any]:
    """`rows` without the held-out ones."""
    hidden = set(ids)
    return [row for index, row in enumerate(rows) if index not in hidden]


def normalized(text: str) -> str:
    """The form in which two texts count as the same, so that no duplicate of a held-out row stays in training."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def pair_texts(data: Path) -> dict[str, list[str]]:
    """The pools of held-out texts that `sentence_pairs.json` points into."""
    sentiment = held_out("sentiment")
    polarity, uci = sources.sentence_polarity(data), sources.uci_sentences(data)
    articles = sources.xquad(data)
    questions = [question for index in held_out("xquad") for question in articles[index]]
    abstracts = sources.scitldr(data, "test")
    return {
        "banking77": [row.text for row in sources.banking77(data, "test")],
        "clinc150": [row.text for row in sources.clinc150(data, "test")],
        "sentiment": [polarity[i].text for i in sentiment["sentence-polarity"]]
        + [uci[i].text for i in sentiment["uci-sentiment-sentences"]],
        "xquad-question": [question.question for question in questions],
        "xquad-paragraph": [question.context for question in questions],
        "scitldr-title": [abstract.title for abstract in abstracts],
        "scitldr-abstract": [abstract.document for abstract in abstracts],
    }


def _write(name: str, ids: Any) -> None:
    text = json.dumps(ids, indent=None if isinstance(ids, list) else 1)
    if isinstance(ids, dict):
        text = "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in ids.items()) + "\n}"
    (FOLDER / f"{name}.json").write_text(text + "\n")


def _sentence_pairs(data: Path, rng: random.Random) -> list[list[Any]]:
    """2,000 pairs [pool, id, pool, id]: some related (same intent, question and paragraph), the others at random."""
    pools = pair_texts(data)
    pairs: list[list[Any]] = []
    for name, rows in (("banking77", sources.banking77(data, "test")), ("clinc150", sources.clinc150(data, "test"))):
        by_label: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            by_label.setdefault(row.label, []).append(index)
        for _ in range(300):
            first, second = rng.sample(by_label[rng.choice(sorted(by_label))], 2)
            pairs.append([name, first, name, second])
            pairs.append([name, rng.randrange(len(rows)), name, rng.randrange(len(rows))])
    for short, long in (("xquad-question", "xquad-paragraph"), ("scitldr-title", "scitldr-abstract")):
        for _ in range(150):
            index = rng.randrange(len(pools[short]))
            pairs.append([short, index, long, index])
            pairs.append([short, rng.randrange(len(pools[short])), long, rng.randrange(len(pools[long]))])
    names = sorted(pools)
    while len(pairs) < 2000:
        first_pool, second_pool = rng.choice([("sentiment", "sentiment"), (rng.choice(names), rng.choice(names))])
        first, second = rng.randrange(len(pools[first_pool])), rng.randrange(len(pools[second_pool]))
        pairs.append([first_pool, first, second_pool, second])
    return pairs


def write_splits(data: Path, seed: int = 7) -> None:
    """Draw and write every split file."""
    rng = random.Random(seed)
    FOLDER.mkdir(exist_ok=True)
    polarity, uci = len(sources.sentence_polarity(data)), len(sources.uci_sentences(data))
    _write(
        "sentiment",
        {
            "sentence-polarity": sorted(rng.sample(range(polarity), 500)),
            "uci-sentiment-sentences": sorted(rng.sample(range(uci), 500)),
        },
    )
    messages = len(sources.sms_spam(data))
    _write("spam", sorted(rng.sample(range(messages), messages // 5)))
    _write("novels", list(HELD_OUT_BOOKS))
    _write("stories", sorted(rng.sample(range(len(sources.stories(data))), 100)))
    _write("fables", sorted(rng.sample(range(len(sources.fables(data))), 25)))
    _write("xquad", sorted(rng.sample(range(len(sources.xquad(data))), 16)))
    _write("sentence_pairs", _sentence_pairs(data, rng))


if __name__ == "__main__":
    write_splits(Path(sys.argv[1]))
