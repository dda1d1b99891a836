"""The sampler against transformers' logits processors, against formulas, and against statistics."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation import logits_process as hf

from model.batch import BeamParams, Row, RowOutput, SamplingParams
from model.candidates import Filters, choose, choose_among_all
from model.noise import uniforms
from model.sampling import Masks, Sampler

V = 60


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """`make_row(number, output_ids=[...], temperature=...)`"""

    def make(number: int = 0, output_ids: list[int] | None = None, prompt_ids: list[int] | None = None, **more: Any):
        sampling = SamplingParams(**{"max_tokens": 50, **more})
        return Row(number, [1], 0, [0], sampling, True, output_ids or [], prompt_ids or [1, 2, 3])

    return make


@pytest.fixture
def logits() -> Tensor:
    return torch.randn((8, V), generator=torch.Generator().manual_seed(2)) * 3


def scores_after(row: Row, logits: Tensor, *, renormalize: bool = False) -> Tensor:
    """What the sampler's rules make of one row of logits, seen through the log-probabilities of a wide beam."""
    changed = Row(**{name: getattr(row, name) for name in Row.__slots__})
    changed.sampling = SamplingParams(
        **{name: getattr(row.sampling, name) for name in SamplingParams.__slots__ if name != "beam"},
        beam=BeamParams(num_beams=V, renormalize_logits=renormalize),
    )
    (found,) = Sampler(V).sample(logits[None].clone(), [changed])
    assert found.beam_candidates is not None
    scores = torch.full((V,), math.nan)
    for token, score in found.beam_candidates:
        scores[token] = score
    return scores


def test_greedy_takes_the_lowest_id_of_the_largest(make_row):
    logits = torch.zeros((2, V))
    logits[0, [7, 30]] = 1.0
    found = Sampler(V).sample(logits, [make_row(0), make_row(1)])
    assert [output.token_id for output in found] == [7, 0]


PROCESSORS = {
    "repetition": ({"repetition_penalty": 1.7}, lambda: hf.RepetitionPenaltyLogitsProcessor(1.7)),
    "repetition below one": ({"repetition_penalty": 0.6}, lambda: hf.RepetitionPenaltyLogitsProcessor(0.6)),
    "bias": (
        {"logit_bias": {4: 2.5, 9: -100.0}},
        lambda: hf.SequenceBiasLogitsProcessor({(4,): 2.5, (9,): -100.0}),
    ),
    "suppressed": ({"suppressed_ids": (5, 6)}, lambda: hf.SuppressTokensLogitsProcessor([5, 6], device="cpu")),
    "min tokens": (
        {"min_tokens": 9, "stop_ids": (2, 8)},
        lambda: hf.MinNewTokensLengthLogitsProcessor(3, 9, [2, 8], device="cpu"),
    ),
    "min tokens reached": (
        {"min_tokens": 8, "stop_ids": (2, 8)},
        lambda: hf.MinNewTokensLengthLogitsProcessor(3, 8, [2, 8], device="cpu"),
    ),
    "no repeated 2-gram": ({"no_repeat_ngram_size": 2}, lambda: hf.NoRepeatNGramLogitsProcessor(2)),
    "no repeated 3-gram": ({"no_repeat_ngram_size": 3}, lambda: hf.NoRepeatNGramLogitsProcessor(3)),
    "no repeated token": ({"no_repeat_ngram_size": 1}, lambda: hf.NoRepeatNGramLogitsProcessor(1)),
    "n-gram longer than the text": ({"no_repeat_ngram_size": 40}, lambda: hf.NoRepeatNGramLogitsProcessor(40)),
    "banned sequences": (
        {"banned_sequences": ((5,), (3, 9, 7), (9, 20), (20, 3), (3, 3, 9, 11))},
        lambda: hf.NoBadWordsLogitsProcessor([[5], [3, 9, 7], [9, 20], [20, 3], [3, 3, 9, 11]], eos_token_id=[1]),
    ),
    "forced last": ({"forced_eos_id": 7, "max_tokens": 9}, lambda: hf.ForcedEOSTokenLogitsProcessor(12, 7, "cpu")),
    "forced last, not yet": (
        {"forced_eos_id": 7, "max_tokens": 10},
        lambda: hf.ForcedEOSTokenLogitsProcessor(13, 7, "cpu"),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_rule_is_that_of_transformers(name, make_row, logits):
    params, processor = PROCESSORS[name]
    row = make_row(output_ids=[3, 9, 3, 9, 20, 3, 3, 9], **params)
    found = scores_after(row, logits[0])
    ids = torch.tensor([row.prompt_ids + row.output_ids])
    torch.testing.assert_close(found, processor()(ids, logits[:1].log_softmax(dim=1))[0])


SOURCE = [9, 4, 3, 9, 8, 20, 3, 9, 30, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 40])
def test_what_is_in_the_source_is_not_repeated_beside_what_the_text_itself_has(size, make_row, logits):
    row = make_row(output_ids=[3, 9, 20, 3, 9], encoder_no_repeat_ngram_size=size, no_repeat_ngram_size=2)
    row.encoder_ids = SOURCE
    ids = torch.tensor([row.prompt_ids + row.output_ids])
    expected = logits[:1].log_softmax(dim=1)
    for processor in (
        hf.EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor([SOURCE])),
        hf.NoRepeatNGramLogitsProcessor(2),
    ):
        expected = processor(ids, expected)
    torch.testing.assert_close(scores_after(row, logits[0]), expected[0])


def test_scores_of_beams_sum_to_one_again_where_the_checkpoint_asks_for_it(make_row, logits):
    """`renormalize_logits` of Marian's checkpoints was read by nobody."""
    row = make_row(suppressed_ids=tuple(range(3, 40)))
    ids = torch.tensor([row.prompt_ids])
    masked = hf.SuppressTokensLogitsProcessor(range(3, 40), device="cpu")(ids, logits[:1].log_softmax(dim=1))
    torch.testing.assert_close(scores_after(row, logits[0], renormalize=True), hf.LogitNormalization()(ids, masked)[0])
    torch.testing.assert_close(scores_after(row, logits[0]), masked[0])


def test_the_first_token_can_be_forced(make_row, logits):
    row = make_row(prompt_ids=[2], forced_bos_id=11)
    expected = hf.ForcedBOSTokenLogitsProcessor(11)(torch.tensor([[2]]), logits[:1].log_softmax(dim=1))[0]
    torch.testing.assert_close(scores_after(row, logits[0]), expected)
    assert Sampler(V).sample(logits[:1].clone(), [make_row(temperature=1.0, forced_bos_id=11)])[0].token_id == 11
    later = make_row(output_ids=[4], forced_bos_id=11)
    torch.testing.assert_close(scores_after(later, logits[0]), logits[0].log_softmax(dim=0))


def test_a_banned_sequence_may_begin_in_the_prompt_and_be_longer_than_the_text(make_row, logits):
    row = make_row(
        prompt_ids=[6, 3], output_ids=[9], banned_sequences=((3, 9, 7), (6, 3, 9, 8), (1, 6, 3, 9, 2), (9, V))
    )
    expected = logits[0].log_softmax(dim=0)
    expected[[7, 8]] = -torch.inf
    torch.testing.assert_close(scores_after(row, logits[0]), expected)


def test_where_some_ids_are_allowed_no_other_is_sampled(make_row, logits):
    row = make_row(allowed_ids=(4, 9, V + 3), suppressed_ids=(9,), logit_bias={20: 100.0})
    scores = scores_after(row, logits[0])
    assert scores.isfinite().nonzero().flatten().tolist() == [4]
    rows = [make_row(n, temperature=2.0, seed=n, allowed_ids=(4, 9)) for n in range(2)] + [make_row(2)]
    free = Sampler(V).sample(logits[:1].clone(), [make_row(2)])[0].token_id
    found = [output.token_id for output in Sampler(V).sample(logits[:1].repeat(3, 1), rows)]
    assert {*found[:2]} <= {4, 9}
    assert found[2] == free


def test_all_rules_together_act_in_the_order_of_transformers(make_row, logits):
    row = make_row(
        output_ids=[3, 9, 3, 9, 20, 3, 3, 9],
        logit_bias={3: 5.0, 20: 1.5},
        repetition_penalty=1.4,
        no_repeat_ngram_size=2,
        min_tokens=20,
        stop_ids=(4,),
        suppressed_ids=(8,),
    )
    ids = torch.tensor([row.prompt_ids + row.output_ids])
    expected = hf.LogitsProcessorList(
        [
            hf.SequenceBiasLogitsProcessor({(3,): 5.0, (20,): 1.5}),
            hf.RepetitionPenaltyLogitsProcessor(1.4),
            hf.NoRepeatNGramLogitsProcessor(2),
            hf.MinNewTokensLengthLogitsProcessor(3, 20, [4], device="cpu"),
            hf.SuppressTokensLogitsProcessor([8], device="cpu"),
        ]
    )(ids, logits[:1].log_softmax(dim=1))[0]
    torch.testing.assert_close(scores_after(row, logits[0]), expected)


def test_presence_and_frequency_count_the_output_alone(make_row, logits):
    """OpenAI: logit -= count * frequency + (count > 0) * presence; the prompt does not count."""
    row = make_row(output_ids=[3, 9, 3], prompt_ids=[5, 5, 9], presence_penalty=0.7, frequency_penalty=0.3)
    expected = logits[0].log_softmax(dim=0)
    expected[3] -= 2 * 0.3 + 0.7
    expected[9] -= 0.3 + 0.7
    torch.testing.assert_close(scores_after(row, logits[0]), expected)


def test_penalties_kept_from_step_to_step_are_those_counted_afresh(make_row, logits):
    """Rows grow, leave, come back and change places; the sampler must never count what is not there."""
    random = np.random.default_rng(0)
    sampler, outputs = Sampler(V), {number: [] for number in range(8)}
    for step in range(60):
        if step % 4 == 0:
            present = random.permutation(8)[: random.integers(1, 9)]
        rows = [
            make_row(
                int(n), list(outputs[n]), [int(n), 9], repetition_penalty=1.0 + n / 10, frequency_penalty=n % 3 * 0.2
            )
            for n in present
        ]
        values = torch.randn((len(rows), V), generator=torch.Generator().manual_seed(step))
        kept = sampler.sample(values.clone(), rows)
        fresh = [Sampler(V).sample(values[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
        assert [output.token_id for output in kept] == [output.token_id for output in fresh]
        for n in present:
            outputs[n].append(int(random.integers(0, 12)))


FILTERS = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 2.5},
    "top k": {"temperature": 1.0, "top_k": 5},
    "top k of all": {"temperature": 1.0, "top_k": 1000},
    "top p": {"temperature": 1.0, "top_p": 0.7},
    "nothing but the best": {"temperature": 1.0, "top_p": 0.0},
    "min p": {"temperature": 1.2, "min_p": 0.1},
    "all": {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


def warped(params: dict[str, float], logits: Tensor) -> Tensor:
    """The distribution that transformers samples from, [R, V]."""
    ids = torch.zeros((len(logits), 1), dtype=torch.int64)
    warpers: list[Any] = [hf.TemperatureLogitsWarper(params["temperature"])]
    if "top_k" in params:
        warpers.append(hf.TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        warpers.append(hf.TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(hf.MinPLogitsWarper(params["min_p"]))
    return hf.LogitsProcessorList(warpers)(ids, logits).softmax(dim=1)


@pytest.mark.parametrize("name", FILTERS)
def test_sampled_tokens_follow_the_distribution_of_transformers(name, make_row, logits):
    """Chi-square over 4,000 seeds: fixed, so it passes always or never."""
    params, draws = FILTERS[name], 4000
    expected = warped(params, logits[:1])[0].double().numpy()
    expected /= expected.sum()
    rows = [make_row(seed, seed=seed, **params) for seed in range(draws)]
    found = Sampler(V).sample(logits[:1].repeat(draws, 1), rows)
    counts = np.bincount([output.token_id for output in found], minlength=V)
    assert not counts[expected == 0].any()
    # Cells of at least five expected draws, the rest together, as the test's approximation asks.
    common = expected * draws >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    if len(wanted[wanted > 0]) > 1:
        assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 0.001


def by_definition(probabilities: np.ndarray, noise: float) -> int:
    """Inverse of the distribution sorted by probability, the likeliest first, equal ones by id."""
    order = np.lexsort((np.arange(len(probabilities)), -probabilities))
    cumulated = np.cumsum(probabilities[order])
    return int(order[np.searchsorted(cumulated, noise * cumulated[-1], side="right")])


@pytest.mark.parametrize("vocab_size", [60, 5000, 40000])
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_the_token_is_the_inverse_of_the_sorted_distribution_at_the_noise(vocab_size, spread, make_row):
    """Flat and peaked rows, so that few, many and all candidates have to be looked at."""
    logits = torch.randn((24, vocab_size), generator=torch.Generator().manual_seed(0)) * spread
    rows = [make_row(i, [1] * i, seed=i * 31, temperature=1.0, top_k=(0, 7, 900)[i % 3]) for i in range(24)]
    found = Sampler(vocab_size).sample(logits.clone(), rows)
    noise = uniforms(np.arange(24, dtype=np.uint64) * 31, np.arange(24, dtype=np.uint64))
    for i, output in enumerate(found):
        probabilities = logits[i].double().softmax(dim=0).numpy()
        top_k = rows[i].sampling.top_k
        if 0 < top_k < vocab_size:
            probabilities[probabilities < np.sort(probabilities)[-top_k]] = 0
        assert output.token_id == by_definition(probabilities, float(noise[i]))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [60, 3000])
def test_few_candidates_all_sorted_and_all_by_classes_give_the_same_token(name, size):
    """Three ways to one law; the first may decline, and then says so."""
    params, rows = FILTERS[name], 200
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn((rows, size), generator=generator) * torch.linspace(0, 4, rows)[:, None]
    logits[::3] = logits[::3].round()  # many equal weights
    weights = ((logits - logits.amax(1, keepdim=True)) / params["temperature"]).exp()
    noise = torch.from_numpy(uniforms(np.arange(rows, dtype=np.uint64), np.zeros(rows, np.uint64)))
    filters = Filters(
        torch.full((rows,), int(params.get("top_k", 0))),
        torch.full((rows,), params.get("top_p", 1.0), dtype=torch.float64),
        torch.full((rows,), params.get("min_p", 0.0), dtype=torch.float64),
    )
    everything = choose(weights, noise, filters, size)
    assert everything.decided.all()
    assert torch.equal(choose_among_all(weights, noise, filters), everything.tokens)
    few = choose(weights, noise, filters, 20)
    assert torch.equal(few.tokens[few.decided], everything.tokens[few.decided])
    assert few.decided.any() or params.get("top_k", 0) > 20


def test_equal_logits_are_taken_in_the_order_of_their_ids(make_row):
    """Also where so many are equal that the first candidates cannot hold them all."""
    size = 3000
    rows = [make_row(i, seed=i, temperature=1.0) for i in range(50)]
    found = Sampler(size).sample(torch.zeros((50, size)), rows)
    noise = uniforms(np.arange(50, dtype=np.uint64), np.zeros(50, np.uint64))
    assert [output.token_id for output in found] == [int(u * size) for u in noise]


def test_a_row_does_not_depend_on_its_neighbours(make_row):
    """Bitwise: the same logits and parameters give the same token in every company."""
    size, count = 20000, 40
    logits = torch.randn((count, size), generator=torch.Generator().manual_seed(4)) * 2
    rows = [
        make_row(
            i,
            [5] * (i % 7),
            seed=i,
            temperature=(0.0, 0.8, 1.5)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 20, 2000)[i // 2 % 3],
            repetition_penalty=(1.0, 1.3)[i // 3 % 2],
            logprobs=(None, 2)[i // 4 % 2],
        )
        for i in range(count)
    ]
    together = Sampler(size).sample(logits.clone(), rows)
    for i in range(count):
        assert Sampler(size).sample(logits[i : i + 1].clone(), [rows[i]]) == [together[i]]


def test_rows_without_a_sound_logit_fail_alone(make_row, logits):
    values = logits[:6].clone()
    values[0, 3], values[1, 4], values[2] = math.nan, math.inf, math.nan
    rows = [make_row(i, temperature=i % 2, seed=1, logprobs=1) for i in range(5)]
    rows.append(make_row(5, suppressed_ids=tuple(range(V))))
    found = Sampler(V).sample(values, rows)
    assert ["finite" in (output.error or "") for output in found] == [True, True, True, False, False, False]
    assert "no token is allowed" in found[5].error
    assert all(output.token_id is None and output.logprobs is None for output in (*found[:3], found[5]))
    alone = Sampler(V).sample(logits[3:5].clone(), rows[3:5])
    assert found[3:5] == alone


def test_logprobs_are_the_log_softmax_before_all_changes(make_row, logits):
    rows = [make_row(i, temperature=i, seed=3, logit_bias={7: 4.0}, logprobs=(None, 0, 3, 5)[i % 4]) for i in range(8)]
    found: list[RowOutput] = Sampler(V).sample(logits.clone(), rows)
    scores = logits.log_softmax(dim=1)
    for i, output in enumerate(found):
        wanted = rows[i].sampling.logprobs
        if wanted is None:
            assert output.logprobs is None
            continue
        assert output.logprobs.token_id == output.token_id
        assert output.logprobs.logprob == pytest.approx(float(scores[i, output.token_id]), abs=1e-6)
        values, ids = scores[i].topk(wanted)
        assert output.logprobs.top_ids == tuple(ids.tolist())
        assert output.logprobs.top_logprobs == pytest.approx(tuple(values.tolist()), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_leaves_what_it_allows(temperature, make_row, logits):
    allowed = [40, 41, 59]
    bits = np.zeros((1, 2), np.int32)
    for token in allowed:
        bits[0, token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
    rows = [make_row(i, temperature=temperature, seed=i) for i in range(8)]
    found = Sampler(V).sample(logits.clone(), rows, Masks([3], bits))
    free = Sampler(V).sample(logits.clone(), rows)
    assert found[3].token_id in allowed
    if temperature == 0:
        assert found[3].token_id == allowed[int(logits[3, allowed].argmax())]
    assert found[:3] + found[4:] == free[:3] + free[4:]


def test_ids_outside_the_vocabulary_change_nothing(make_row, logits):
    row = make_row(logit_bias={10**6: 5.0, -1: 3.0}, suppressed_ids=(V, -4), min_tokens=3, stop_ids=(V + 1,))
    torch.testing.assert_close(scores_after(row, logits[0]), logits[0].log_softmax(dim=0))


def test_noise_is_uniform_and_unrelated_from_seed_to_seed_and_position_to_position():
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64), indexing="ij")
    noise = uniforms(seeds.ravel(), positions.ravel()).reshape(200, 200)
    assert 0 <= noise.min() <= noise.max() < 1
    counts, _ = np.histogram(noise, bins=100, range=(0, 1))
    assert chisquare(counts).pvalue > 0.001
    for one, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[1:, :-1], noise[:-1, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**70 + 3])
def test_any_integer_is_a_seed(seed, make_row, logits):
    wrapped = make_row(0, temperature=1.0, seed=seed % 2**64)
    given = make_row(0, temperature=1.0, seed=seed)
    assert Sampler(V).sample(logits[:1].clone(), [given]) == Sampler(V).sample(logits[:1].clone(), [wrapped])
