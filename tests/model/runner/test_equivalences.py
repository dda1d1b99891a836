"""However a step's work is cut and mixed, a sequence gets the tokens that it gets alone and whole."""

import pytest
import torch

from model.attention.reference import ReferenceAttention
from model.batch import SamplingParams

DECODERS = ["llama", "gemma2"]
SEQ2SEQ = ["t5", "bart"]


def prompts(count: int) -> list[list[int]]:
    """Lengths from 1 to 37, every one different from the next."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (1 + 11 * index % 37,), generator=generator).tolist() for index in range(1, count + 1)]


def greedy(max_tokens: int = 12, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **more)


@pytest.mark.parametrize("model", DECODERS)
def test_cached_generation_is_transformers_generation(model, run_all, saved_model, work):
    _, reference = saved_model(model)
    works = run_all([work(prompt, greedy()) for prompt in prompts(3)], model=model)
    for done in works:
        ids = torch.tensor([done.prompt_ids])
        with torch.no_grad():
            for token in done.output_ids:
                assert int(reference(ids).logits[0, -1].argmax()) == token
                ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


@pytest.mark.parametrize("model", SEQ2SEQ)
def test_encoder_decoder_generation_is_transformers_generation(model, run_all, saved_model, work):
    _, reference = saved_model(model)
    works = run_all([work([0], greedy(), encoder_ids=source) for source in prompts(4)], model=model)
    for done in works:
        source, ids = torch.tensor([done.encoder_ids]), torch.tensor([[0]])
        with torch.no_grad():
            for token in done.output_ids:
                assert int(reference(input_ids=source, decoder_input_ids=ids).logits[0, -1].argmax()) == token
                ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


@pytest.mark.parametrize("model", DECODERS + SEQ2SEQ)
@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_give_what_the_whole_gives(model, chunk, run_all, work):
    works = [
        work(prompt, greedy(logprobs=2, prompt_logprobs=1), encoder_ids=prompt[:5] if model in SEQ2SEQ else [])
        for prompt in prompts(5)
    ]
    whole, chunked = run_all(works, model=model), run_all(works, model=model, chunk=chunk)
    for one, other in zip(whole, chunked, strict=True):
        assert one.output_ids == other.output_ids
        for a, b in zip(one.logprobs + one.prompt_logprobs, other.logprobs + other.prompt_logprobs, strict=True):
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("model", DECODERS + SEQ2SEQ)
def test_a_batch_gives_what_each_gets_alone(model, run_all, make_runner, work):
    works = [
        work(prompt, greedy(), encoder_ids=prompts(9)[8 - index] if model in SEQ2SEQ else [])
        for index, prompt in enumerate(prompts(9))
    ]
    runner = make_runner(model)
    together = run_all(works, runner=runner)
    for one, done in zip(works, together, strict=True):
        assert run_all([one], runner=runner)[0].output_ids == done.output_ids


@pytest.mark.parametrize("model", DECODERS + SEQ2SEQ)
def test_the_fast_backend_gives_what_the_reference_gives(model, run_all, make_runner, work):
    works = [
        work(prompt, greedy(logprobs=0), encoder_ids=prompt[::-1] if model in SEQ2SEQ else []) for prompt in prompts(6)
    ]
    fast = run_all(works, model=model, chunk=9)
    plain = run_all(works, runner=make_runner(model, ReferenceAttention()), chunk=9)
    for one, other in zip(fast, plain, strict=True):
        assert one.output_ids == other.output_ids
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, rel=1e-4, abs=1e-4)


def test_a_seeded_sequence_gets_the_same_tokens_alone_and_in_a_batch_of_64(run_all, make_runner, work):
    runner = make_runner("llama")
    works = [
        work(
            prompt,
            SamplingParams(
                max_tokens=10,
                temperature=0.5 + index % 5 / 4,
                top_k=(0, 5, 70)[index % 3],
                top_p=(1.0, 0.8)[index % 2],
                min_p=(0.0, 0.01)[index // 2 % 2],
                repetition_penalty=(1.0, 1.2)[index // 3 % 2],
                frequency_penalty=(0.0, 0.3)[index // 5 % 2],
                seed=index * 7919,
            ),
        )
        for index, prompt in enumerate(prompts(64))
    ]
    together = run_all(works, runner=runner)
    assert len({tuple(done.output_ids) for done in together}) > 60
    for index in range(0, 64, 3):
        assert run_all([works[index]], runner=runner)[0].output_ids == together[index].output_ids


def test_a_sequence_goes_on_the_same_after_its_cache_is_lost(run_all, make_runner, work):
    """Preemption and replay: the known tokens are computed again, the next ones are those it would have had."""
    runner = make_runner("llama")
    sampling = SamplingParams(max_tokens=16, temperature=1.0, seed=3, presence_penalty=0.5)
    whole = run_all([work(prompts(2)[1], sampling)], runner=runner)[0]
    again = run_all([work(whole.prompt_ids, sampling)], runner=runner, known=whole.output_ids[:6])[0]
    assert again.output_ids == whole.output_ids
