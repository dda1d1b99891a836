"""Training runs: the same data after a resume, the same weights, and what carries loss."""

import numpy as np
import pytest
import torch

from model.training.data import IGNORED, MaskedExamples, PackedTokens
from model.training.distill import batches_by_length
from model.training.finetune import Encoded, FinetuneSettings, Schedule, Task, finetune
from model.training.heads import Head, HeadConfig, head_logits, load_head, save_head
from model.training.optimizers import orthogonalize
from model.training.pretrain import LanguageModelSettings, train_language_model
from model.training.refit import refit_head
from model.training.run import Run, learning_rate_factor

STREAM = np.arange(1000, dtype=np.uint16) % 300


def test_targets_are_the_inputs_one_token_later():
    inputs, targets = PackedTokens(STREAM, 16, 4, seed=1).batch(3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_of_packed_windows_sees_every_token_once():
    packed = PackedTokens(STREAM[:161], 16, 2, seed=1)
    seen = torch.cat([packed.batch(step)[0].flatten() for step in range(5)])
    assert sorted(seen.tolist()) == sorted(STREAM[:160].tolist())


def test_only_the_answer_carries_loss():
    examples = MaskedExamples([([7, 8, 9, 10, 11], 3), ([1, 2], 1)], length=16, batch_size=2, seed=0)
    inputs, targets = examples.batch(0)
    row = inputs[:, 0].tolist().index(7)
    assert targets[row].tolist() == [IGNORED, IGNORED, 10, 11]
    assert targets[1 - row].tolist() == [2, IGNORED, IGNORED, IGNORED]


def test_batches_by_length_hold_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(3, 60, 500).tolist()
    batches = batches_by_length(lengths, batch_tokens=128, seed=4)
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert max(len(batch) * max(lengths[row] for row in batch) for batch in batches) <= 128
    assert batches == batches_by_length(lengths, batch_tokens=128, seed=4)


def test_the_schedule_depends_on_the_step_alone():
    mix = {"a": 0.7, "b": 0.3}
    whole = Schedule(mix, seed=1)
    drawn = [whole.at(step) for step in range(200)]
    assert Schedule(mix, seed=1).at(150) == drawn[150]
    turns = [turn for name, turn in drawn if name == "b"]
    assert turns == list(range(len(turns)))


def test_rates_warm_up_stay_and_fall_to_zero():
    factors = [learning_rate_factor(step, steps=100, warmup=10, decay=20) for step in (0, 9, 50, 80, 90, 100)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.0])


def settings(steps):
    return LanguageModelSettings(steps=steps, warmup=2, decay=1, micro_batch=2, validate_every=4, save_every=4)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(make_llama, tmp_path):
    packed = PackedTokens(STREAM, 16, 4, seed=1)
    whole, parts, resumed = make_llama(), make_llama(), make_llama(seed=5)
    train_language_model(whole, packed.batch, [packed.batch(0)], settings=settings(8), run=Run(tmp_path / "whole"))
    train_language_model(parts, packed.batch, [packed.batch(0)], settings=settings(4), run=Run(tmp_path / "parts"))
    train_language_model(resumed, packed.batch, [packed.batch(0)], settings=settings(8), run=Run(tmp_path / "parts"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, atol=1e-3, rtol=1e-2, msg=name)
    assert Run(tmp_path / "parts").curve().keys() == Run(tmp_path / "whole").curve().keys()


def test_micro_batches_give_the_gradient_of_the_whole_batch(make_llama):
    from model.training.pretrain import _backward

    gradients = []
    for micro_batch in (1, 4):
        network = make_llama()
        _backward(network, *PackedTokens(STREAM, 16, 4, seed=1).batch(0), micro_batch)
        gradients.append(network.model["norm"].weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=5e-2)


def test_the_language_model_learns_a_sequence_it_sees_often(make_llama, tmp_path):
    network, packed = make_llama(), PackedTokens(STREAM, 32, 4, seed=1)
    train_language_model(network, packed.batch, [packed.batch(0)], settings=settings(60), run=Run(tmp_path))
    losses = [loss for _, loss in Run(tmp_path).curve()["validation_loss"]]
    assert losses[-1] < 0.5 * losses[0]


def test_orthogonalized_updates_have_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(40, 20)).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_heads_learn_on_one_body_and_keep_their_answers_on_disk(make_bert, tmp_path):
    network = make_bert()
    rows = [Encoded([2, 10 + label, 3], 3, (label,)) for label in (0, 1)] * 20
    spans = [Encoded([2, 5, 3, 30, place, 31, 3], 3, (4, 4)) for place in (40, 41)] * 20
    tasks = [
        Task("which", HeadConfig("classification", "cls", ("no", "yes"), 32), rows),
        Task("where", HeadConfig("span", "tokens", ("start", "end"), 32), spans),
    ]
    chosen = FinetuneSettings(
        steps=60, mix={"which": 0.5, "where": 0.5}, learning_rate=5e-3, warmup=2, decay=10, dropout=0.0
    )
    heads = finetune(network, tasks, None, settings=chosen, run=Run(tmp_path / "run"))
    ids, mask = torch.tensor([[2, 10, 3], [2, 11, 3]]), torch.ones(2, 3, dtype=torch.bool)
    logits = heads["which"](network.eval()(ids, mask), mask)
    assert logits.argmax(1).tolist() == [0, 1]
    save_head(heads["which"], tmp_path / "which", temperature=1.5)
    loaded = load_head(tmp_path / "which")
    assert isinstance(loaded, Head)
    assert loaded.config.temperature == 1.5
    torch.testing.assert_close(loaded(network(ids, mask), mask), logits, atol=1e-2, rtol=1e-2)


def test_refitting_a_head_lowers_its_loss_and_never_worsens_the_rows_held_back(make_bert):
    network = make_bert().eval()
    rows = [Encoded([2, 10 + label, 40 + other, 3], 4, (label,)) for label in (0, 1) for other in range(20)]
    head = Head(HeadConfig("classification", "cls", ("no", "yes"), 32), network.shape.hidden_size)
    ids, targets = [row.ids for row in rows], torch.tensor([row.target[0] for row in rows])
    before = torch.nn.functional.cross_entropy(head_logits(network, head, ids), targets)
    assert refit_head(network, head, rows[::2], rows[1::2]) < float("inf")
    assert torch.nn.functional.cross_entropy(head_logits(network, head, ids), targets) < before
    kept = head.weight.clone()
    mislabelled = [Encoded(row.ids, 4, (1 - row.target[0],)) for row in rows[::2]]
    assert refit_head(network, head, mislabelled, rows[1::2]) == float("inf")
    assert torch.equal(head.weight, kept)
