"""Beam search against `transformers`: on random tables of log-probabilities, and on a tiny T5 and a tiny BART."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

from model.batch import BeamParams
from service.engine.beam_search import BeamSearch, num_beam_candidates

START = 1
NUM_SEARCHES = int(os.environ.get("HISTORIES", "100"))

Scores = Callable[[list[int]], torch.Tensor]
"""The log-probabilities [V] after the given ids, rules applied."""


class Table(PreTrainedModel, GenerationMixin):
    """A "model" whose logits after some ids are random numbers seeded by them."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, config: PretrainedConfig, seed: int, spread: float, favoured: tuple[int, ...]) -> None:
        super().__init__(config)
        self.seed = seed
        self.spread = spread
        self.favoured = list(favoured)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.num_steps = 0

    def logits(self, ids: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *ids)) % 2**32)
        logits = torch.randn(self.config.vocab_size, generator=generator) * self.spread
        logits[self.favoured] += 2 * self.spread
        return logits

    def forward(self, input_ids: torch.Tensor, **unused: Any) -> CausalLMOutput:
        self.num_steps += 1
        rows = [self.logits(row) for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.stack(rows)[:, None, :])

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: Any = None, **unused: Any
    ) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}


def search(params: BeamParams, *, eos_ids: tuple[int, ...], max_tokens: int, scores: Scores) -> tuple[list[int], int]:
    """Our search over whole hypotheses, with the rows that it asks for: its answer and its number of steps."""
    beams = BeamSearch(params, eos_ids=eos_ids, max_tokens=max_tokens)
    hypotheses: list[list[int]] = [[]]
    num_steps = 0
    while not beams.is_done:
        num_steps += 1
        candidates = []
        for hypothesis in hypotheses:
            row = scores(hypothesis)
            top = torch.topk(row, min(num_beam_candidates(params.num_beams, len(eos_ids)), len(row)))
            candidates.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        hypotheses = [[*hypotheses[row], token] for row, token in beams.advance(candidates)]
    return beams.best, num_steps


def ruled(row: torch.Tensor, num_generated: int, rules: dict[str, Any], eos_ids: tuple[int, ...]) -> torch.Tensor:
    """The generation rules that a runner applies to log-probabilities before it picks candidates."""
    row = row.clone()
    if num_generated < (rules.get("min_new_tokens") or 0):
        row[list(eos_ids)] = -torch.inf
    forced = rules.get("forced_bos_token_id") if num_generated == 0 else None
    if num_generated == rules["max_new_tokens"] - 1 and rules.get("forced_eos_token_id") is not None:
        forced = rules["forced_eos_token_id"]
    if forced is not None:
        row[:] = -torch.inf
        row[forced] = 0.0
    return row


beam_params = st.builds(
    BeamParams,
    num_beams=st.integers(2, 5),
    length_penalty=st.sampled_from([1.0, 0.0, -1.0, 2.0, 0.6]),
    early_stopping=st.sampled_from([True, False, "never"]),
)


@pytest.mark.slow
@settings(max_examples=NUM_SEARCHES, deadline=None, database=None, phases=(Phase.generate, Phase.shrink))
@given(
    params=beam_params,
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([16, 24, 40]),
    spread=st.sampled_from([0.3, 1.0, 4.0]),
    eos_ids=st.sampled_from([(2,), (2, 3)]),
    favours_eos=st.booleans(),
    max_tokens=st.integers(1, 10),
    min_tokens=st.sampled_from([None, 3]),
    forced_bos=st.sampled_from([None, None, 5]),
    forced_eos=st.sampled_from([None, None, 2]),
)
def test_search_on_random_tables_equals_transformers(
    params: BeamParams,
    seed: int,
    vocab_size: int,
    spread: float,
    eos_ids: tuple[int, ...],
    favours_eos: bool,
    max_tokens: int,
    min_tokens: int | None,
    forced_bos: int | None,
    forced_eos: int | None,
) -> None:
    table = Table(PretrainedConfig(vocab_size=vocab_size), seed, spread, eos_ids if favours_eos else ())
    rules = {
        "max_new_tokens": max_tokens,
        "min_new_tokens": min_tokens and min(min_tokens, max_tokens),
        "forced_bos_token_id": forced_bos,
        "forced_eos_token_id": forced_eos,
    }
    expected = table.generate(
        torch.tensor([[START]]),
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        num_beams=params.num_beams,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        use_cache=False,
        eos_token_id=list(eos_ids),
        pad_token_id=0,
        **rules,
    )

    def scores(hypothesis: list[int]) -> torch.Tensor:
        row = torch.log_softmax(table.logits([START, *hypothesis]), dim=-1)
        return ruled(row, len(hypothesis), rules, eos_ids)

    found = search(params, eos_ids=eos_ids, max_tokens=max_tokens, scores=scores)
    assert found == (expected[0, 1:].tolist(), table.num_steps)


def tiny_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def tiny_bart() -> PreTrainedModel:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=48,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            init_std=0.5,
        )
    )


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_bart])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 2.0, -1.0])
def test_search_over_a_tiny_network_equals_transformers(
    make_model: Callable[[], PreTrainedModel], early_stopping: Any, length_penalty: float
) -> None:
    network = make_model().eval()
    params = BeamParams(num_beams=4, length_penalty=length_penalty, early_stopping=early_stopping)
    eos = network.config.eos_token_id
    rules = {"max_new_tokens": 9, "forced_eos_token_id": network.generation_config.forced_eos_token_id}
    for source in ([5, 6, 7, 8, 1], [9, 9, 1], [11, 3, 40, 41, 42, 1]):
        ids = torch.tensor([source])
        expected = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=params.num_beams,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            do_sample=False,
            **rules,
        )

        def scores(hypothesis: list[int], ids: torch.Tensor = ids) -> torch.Tensor:
            decoder_ids = torch.tensor([[network.config.decoder_start_token_id, *hypothesis]])
            with torch.no_grad():
                logits = network(input_ids=ids, decoder_input_ids=decoder_ids).logits[0, -1]
            return ruled(torch.log_softmax(logits, dim=-1), len(hypothesis), rules, (eos,))

        found, _ = search(params, eos_ids=(eos,), max_tokens=9, scores=scores)
        assert found == expected[0, 1:].tolist()
