"""Labels by what a causal LM thinks of them: how likely each is after the text and the beginning of a template.

A label's logit is the mean log-probability of its tokens (long labels are not worse for being long), less the same
after a text that says nothing, so that a label is not better for being a common word (contextual calibration,
arXiv:2102.09690). All labels of a text share the prompt's KV blocks. Knows neither HTTP nor torch. Runs in the API
process.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.batch import SamplingParams
from model.tokenizer import Encoding, TokenizerError
from service.engine.flight import GenerateRequest
from service.engine.models import LoadedModel
from service.errors import ContextLengthExceeded, GenerationFailed, InvalidRequest, Quarantined, ServiceError
from service.tasks.confidence import Numbers, Scored
from service.tasks.encoding import INLINE_CHARS, EncodeOptions
from service.tasks.generation import GenerationEngine
from service.tasks.sampling import context_limit
from service.tasks.zero_shot import CONTENT_FREE, PLACE, LabelSet

MAX_CONCURRENT = 64
"""Labels of one request under way at a time, so that a large batch does not fill the queue by itself."""


@dataclass(slots=True, kw_only=True)
class LabelPrompt:
    """A prompt that ends with a label, whose tokens begin at `start`."""

    ids: list[int]
    start: int


@dataclass(slots=True, kw_only=True)
class TextPrompts:
    """A prompt for each label; the first tokens are common to all."""

    prompts: list[LabelPrompt]
    num_truncated: int = 0

    @property
    def num_tokens(self) -> int:
        """The text and template once, and each label's own tokens."""
        shared = min(prompt.start for prompt in self.prompts)
        return shared + sum(len(prompt.ids) - shared for prompt in self.prompts)


async def by_likelihood(
    engine: GenerationEngine, model: LoadedModel, texts: Sequence[str], labels: LabelSet, options: EncodeOptions
) -> list[Scored]:
    """Logits whose softmax is the score (sigmoid, where labels are independent: 0.5 is as likely as after no text).

    Raises: what the engine raises for a request as a whole.
    """
    everything = [CONTENT_FREE, *texts]
    num_chars = sum(map(len, everything)) * len(labels.labels)
    if num_chars > INLINE_CHARS:
        found = await asyncio.to_thread(lambda: [_prompts(model, text, labels, options) for text in everything])
    else:
        found = [_prompts(model, text, labels, options) for text in everything]
    gate = asyncio.Semaphore(MAX_CONCURRENT)
    work = [asyncio.ensure_future(_score(engine, model, prompts, options, gate)) for prompts in found]
    try:
        bias, *scored = await asyncio.gather(*work)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    if bias.error is not None:
        bias.error.param = "labels"
        raise bias.error
    assert bias.logits is not None
    for entry in scored:
        if entry.logits is not None:
            entry.logits = entry.logits - bias.logits
    if scored:
        scored[0].num_tokens += bias.num_tokens
    return scored


def label_prompts(encodings: Sequence[Encoding], *, text_end: int, label_start: int, limit: int | None) -> TextPrompts:
    """Prompts of ids from encodings of `text template label`; the text's last tokens go where `limit` asks for it.

    `text_end` and `label_start` are characters. Special tokens after the label are left out: they would end the text.

    Raises: ContextLengthExceeded where cutting the text is not enough.
    """
    lengths = [
        max(n for n, owner in enumerate(encoding.sequence_ids) if owner is not None) + 1 for encoding in encodings
    ]
    excess = 0 if limit is None else max(0, max(lengths) - limit)
    prompts = []
    for encoding, length in zip(encodings, lengths, strict=True):
        own = [n for n in range(length) if encoding.sequence_ids[n] is not None]
        cuttable = [n for n in own if encoding.offsets[n][1] <= text_end]
        if excess > len(cuttable):
            raise ContextLengthExceeded(f"labels and template leave no room within {limit:,} tokens")
        dropped = set(cuttable[len(cuttable) - excess :])
        start = min(n for n in own if encoding.offsets[n][1] > label_start)
        ids = [encoding.ids[n] for n in range(length) if n not in dropped]
        prompts.append(LabelPrompt(ids=ids, start=max(1, start - excess)))
    return TextPrompts(prompts=prompts, num_truncated=excess)


def _prompts(model: LoadedModel, text: str, labels: LabelSet, options: EncodeOptions) -> TextPrompts | ServiceError:
    lead = f"{text}\n{labels.template.partition(PLACE)[0]}"
    # A label's first token takes the space before it along.
    label_start = len(lead.rstrip(" "))
    limit = context_limit(model)
    try:
        encodings = model.tokenizer.encode_batch([lead + label for label in labels.labels])
    except TokenizerError as error:
        return InvalidRequest(str(error))
    longest = max(len(encoding.ids) for encoding in encodings)
    if longest > limit and not options.truncate:
        return ContextLengthExceeded(
            f"the text with its labels has {longest:,} tokens; the limit is {limit:,} (ask for truncation to cut it)"
        )
    try:
        return label_prompts(encodings, text_end=len(text), label_start=label_start, limit=limit)
    except ContextLengthExceeded as error:
        return error


async def _score(
    engine: GenerationEngine,
    model: LoadedModel,
    prompts: TextPrompts | ServiceError,
    options: EncodeOptions,
    gate: asyncio.Semaphore,
) -> Scored:
    if isinstance(prompts, ServiceError):
        return Scored(error=prompts)
    scored = Scored(
        num_tokens=prompts.num_tokens,
        num_truncated=prompts.num_truncated,
        kept_tokens=max(len(prompt.ids) for prompt in prompts.prompts),
    )
    work = [asyncio.ensure_future(_mean_logprob(engine, model, prompt, options, gate)) for prompt in prompts.prompts]
    try:
        logits: Numbers = np.array(await asyncio.gather(*work), dtype=np.float64)
        if not np.isfinite(logits).all():
            raise GenerationFailed("the checkpoint's output for this input is not finite")
        scored.logits = logits
    except (GenerationFailed, InvalidRequest, Quarantined) as error:
        scored.error = error
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    return scored


async def _mean_logprob(
    engine: GenerationEngine, model: LoadedModel, prompt: LabelPrompt, options: EncodeOptions, gate: asyncio.Semaphore
) -> float:
    """Of the label's tokens, given all before them."""
    async with gate:
        stream = engine.generate(
            GenerateRequest(
                model=model.key,
                prompt_ids=prompt.ids,
                sampling=SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=prompt.start),
                priority=options.priority,
                deadline=options.deadline,
                client=options.client,
                task=options.task,
            )
        )
        try:
            logprobs = [entry.logprob async for output in stream for entry in output.prompt_logprobs]
        finally:
            stream.cancel()
    return float(np.mean(logprobs[-(len(prompt.ids) - prompt.start) :]))
