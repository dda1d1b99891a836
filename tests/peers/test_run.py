"""What `make bench-peers` measures when it is asked for nothing in particular."""

import pytest

from service.bench.shapes import SHAPES
from tests.peers.cells import REQUESTS, embedding_cells, generation_cells
from tests.peers.checkpoints import ENCODERS
from tests.peers.run import _parser


def test_every_shape_that_is_measured_has_loads() -> None:
    options = _parser().parse_args([])
    assert set(options.shapes) == {*REQUESTS, *ENCODERS}
    for shape in options.shapes:
        if shape in ENCODERS:
            cells = embedding_cells(shape, clients=options.clients, seconds=options.seconds)
        else:
            assert shape in SHAPES
            cells = generation_cells(
                shape, streams=options.streams, prompts=options.prompts, output_tokens=options.output_tokens
            )
        assert {cell.streams for cell in cells} == set(options.clients if shape in ENCODERS else options.streams)


@pytest.mark.parametrize("option", ["--shapes", "--precisions"])
def test_what_is_not_known_is_not_measured_under_its_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args([option, "minilm-l6,bf16"])
    assert "'minilm-l6' is none of " in capsys.readouterr().err
