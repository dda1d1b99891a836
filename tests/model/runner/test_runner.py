"""What a step gives besides the next token, and whose fault stays whose."""

import math
import re

import pytest
import torch

from model.attention.cpu import CpuAttention
from model.batch import Batch, BeamParams, Grammar, Row, SamplingParams
from model.grammar import GrammarCompiler
from model.runner import is_out_of_memory

PROMPT = [5, 9, 33, 7, 12, 80, 41, 6, 6, 90]


def row(number: int, ids: list[int], **more: object) -> Row:
    sampling = SamplingParams(**{"max_tokens": 5, **more})
    return Row(number, ids, 0, [10 * number, 10 * number + 1, 10 * number + 2], sampling, True, [], ids)


def test_prompt_logprobs_are_the_log_softmax_of_the_logits(run_all, saved_model, work):
    _, reference = saved_model("llama")
    (done,) = run_all([work(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=3))], chunk=4)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0].log_softmax(dim=1)
    assert len(done.prompt_logprobs) == len(PROMPT) - 1
    for position, found in enumerate(done.prompt_logprobs):
        assert found.token_id == PROMPT[position + 1]
        assert found.logprob == pytest.approx(float(expected[position, found.token_id]), abs=1e-4)
        values, ids = expected[position].topk(3)
        assert list(found.top_ids) == ids.tolist()
        assert list(found.top_logprobs) == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("first", [1, 2, 5, len(PROMPT) - 1])
def test_prompt_logprobs_from_a_later_token_are_the_last_of_all(first, chunk, run_all, work):
    (whole,) = run_all([work(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=0))])
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=first)
    (part,) = run_all([work(PROMPT, sampling)], chunk=chunk)
    expected = whole.prompt_logprobs[first - 1 :]
    assert [entry.token_id for entry in part.prompt_logprobs] == [entry.token_id for entry in expected]
    assert [entry.logprob for entry in part.prompt_logprobs] == pytest.approx([entry.logprob for entry in expected])


def test_logprobs_are_those_of_the_raw_logits_whatever_the_sampling(run_all, saved_model, work):
    _, reference = saved_model("llama")
    sampling = SamplingParams(max_tokens=1, temperature=3.0, top_k=4, seed=5, logprobs=2, logit_bias={3: 50.0})
    (done,) = run_all([work(PROMPT, sampling)])
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0, -1].log_softmax(dim=0)
    found = done.logprobs[0]
    assert found.token_id == 3
    assert found.logprob == pytest.approx(float(expected[3]), abs=1e-4)
    assert list(found.top_ids) == expected.topk(2).indices.tolist()


def test_beam_candidates_are_the_best_continuations(make_runner, saved_model):
    _, reference = saved_model("llama")
    runner = make_runner("llama")
    plain, beam = row(0, PROMPT), row(1, PROMPT, beam=BeamParams(num_beams=3))
    outputs = runner.run(Batch([plain, beam])).rows
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0, -1].log_softmax(dim=0).topk(6)
    assert outputs[0].beam_candidates is None
    found = outputs[1].beam_candidates
    assert [token for token, _ in found] == expected.indices.tolist()
    assert [logprob for _, logprob in found] == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("foreign", [-1, 97, 10**9])
def test_an_id_outside_the_vocabulary_is_its_own_rows_fault(make_runner, foreign):
    alone = make_runner("llama").run(Batch([row(0, PROMPT)])).rows[0].token_id
    outputs = make_runner("llama").run(Batch([row(1, [5, foreign, 7]), row(0, PROMPT), row(2, PROMPT)])).rows
    assert str(foreign) in outputs[0].error.replace(",", "")
    assert outputs[0].token_id is None
    assert [output.token_id for output in outputs[1:]] == [alone, alone]
    assert [output.error for output in outputs[1:]] == [None, None]


def test_a_foreign_source_id_is_its_own_rows_fault(make_runner):
    good = row(0, [0])
    good.encoder_ids, good.cross_block_ids, good.encode = PROMPT, [50, 51, 52], True
    bad = row(1, [0])
    bad.encoder_ids, bad.cross_block_ids, bad.encode = [97], [60], True
    alone = make_runner("t5").run(Batch([good])).rows[0].token_id
    outputs = make_runner("t5").run(Batch([bad, good])).rows
    assert "97" in outputs[0].error
    assert outputs[1].token_id == alone


@pytest.mark.parametrize("others", [0, 1])
def test_a_row_without_a_source_fails_alone(make_runner, others):
    good = row(0, [0])
    good.encoder_ids, good.cross_block_ids, good.encode = PROMPT, [50, 51, 52], True
    outputs = make_runner("bart").run(Batch([row(1, [0]), *[good] * others])).rows
    assert "no source" in outputs[0].error
    assert [output.error for output in outputs[1:]] == [None] * others


def test_a_logit_that_is_no_number_is_its_own_rows_fault(make_runner):
    runner = make_runner("llama")
    poisoned = [*PROMPT[:3], 2]
    healthy = runner.run(Batch([row(0, PROMPT)])).rows[0].token_id
    with torch.inference_mode():
        runner.network.embedding.weight[2] = math.nan
    outputs = runner.run(Batch([row(1, poisoned), row(0, PROMPT), row(3, poisoned, temperature=1.0)])).rows
    assert "finite" in outputs[0].error
    assert "finite" in outputs[2].error
    assert outputs[1].token_id == healthy
    assert outputs[1].error is None


def test_rows_that_do_not_reach_their_last_token_sample_nothing(make_runner):
    first, second = row(0, PROMPT), row(1, PROMPT)
    first.samples = False
    outputs = make_runner("llama").run(Batch([first, second])).rows
    assert outputs[0].token_id is None
    assert outputs[0].error is None
    assert outputs[1].token_id is not None


def test_blocks_are_copied_before_the_step_writes(make_runner):
    """A beam's fork: the copy holds the parent's past, and what each writes afterwards is its own."""
    runner = make_runner("llama")
    runner.run(Batch([row(0, PROMPT)]))
    sampling = SamplingParams(max_tokens=5, logprobs=0)
    fork = Row(9, [4], 10, [0, 1, 7], sampling, True, [4], PROMPT)
    parent = Row(8, [3], 10, [0, 1, 2], sampling, True, [3], PROMPT)
    outputs = runner.run(Batch([parent, fork], block_copies=[(2, 7)])).rows
    for output, last in zip(outputs, (3, 4), strict=True):
        alone = make_runner("llama").run(Batch([row(0, [*PROMPT, last], logprobs=0)])).rows[0]
        assert output.token_id == alone.token_id
        assert output.logprobs.logprob == pytest.approx(alone.logprobs.logprob, abs=1e-4)


def test_rows_of_one_step_read_what_another_row_of_it_writes(make_runner):
    """Requests that share a prefix may be scheduled together: the second reads blocks that the first fills."""
    runner = make_runner("llama")
    first = Row(0, PROMPT[:8], 0, [3, 4], row(0, PROMPT).sampling, True, [], PROMPT[:8])
    second = Row(1, PROMPT[8:], 8, [3, 4, 5], row(0, PROMPT).sampling, True, [], PROMPT)
    output = runner.run(Batch([first, second])).rows[1]
    assert output.token_id == make_runner("llama").run(Batch([row(0, PROMPT)])).rows[0].token_id


def test_a_raising_step_leaves_a_runner_that_runs(make_runner):
    class Failing(CpuAttention):
        fails = True

        def paged(self, *arguments, **named):
            if self.fails:
                raise RuntimeError("no memory")
            return super().paged(*arguments, **named)

    runner = make_runner("llama", backend := Failing())
    with pytest.raises(RuntimeError, match="no memory"):
        runner.run(Batch([row(0, PROMPT)]))
    runner.recover()
    backend.fails = False
    expected = make_runner("llama").run(Batch([row(0, PROMPT)])).rows[0].token_id
    assert runner.run(Batch([row(0, PROMPT)])).rows[0].token_id == expected
    assert runner.forward_seconds > 0


def test_a_fault_that_stays_with_the_device_is_raised_so_that_the_process_ends(make_runner, monkeypatch):
    def stuck(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    runner = make_runner("llama")
    runner.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", stuck)
    with pytest.raises(RuntimeError, match="assert"):
        runner.recover()


def test_want_of_memory_is_told_from_other_faults():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("a shape is wrong"))


@pytest.fixture
def grammars(letters_tokenizer):
    compiler = GrammarCompiler(letters_tokenizer.to_str(), 97, [0])
    yield compiler
    compiler.close()


def test_constrained_rows_obey_and_their_neighbours_do_not_notice(make_runner, grammars, run_all, work):
    """Letters are ids 2 to 27; a row of the same prompt without a grammar goes its own way."""
    runner = make_runner("llama", grammars=grammars)
    constrained = SamplingParams(max_tokens=9, temperature=1.0, seed=1, grammar=Grammar("regex", "(abba|cd+c)"))
    free = SamplingParams(max_tokens=9)
    found = run_all([work(PROMPT, constrained), work(PROMPT, free)], runner=runner)
    text = "".join(chr(95 + token) for token in found[0].output_ids)
    assert re.fullmatch("abba|cd+c?", text)
    assert found[1].output_ids == run_all([work(PROMPT, free)])[0].output_ids


def test_a_grammar_that_cannot_be_compiled_is_its_own_rows_fault(make_runner, grammars):
    runner = make_runner("llama", grammars=grammars)
    outputs = runner.run(Batch([row(1, PROMPT, grammar=Grammar("regex", "(")), row(0, PROMPT)])).rows
    assert outputs[0].error.startswith("grammar: ")
    assert outputs[0].token_id is None
    assert outputs[1].token_id == make_runner("llama").run(Batch([row(0, PROMPT)])).rows[0].token_id


def test_a_checkpoint_without_a_grammar_compiler_refuses_grammars(make_runner):
    outputs = make_runner("llama").run(Batch([row(1, PROMPT, grammar=Grammar("json_object"))])).rows
    assert outputs[0].error == "grammar: this checkpoint takes none"
