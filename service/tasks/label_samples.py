"""Labels by a vote: a causal LM is asked several times for one of the caller's labels, and can say nothing else.

A grammar holds every sample to the labels. Chat checkpoints get an instruction in their own template, encoder-decoders
as their source; others the text and the beginning of the hypothesis template. Knows neither HTTP nor torch. Runs in
the API process.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from model.batch import Grammar
from model.generation_defaults import Choices
from service.engine.models import LoadedModel
from service.errors import GenerationFailed, Quarantined, ServiceError
from service.tasks.chat import Conversation, chat_prompt, without_thinking
from service.tasks.encoding import EncodeOptions
from service.tasks.generation import GenerationEngine, Prompt, RequestOptions
from service.tasks.grammars import checked
from service.tasks.instructing import TEXT, Assignment, Commission
from service.tasks.prompts import encode_text
from service.tasks.sampling import SamplingOptions, context_limit, sampling_params, seed_of
from service.tasks.voting import Ballot, sample, vote
from service.tasks.zero_shot import PLACE, LabelSet

MAX_LABEL_TOKENS = 256
MAX_CONCURRENT_TEXTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """`n` samples of each text; `grammar_timeout` is in seconds."""

    n: int
    temperature: float = 1.0
    seed: int | None = None
    grammar_timeout: float = 10.0


@dataclass(slots=True, kw_only=True)
class Voted:
    """One text's ballot, or what went wrong, and the tokens that it took."""

    ballot: Ballot | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: ServiceError | None = field(default=None)


async def vote_for_labels(
    engine: GenerationEngine,
    model: LoadedModel,
    texts: Sequence[str],
    labels: LabelSet,
    options: EncodeOptions,
    sampling: SampleOptions,
) -> list[Voted]:
    """A ballot for each text; one text's fault is its own.

    Raises: InvalidGrammar for labels that no grammar can hold; what the engine raises for a request as a whole.
    """
    lead = "" if model.chat_template is not None else " "
    grammar = await checked(
        label_grammar(labels.labels, lead), param="labels", timeout_seconds=sampling.grammar_timeout
    )
    gate = asyncio.Semaphore(MAX_CONCURRENT_TEXTS)

    async def ask(text: str) -> Voted:
        async with gate:
            return await _ask(engine, model, text, labels, grammar, options, sampling)

    work = [asyncio.ensure_future(ask(text)) for text in texts]
    try:
        return list(await asyncio.gather(*work))
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


def label_grammar(labels: Sequence[str], lead: str) -> Grammar:
    """One of the labels and nothing else; `lead` is the space between a prompt and its continuation."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(lead + label, ensure_ascii=False) for label in labels))


async def _ask(
    engine: GenerationEngine,
    model: LoadedModel,
    text: str,
    labels: LabelSet,
    grammar: Grammar,
    options: EncodeOptions,
    sampling: SampleOptions,
) -> Voted:
    try:
        if model.description.network == "encoder_decoder":
            prompt = await _source_prompt(model, text, labels, grammar, sampling)
        else:
            prompt = await _prompt(model, text, labels, grammar, sampling)
        request = RequestOptions(
            task=options.task, client=options.client, priority=options.priority, deadline=options.deadline
        )
        samples = await sample(engine, model, prompt, request, n=sampling.n)
    except (GenerationFailed, Quarantined) as error:
        return Voted(error=error)
    except ServiceError as error:
        if error.status != 400:
            raise
        return Voted(error=error)
    return Voted(
        ballot=vote([_label_of(text, labels) for text in samples.texts], same=str),
        num_prompt_tokens=samples.usage.prompt_tokens,
        num_output_tokens=samples.usage.completion_tokens,
    )


def _label_of(text: str, labels: LabelSet) -> str | None:
    """A sample that the length limit cut short is none of the labels, and an abstention."""
    return next((label for label in labels.labels if label == text.removeprefix(" ") or label == text), None)


async def _prompt(model: LoadedModel, text: str, labels: LabelSet, grammar: Grammar, sampling: SampleOptions) -> Prompt:
    ids = await _prompt_ids(model, text, labels)
    wanted = SamplingOptions(temperature=sampling.temperature, top_k=0, top_p=1.0, seed=sampling.seed, grammar=grammar)
    params = sampling_params(wanted, model, len(ids), default_max_tokens=MAX_LABEL_TOKENS, prompt_param="input")
    return Prompt(ids=ids, sampling=params, continues=False)


async def _source_prompt(
    model: LoadedModel, text: str, labels: LabelSet, grammar: Grammar, sampling: SampleOptions
) -> Prompt:
    """An encoder-decoder's: greedy or sampled, never by beams, and without what it declares for its own texts."""
    choices = Choices(
        max_tokens=min(MAX_LABEL_TOKENS, context_limit(model) - 1),
        min_tokens=0,
        num_beams=1,
        no_repeat_ngram_size=0,
        repetition_penalty=1.0,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=seed_of(sampling.seed),
    )
    commission = Commission(model=model, assignment=Assignment(instruction=TEXT, form=TEXT), choices=choices)
    prompt = await commission.prompt(_question(text, labels))
    return replace(prompt, sampling=replace(prompt.sampling, grammar=grammar, forced_bos_id=None, forced_eos_id=None))


async def _prompt_ids(model: LoadedModel, text: str, labels: LabelSet) -> list[int]:
    if model.chat_template is None:
        lead = f"{text}\n{labels.template.partition(PLACE)[0]}".rstrip(" ")
        return await encode_text(model, lead, param="input")
    messages = [{"role": "user", "content": _question(text, labels)}]
    # The grammar lets nothing but a label through: what thinks first must be told not to.
    return await chat_prompt(model, Conversation(messages=messages, template_variables=without_thinking(model)))


def _question(text: str, labels: LabelSet) -> str:
    question = f"Which of these labels fits the text best? {', '.join(labels.labels)}. Answer with the label alone."
    return f"{question}\n\nText: {text}\n\n{labels.template.replace(PLACE, '___')}"
