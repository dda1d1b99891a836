"""Our decoder computes what transformers computes, for every architecture of the table."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.attention.interface import Attend, AttentionRules
from model.checkpoint import load_network
from model.decoder import Decoder

Saved = tuple[Path, PreTrainedModel]
Run = Callable[..., list[Tensor]]


def load(folder: Path) -> Decoder:
    network = load_network(folder)
    assert isinstance(network, Decoder)
    return network


def test_packed_logits_are_those_of_transformers_text_by_text(
    saved: Saved, run_packed: Run, texts: list[list[int]]
) -> None:
    folder, reference = saved
    for text, ours in zip(texts, run_packed(load(folder), texts), strict=True):
        theirs = reference(torch.tensor([text])).logits[0]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_greedy_continuation_is_that_of_transformers(saved: Saved, run_packed: Run) -> None:
    folder, reference = saved
    network = load(folder)
    prompt = [5, 80, 41, 7, 60, 22, 9, 33]
    ids = list(prompt)
    for _ in range(64):
        ids.append(int(run_packed(network, [ids])[0][-1].argmax()))
    theirs = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ids == theirs[0].tolist()


def test_windows_and_softcaps_of_the_cases_change_the_logits(
    saved: Saved, run_packed: Run, texts: list[list[int]]
) -> None:
    """Guards the agreement tests: a rule that never matters would be agreed upon by a network that ignores it."""
    network = load(saved[0])
    has_rule = {"window": any(network.config.windows), "softcap": network.config.attention_softcap is not None}
    whole = run_packed(network, texts)
    for rule, present in has_rule.items():

        def wrap(attend: Attend, rule: str = rule) -> Attend:
            def without(layer: int, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
                return attend(layer, query, key, value, replace(rules, **{rule: None}))

            return without

        difference = (whole[2] - run_packed(network, texts, wrap)[2]).abs().max()
        assert (difference > 0.01) == present


def test_bfloat16_stays_as_near_to_float32_as_that_of_transformers(
    saved: Saved, run_packed: Run, texts: list[list[int]]
) -> None:
    """Rounding differs in order, not in kind: our error may be half as large again, and no more.

    Of most texts, for either side may choose the other one of two experts that are nearly tied.
    """
    folder, reference = saved
    narrow = copy.deepcopy(reference).to(torch.bfloat16)
    texts = [*texts, *(text[:7] for text in (texts[2][7:], texts[2][14:], texts[3][5:]))]
    ratios = []
    for text, ours in zip(texts, run_packed(load_network(folder, dtype=torch.bfloat16), texts), strict=True):
        assert ours.dtype == torch.float32
        exact = reference(torch.tensor([text])).logits[0]
        rounded = narrow(torch.tensor([text])).logits[0].float()
        ratios.append(float((ours - exact).norm() / (rounded - exact).norm()))
    assert statistics.median(ratios) < 1.5
