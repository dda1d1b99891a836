"""Loading is shown once per tenth in a log, and as one bar per checkpoint on a terminal."""

import logging

from service.engine.protocol import Loading
from service.load_progress import LoadProgress


def test_log_has_a_line_per_tenth_and_checkpoint(caplog):
    progress = LoadProgress(on_terminal=False)
    with caplog.at_level(logging.INFO):
        for done in range(0, 1001, 5):
            progress(Loading("a@1", done, 1000))
        progress(Loading("b@1", 0, 10))
    assert [(record.model, record.percent) for record in caplog.records] == [
        *[("a@1", percent) for percent in range(0, 101, 10)],
        ("b@1", 0),
    ]


def test_an_empty_checkpoint_does_not_divide_by_zero(caplog):
    with caplog.at_level(logging.INFO):
        LoadProgress(on_terminal=False)(Loading("a@1", 0, 0))
    assert len(caplog.records) == 1


def test_bar_is_drawn_to_its_end_and_a_reload_draws_a_new_one(capsys):
    progress = LoadProgress(on_terminal=True)
    for _ in range(2):
        for done in (0, 512, 1024):
            progress(Loading("a@1", done, 1024))
    drawn = capsys.readouterr().err
    assert drawn.count("a@1: 100%") == 2
