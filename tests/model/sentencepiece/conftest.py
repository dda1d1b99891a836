"""Small SentencePiece models, trained in the test, and texts to try them on."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

SENTENCES = """The lion and the mouse lived in the forest by the river, and the mouse was small.
A crow, half-dead with thirst, came upon a pitcher which had once been full of water.
The tortoise never stopped for a moment; slow and steady wins the race.
"What a pity," said the fox, "that so fine a bird should have no voice!"
In 1912, 42% of the 1,000 houses were built of stone & wood; the rest were not.
An old man on the point of death summoned his sons around him to give them some parting advice.
Der Löwe und die Maus lebten im Wald am Fluss, und die Maus war klein.
Ein alter Mann rief seine Söhne zu sich, um ihnen einen Rat zu geben.
Le lion et la souris vivaient dans la forêt près de la rivière, où l'eau était fraîche.
Çà et là, un œil naïf apercevait le garçon; c'était déjà l'été.
Лев и мышь жили в лесу у реки, и мышь была маленькая.
Старик позвал своих сыновей, чтобы дать им совет.
狮子和老鼠住在河边的森林里，老鼠很小。
日本語のテキスト、これは試験です。カラスは水を飲みました。
""".splitlines()

TRICKY = [
    "",
    " ",
    "  two  spaces   inside  ",
    " one before",
    "tab\tand\nnew line",
    "½ ﬁ ﬀ Ａ ﷺ e\u0301te",
    "emoji 😀😀 ß zzzqqq",
    "a▁b ▁▁",
    "x" * 60,
    "100,000.5%...",
    "\n line end \n",
    "\u00a0non-breaking\u00a0",
]


@pytest.fixture
def texts() -> list[str]:
    return SENTENCES + TRICKY + ["".join(pair) for pair in zip(SENTENCES, SENTENCES[3:], strict=False)]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """`train(name="x.model", **options)` gives the file of a freshly trained model."""

    def run(name: str = "spiece.model", *, sentences: list[str] = SENTENCES, **options: Any) -> Path:
        settings = {"vocab_size": 330, "hard_vocab_limit": False, "character_coverage": 1.0, "num_threads": 1}
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences * 3), model_writer=written, minloglevel=2, **(settings | options)
        )
        path = tmp_path / name
        path.write_bytes(written.getvalue())
        return path

    return run


@pytest.fixture
def make_folder(train: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`make_folder(model_type, file, training, **config)`: a folder with a freshly trained model and no tokenizer.json.

    `training` are options of the trainer, `config` is what tokenizer_config.json holds.
    """

    def make(model_type: str, file: str, training: dict[str, Any], **config: Any) -> Path:
        train(file, **training)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make
