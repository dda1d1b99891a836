"""The reference against PyTorch's own attention and against formulas written out here."""

import math

import pytest
import torch

from model.attention.interface import AttentionRules
from model.attention.reference import ReferenceAttention, attend_one


def test_plain_causal_attention_is_pytorch_attention(make_packed):
    query, key, value, layout = make_packed([9])
    found = ReferenceAttention().packed(query, key, value, layout, AttentionRules(scale=0.25))
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(found, expected[0].transpose(0, 1))


def test_every_rule_is_its_formula(rules, make_packed):
    """Scalar loops over one head and one query: the definitions of the interface, word by word."""
    query, key, value, _ = make_packed([12])
    found = attend_one(query, key, value, rules, first_position=0)
    for head in (0, 5):
        for i in (0, 4, 11):
            scores = {}
            for j in range(12):
                if rules.causal and j > i:
                    continue
                if rules.window is not None and (j <= i - rules.window or j >= i + rules.window):
                    continue
                score = float(query[i, head] @ key[j, head // 3]) * rules.scale
                if rules.softcap is not None:
                    score = rules.softcap * math.tanh(score / rules.softcap)
                if rules.alibi_slopes is not None:
                    score += float(rules.alibi_slopes[head]) * (j - i)
                if rules.relative_bias is not None:
                    score += float(rules.relative_bias[head, max(-5, min(5, j - i)) + 5])
                scores[j] = score
            total = sum(math.exp(score) for score in scores.values())
            if rules.sinks is not None:
                total += math.exp(float(rules.sinks[head]))
            expected = sum(math.exp(score) / total * value[j, head // 3] for j, score in scores.items())
            torch.testing.assert_close(found[i, head], expected)


@pytest.mark.parametrize("rows", [[(9, 9)], [(1, 9), (4, 13), (3, 3)]])
def test_paged_is_the_same_as_contiguous(rules, make_paged, rows):
    query, cache, layout = make_paged(rows)
    found = ReferenceAttention().paged(query, cache.keys[0], cache.values[0], layout, rules)
    start = 0
    for row, (queries, context) in enumerate(rows):
        key, value = (
            torch.stack([t[layout.block_tables[row, p // 4], p % 4] for p in range(context)])
            for t in (cache.keys[0], cache.values[0])
        )
        part = query[start : start + queries]
        expected = attend_one(part, key, value, rules, first_position=context - queries)
        torch.testing.assert_close(found[start : start + queries], expected)
        start += queries
