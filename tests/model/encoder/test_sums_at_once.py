"""Sums of texts in one pass, as on a GPU, against sums text by text."""

import pytest
import torch

from model.pooling import Span, _sum, _sum_at_once

HIDDEN = torch.randn((20, 6), generator=torch.Generator().manual_seed(1))
TEXTS = {
    "all in order": [Span(0, 5), Span(5, 6), Span(6, 20)],
    "some of them": [Span(5, 6), Span(9, 14)],
    "prompts left out": [Span(0, 5, 2), Span(5, 20, 1)],
    "nothing but a prompt": [Span(0, 5, 5), Span(5, 20)],
}


@pytest.mark.parametrize("spans", TEXTS.values(), ids=TEXTS.keys())
def test_sums_are_the_same(spans):
    torch.testing.assert_close(_sum_at_once(HIDDEN, spans), _sum(HIDDEN, spans))
