"""Held-out rows stay out of training."""

from model.training import corpus, sources
from model.training.splits import held_out, normalized, pair_texts


def test_no_held_out_sentence_is_trained_on_even_as_a_duplicate(data):
    for parts in (corpus.sentiment(data), corpus.intents(data), corpus.spam(data)):
        assert not {normalized(row.text) for row in parts.train} & {normalized(row.text) for row in parts.test}
    assert len(corpus.sentiment(data).test) == 1000


def test_held_out_books_articles_and_fables_are_apart(data):
    train, test = corpus.questions(data)
    assert not {row.context for row in train} & {row.context for row in test}
    assert set(held_out("novels")) <= set(sources.novels(data))
    fables, unseen = corpus.fables(data)
    assert len(fables) + len(unseen) == 146


def test_every_sentence_pair_points_at_a_text(data):
    pools = pair_texts(data)
    pairs = held_out("sentence_pairs")
    assert len(pairs) == 2000
    assert all(pools[first][i] and pools[second][j] for first, i, second, j in pairs)
