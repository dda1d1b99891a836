"""What a completion is told as: its deltas as chunks of a stream, or put together to one answer.

OpenAI's conventions (echo, log-probabilities, numbering), and vLLM's for token ids. API process only.
"""

import time

from model.batch import TokenLogprobs
from service.api.answers_openai import (
    DONE,
    ChunkEncoder,
    CompletionAnswer,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    UsageAnswer,
)
from service.api.generating import new_id, usage_answer
from service.api.schemas_openai import CompletionBody, as_list
from service.api.token_logprobs import completion_logprobs, prompt_logprobs, with_top
from service.tasks.generation import Delta, Generation, Prompt


class CompletionWriter:
    """Choice i continues prompt i // n; with `echo` it begins with that prompt."""

    def __init__(self, body: CompletionBody, generation: Generation) -> None:
        model = generation.model
        self._body = body
        self._generation = generation
        self._tokenizer = model.tokenizer
        self._head: dict[str, object] = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.version,
        }
        self._encoder = ChunkEncoder(self._head, include_usage=body.include_usage)
        self._begun = [False] * len(generation.choices)
        self._whole = [CompletionChoice(index=n, text="", finish_reason="") for n in range(len(generation.choices))]
        self._echo_chars = [0] * len(generation.choices)

    def chunk(self, delta: Delta) -> bytes:
        first = not self._begun[delta.index]
        text, logprobs = self._read(delta)
        built = None if logprobs is None else logprobs.model_dump()
        chunk = CompletionChunk(delta.index, text, built, delta.finish_reason)
        if delta.finish_reason is not None:
            chunk.stop_reason = delta.stop_reason
        if self._body.return_token_ids:
            chunk.token_ids = delta.ids
            if first:
                chunk.prompt_token_ids = self._prompt_of(delta.index).read_ids
        if not self._body.continuous_usage:
            return self._encoder.choice(chunk)
        return self._encoder.choice(chunk, {"usage": usage_answer(self._generation, self._body).model_dump()})

    def end(self, usage: UsageAnswer) -> bytes:
        return (self._encoder.usage(usage) if self._body.include_usage else b"") + DONE

    def add(self, delta: Delta) -> None:
        choice = self._whole[delta.index]
        if self._body.prompt_logprobs is not None and not self._begun[delta.index]:
            choice.prompt_logprobs = prompt_logprobs(self._tokenizer, delta.prompt_logprobs, self._body.prompt_logprobs)
        text, logprobs = self._read(delta)
        choice.text += text
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        choice.stop_reason = delta.stop_reason
        if self._body.return_token_ids:
            choice.prompt_token_ids = self._prompt_of(delta.index).read_ids
            choice.token_ids = (choice.token_ids or []) + delta.ids
        if logprobs is None:
            return
        if choice.logprobs is None:
            choice.logprobs = logprobs
            return
        choice.logprobs.tokens += logprobs.tokens
        choice.logprobs.token_logprobs += logprobs.token_logprobs
        choice.logprobs.top_logprobs += logprobs.top_logprobs
        choice.logprobs.text_offset += logprobs.text_offset

    def answer(self, usage: UsageAnswer) -> CompletionAnswer:
        return CompletionAnswer.model_validate({**self._head, "choices": self._whole, "usage": usage})

    def _read(self, delta: Delta) -> tuple[str, CompletionLogprobs | None]:
        """The delta's text and log-probabilities, the prompt's before the first ones where it is echoed."""
        text, tokens, offsets = delta.text, list[TokenLogprobs | int](delta.tokens), list(delta.offsets)
        if self._body.echo:
            shift = self._echo_chars[delta.index]
            if not self._begun[delta.index]:
                prompt_text, prompt_tokens, prompt_offsets = self._echo(delta)
                shift = self._echo_chars[delta.index] = len(prompt_text)
                text, tokens = prompt_text + text, prompt_tokens + tokens
                offsets = prompt_offsets + [offset + shift for offset in offsets]
            else:
                offsets = [offset + shift for offset in offsets]
        self._begun[delta.index] = True
        if self._body.logprobs is None:
            return text, None
        return text, completion_logprobs(self._tokenizer, tokens, offsets)

    def _prompt_of(self, index: int) -> Prompt:
        return self._generation.prompts[index // self._body.n]

    def _echo(self, delta: Delta) -> tuple[str, list[TokenLogprobs | int], list[int]]:
        """The prompt as it was given (decoded, where it was ids), and its tokens; nothing predicts the first."""
        prompt, given = self._prompt_of(delta.index), as_list(self._body.prompt)[delta.index // self._body.n]
        ids = prompt.ids
        detokenizer = self._tokenizer.detokenizer()
        text, offsets = "", []
        for id in ids:
            offsets.append(len(text))
            text += detokenizer.push((id,))
        text += detokenizer.flush()
        if isinstance(given, str) and not prompt.num_truncated:
            text = given
        if self._body.logprobs is None:
            return text, [], offsets
        return text, [ids[0], *(with_top(token, self._body.logprobs) for token in delta.prompt_logprobs)], offsets
