"""Whether a shadow gave what the original gave: numbers apart from rounding, sparse vectors by their entries."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service.engine.flight import EncodeFlight, EncodeRequest, encode_flight
from service.engine.protocol import EncodeInput, EncodeOutput, EncodeResult
from service.engine.shadow import agree
from tests.service.engine.faults.scripted import stub_model

MakeFlight = Callable[..., EncodeFlight]


@pytest.fixture
def make_flight(tmp_path: Path) -> MakeFlight:
    """make_flight(output, rows): a flight of one text that has got this; None: its own fault."""

    def make(output: EncodeOutput, rows: list[list[float]] | None) -> EncodeFlight:
        request = EncodeRequest(model="m@1", output=output, inputs=[EncodeInput(ids=[1])])
        flight = encode_flight(request, stub_model("m", tmp_path, "1"), 1)
        values = np.array(rows or [], dtype="<f4")
        fault = "not finite" if rows is None else None
        shape = list(values.shape) if rows is not None else []
        flight.results = [EncodeResult(request_id=1, index=0, shape=shape, data=values.tobytes(), error=fault)]
        return flight

    return make


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ([[5, 9], [0.5, 1.2501]], True),
        ([[5, 7, 9], [0.5, 0.0004, 1.25]], True),
        ([[2, 9, 11], [0.0002, 1.25, 0.0001]], False),
        ([[5, 9], [0.5, 1.3]], False),
        ([[5, 10], [0.5, 1.25]], False),
        ([[5], [0.5]], False),
        ([[5, 9, 12], [0.5, 1.25, 0.1]], False),
        ([[], []], False),
        (None, False),
    ],
)
def test_sparse_vectors_are_the_same_if_each_entry_is_and_what_is_missing_weighs_nothing(
    make_flight: MakeFlight, other: list[list[float]] | None, same: bool
) -> None:
    """An entry that rounding took to 0 made two vectors of other lengths, and so other ones."""
    original, shadow = make_flight("sparse_embedding", [[5, 9], [0.5, 1.25]]), make_flight("sparse_embedding", other)
    assert (agree(original, shadow), agree(shadow, original)) == (same, same)


@pytest.mark.parametrize("output", ["sparse_embedding", "embedding"])
def test_what_is_empty_or_failed_on_both_sides_is_the_same(make_flight: MakeFlight, output: EncodeOutput) -> None:
    for rows in ([[], []], None):
        assert agree(make_flight(output, rows), make_flight(output, rows))
    assert not agree(make_flight(output, [[], []]), make_flight(output, None))


def test_vectors_of_another_shape_are_not_the_same(make_flight: MakeFlight) -> None:
    one = make_flight("token_embeddings", [[1.0, 2.0]])
    assert agree(one, make_flight("token_embeddings", [[1.0, 2.0001]]))
    assert not agree(one, make_flight("token_embeddings", [[1.0], [2.0]]))
