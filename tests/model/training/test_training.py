"""Training runs: the same data after a resume, the same weights, and what carries loss."""

import numpy as np
import pytest
import torch

from model.training.averaging import move_back
from model.training.data import MaskedExamples, PackedTokens
from model.training.finetune import Encoded, ExampleTable, FinetuneSettings, Schedule, Task, finetune
from model.training.heads import Head, HeadConfig, head_logits, load_head, save_head
from model.training.loop import Clock, StageSettings
from model.training.optimizers import Muon, orthogonalize
from model.training.pretrain import LanguageModelSettings, learn_batch, train_language_model
from model.training.refit import refit_head
from model.training.rounding import rounded_weights, stored
from model.training.run import Run, learning_rate_factor
from model.training.tables import EndlessBatches, TokenTable, batches_by_length

STREAM = np.arange(1000, dtype=np.uint16) % 300


def test_targets_are_the_inputs_one_token_later():
    inputs, targets, _ = PackedTokens(STREAM, 16, 4, seed=1).batch(3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_of_packed_windows_sees_every_token_once():
    packed = PackedTokens(STREAM[:161], 16, 2, seed=1)
    seen = torch.cat([packed.batch(step)[0].flatten() for step in range(5)])
    assert sorted(seen.tolist()) == sorted(STREAM[:160].tolist())


def test_only_the_answer_carries_loss():
    examples = MaskedExamples([([7, 8, 9, 10, 11], 3), ([1, 2], 1)], length=16, batch_size=2, seed=0)
    inputs, targets, weights = examples.batch(0)
    row = inputs[:, 0].tolist().index(7)
    assert targets[row, weights[row] > 0].tolist() == [10, 11]
    assert targets[1 - row, weights[1 - row] > 0].tolist() == [2]


def test_a_long_answer_counts_more_than_a_short_one_but_less_than_by_its_length():
    examples = MaskedExamples([([7, *range(10, 14)], 1), ([1, 2], 1)], length=16, batch_size=2, seed=0)
    inputs, _, weights = examples.batch(0)
    row = inputs[:, 0].tolist().index(7)
    assert weights.sum(1)[[row, 1 - row]].tolist() == pytest.approx([2.0, 1.0])


def test_an_answer_past_the_context_is_cut_where_the_context_ends():
    examples = MaskedExamples([(list(range(1, 30)), 4)], length=8, batch_size=1, seed=0)
    inputs, targets, weights = examples.batch(0)
    assert inputs.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert targets[weights > 0].tolist() == [5, 6, 7, 8, 9]


def test_a_token_table_gives_back_its_rows_padded():
    rows = [[5, 6, 7], [8], list(range(20, 31))]
    ids, mask = TokenTable(rows, "cpu").batch([2, 0])
    assert ids.shape == (2, 16)
    assert [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)] == [rows[2], rows[0]]
    assert not ids[~mask].any()


def test_type_ids_mark_the_second_text_and_not_the_padding():
    table = ExampleTable([Encoded([1, 2, 3, 4, 5], 3, (3, 4)), Encoded([1, 2], 2, (0, 0))], "cpu")
    _, _, types, targets = table.batch([0, 1])
    assert types[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert types[1].sum() == 0
    assert targets.tolist() == [[3, 4], [0, 0]]


def test_batches_by_length_hold_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(3, 60, 500)
    batches = batches_by_length(lengths, batch_tokens=128, seed=4)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 128


def test_the_batch_of_a_step_does_not_depend_on_the_steps_before():
    lengths = np.random.default_rng(0).integers(3, 60, 200)
    whole = EndlessBatches(lengths, batch_tokens=128, seed=4)
    drawn = [whole.rows(step) for step in range(150)]
    assert EndlessBatches(lengths, batch_tokens=128, seed=4).rows(149) == drawn[149]
    assert whole.rows(3) == drawn[3]


def test_the_schedule_depends_on_the_step_alone():
    mix = {"a": 0.7, "b": 0.3}
    whole = Schedule(mix, seed=1)
    drawn = [whole.at(step) for step in range(200)]
    assert Schedule(mix, seed=1).at(150) == drawn[150]
    turns = [turn for name, turn in drawn if name == "b"]
    assert turns == list(range(len(turns)))


def test_rates_warm_up_stay_and_fall_to_zero():
    factors = [learning_rate_factor(step, step / 100, warmup=10, decay=0.2) for step in (0, 9, 50, 80, 90, 100)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_a_stage_is_done_by_its_steps_or_by_its_minutes_whichever_comes_first():
    settings = StageSettings(steps=100, max_minutes=10)
    assert Clock(settings).done(50) == pytest.approx(0.5)
    assert Clock(settings, seconds=450).done(50) == pytest.approx(0.75, abs=0.01)
    assert Clock(settings, seconds=600).done(50) == 1
    assert Clock(settings).done(100) == 1


def test_a_stage_out_of_minutes_ends_with_its_rate_at_zero_and_is_not_gone_on_with(make_llama, tmp_path):
    packed, network = PackedTokens(STREAM, 16, 4, seed=1), make_llama()
    chosen = LanguageModelSettings(steps=10**6, max_minutes=1 / 120, warmup=0, decay=1.0)
    train_language_model(network, packed.batch, [packed.batch(0)], settings=chosen, run=Run(tmp_path))
    ended = Run(tmp_path).load()
    assert 0 < ended["step"] < 10**6
    train_language_model(make_llama(seed=5), packed.batch, [packed.batch(0)], settings=chosen, run=Run(tmp_path))
    assert Run(tmp_path).load()["step"] == ended["step"]


def test_rounded_weights_are_those_of_the_checkpoint_and_gradients_reach_the_exact_ones(make_llama):
    network = make_llama()
    exact = {name: weight.clone() for name, weight in network.named_parameters()}
    with rounded_weights(network):
        for name, weight in network.named_parameters():
            assert torch.equal(weight.data, stored(exact[name]).float()), name
        learn_batch(network, PackedTokens(STREAM, 16, 4, seed=1).batch(0), 4)
    for name, weight in network.named_parameters():
        assert torch.equal(weight.data, exact[name]), name
        assert weight.grad is not None
    assert not torch.equal(stored(exact["model.embed_tokens.weight"]).float(), exact["model.embed_tokens.weight"])


def settings(steps):
    return LanguageModelSettings(steps=steps, warmup=2, decay=0.0, micro_batch=2, validate_every=4, save_every=4)


def test_a_killed_run_goes_on_and_ends_with_the_weights_of_an_uninterrupted_one(make_llama, tmp_path):
    packed = PackedTokens(STREAM, 16, 4, seed=1)
    whole, parts, resumed = make_llama(), make_llama(), make_llama(seed=5)
    train_language_model(whole, packed.batch, [packed.batch(0)], settings=settings(8), run=Run(tmp_path / "whole"))

    def killed(step):
        if step == 6:
            raise KeyboardInterrupt
        return packed.batch(step)

    with pytest.raises(KeyboardInterrupt):
        train_language_model(parts, killed, [packed.batch(0)], settings=settings(8), run=Run(tmp_path / "parts"))
    train_language_model(resumed, packed.batch, [packed.batch(0)], settings=settings(8), run=Run(tmp_path / "parts"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, atol=1e-3, rtol=1e-2, msg=name)
    assert Run(tmp_path / "parts").curve().keys() == Run(tmp_path / "whole").curve().keys()


def test_micro_batches_give_the_gradient_of_the_whole_batch(make_llama):
    gradients = []
    for micro_batch in (1, 4):
        network = make_llama()
        learn_batch(network, PackedTokens(STREAM, 16, 4, seed=1).batch(0), micro_batch)
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


def test_matrices_of_one_shape_move_together_as_they_would_alone():
    torch.manual_seed(0)
    together, alone = [[torch.nn.Parameter(torch.ones(6, 4) * n) for n in (1, 2)] for _ in range(2)]
    for ours, theirs in zip(together, alone, strict=True):
        ours.grad = torch.randn(6, 4)
        theirs.grad = ours.grad.clone()
    for weights in (together, alone[:1], alone[1:]):
        Muon(weights, lr=0.1).step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


def test_heads_learn_on_one_body_and_keep_their_answers_on_disk(make_bert, tmp_path):
    network = make_bert()
    rows = [Encoded([2, 10 + label, 3], 3, (label,)) for label in (0, 1)] * 20
    spans = [Encoded([2, 5, 3, 30, place, 31, 3], 3, (4, 4)) for place in (40, 41)] * 20
    tasks = [
        Task("which", HeadConfig("classification", "cls", ("no", "yes"), 32), rows),
        Task("where", HeadConfig("span", "tokens", ("start", "end"), 32), spans),
    ]
    chosen = FinetuneSettings(
        steps=60,
        mix={"which": 0.5, "where": 0.5},
        batch_tokens={"which": 256, "where": 256},
        learning_rate=5e-3,
        warmup=2,
        decay=0.2,
        dropout=0.0,
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


def test_a_network_moved_back_lies_between_itself_and_its_start():
    network, start = torch.nn.Linear(1, 1), {"weight": torch.tensor([[5.0]]), "bias": torch.tensor([0.0])}
    network.load_state_dict({"weight": torch.tensor([[1.0]]), "bias": torch.tensor([4.0])})
    move_back(network, start, 0.25)
    assert (network.weight.item(), network.bias.item()) == (2.0, 3.0)
