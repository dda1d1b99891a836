"""Which labels speak of sentiment, and what they say."""

import pytest

from model.sentiment_labels import unnamed_valences, valences


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["NEGATIVE", "POSITIVE"], (-1, 1)),
        (["positive", "neutral", "negative"], (1, 0, -1)),
        (["POS", "NEU", "NEG"], (1, 0, -1)),
        (["LABEL_POSITIVE", "label negative"], (1, -1)),
        (["Very Negative", "Negative", "Neutral", "Positive", "Very Positive"], (-1, -0.5, 0, 0.5, 1)),
        (["5 stars", "4 stars", "3 stars", "2 stars", "1 star"], (1, 0.5, 0, -0.5, -1)),
        (["1", "2", "3", "4", "5"], (-1, -0.5, 0, 0.5, 1)),
        (["-1", "0", "1"], (-1, 0, 1)),
        (["slightly_negative", "negative", "positive"], (-0.5, -1, 1)),
        (["bearish", "bullish"], (-1, 1)),
        (["positive sentiment", "negative sentiment"], (1, -1)),
    ],
)
def test_labels_of_sentiment_have_valences(labels: list[str], expected: tuple[float, ...]) -> None:
    assert valences(labels) == expected


@pytest.mark.parametrize(
    "labels",
    [
        ["ham", "spam"], ["LABEL_0", "LABEL_1"], ["positive", "other"], ["neutral", "positive"], [], [""], ["1", "2"],
        ["contradiction", "neutral", "entailment"], ["not positive", "positive"], ["1 star", "1 star"],
    ],
)  # fmt: skip
def test_other_labels_have_none(labels: list[str]) -> None:
    assert valences(labels) is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["LABEL_0", "LABEL_1"], (-1, 1)),
        (["LABEL_0", "LABEL_1", "LABEL_2"], (-1, 0, 1)),
        (["0", "1"], (-1, 1)),
        ([f"LABEL_{n}" for n in range(5)], (-1, -0.5, 0, 0.5, 1)),
        ([f"LABEL_{n}" for n in range(4)], None),
        (["LABEL_1", "LABEL_0"], None),
        (["LABEL_0", "spam"], None),
        (["LABEL_0"], None),
    ],
)
def test_unnamed_outputs_go_from_negative_to_positive(labels: list[str], expected: tuple[float, ...] | None) -> None:
    assert unnamed_valences(labels) == expected
