"""Constrained generation: grammars compiled against a checkpoint's vocabulary, and the state of each sequence in one.

Compilation runs on threads of its own, so that a heavy schema holds up no step; `start` and `done` are polled by the
worker's loop. Masks are computed between forward passes by the thread that runs the step. Fuel limits bound both
(`grammar_check.limits`). Does not know tensors. Runs in the worker process.
"""

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.batch import Grammar, Row
from model.grammar_check import compiler_form, limits

log = logging.getLogger("slimpajama.worker")

MAX_KEPT_GRAMMARS = 64
NUM_THREADS = 2


class GrammarError(Exception):
    """A grammar that cannot be compiled for this checkpoint; the message is advice."""


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, state: LLMatcher, num_words: int) -> None:
        self._state = state
        self._words = np.zeros(num_words, np.int32)
        self.num_consumed = 0

    @property
    def finished(self) -> bool:
        """Nothing may follow but the end of the text."""
        return bool(self._state.is_stopped()) and not self._state.is_error()

    def advance(self, token_id: int) -> str | None:
        """Takes the next token; says what is wrong if the grammar forbids it or gives up."""
        if not self._state.consume_token(token_id):
            return f"cannot go on: {self._state.get_error()}"
        self.num_consumed += 1
        return None

    def catch_up(self, output_ids: Sequence[int]) -> str | None:
        """Takes what it has not seen of a sequence's ids; starts over if the sequence went back (a failed step)."""
        if self.num_consumed > len(output_ids):
            self._state.reset()
            self.num_consumed = 0
        for token_id in output_ids[self.num_consumed :]:
            error = self.advance(token_id)
            if error is not None:
                return error
        return None

    def fill_mask(self, bits: NDArray[np.int32]) -> str | None:
        """Writes which tokens may come next, one bit each, low bit first."""
        if self._state.is_error():
            return f"cannot go on: {self._state.get_error()}"
        self._state.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._state.is_error():
            return f"is too complex here: {self._state.get_error()}"
        # The compiler counts the tokenizer's ids too where they are more than the network's.
        bits[:] = self._words[: len(bits)]
        return None


@dataclass(frozen=True, slots=True)
class _Pending:
    future: "Future[Matcher]"
    deadline: float


class GrammarCompiler:
    """Grammars of one checkpoint. All methods are for the worker's main thread."""

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_ids: Sequence[int],
        *,
        timeout_seconds: float = 10.0,
        wake: Callable[[], None] | None = None,
    ) -> None:
        """`wake` is called, on a compiling thread, whenever `done` has something new to tell."""
        self._wake = wake
        self._vocabulary = _Vocabulary(tokenizer_json, vocab_size, list(eos_ids))
        self._timeout_seconds = timeout_seconds
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._pending: dict[int, _Pending] = {}
        self._matchers: dict[int, Matcher] = {}

    def start(self, sequence_id: int, grammar: Grammar, output_ids: Sequence[int] = ()) -> None:
        """Begins to compile for a sequence that has `output_ids` already; `done` will tell of it."""
        future = self._pool.submit(self._vocabulary.matcher, grammar, list(output_ids))
        self._pending[sequence_id] = _Pending(future, time.monotonic() + self._timeout_seconds)
        if self._wake is not None:
            wake = self._wake
            future.add_done_callback(lambda _: wake())

    @property
    def any_done(self) -> bool:
        now = time.monotonic()
        return any(pending.future.done() or now > pending.deadline for pending in self._pending.values())

    def done(self) -> list[tuple[int, str | None]]:
        """The sequences whose grammar became ready since the last call, or failed, with the reason."""
        now = time.monotonic()
        found: list[tuple[int, str | None]] = []
        for sequence_id, pending in list(self._pending.items()):
            if pending.future.done():
                found.append((sequence_id, self._take(sequence_id, pending)))
            elif now > pending.deadline:
                del self._pending[sequence_id]
                pending.future.cancel()
                limit = self._timeout_seconds
                found.append((sequence_id, f"took more than {limit:g} seconds to compile; simplify it"))
        return found

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended."""
        pending = self._pending.pop(sequence_id, None)
        if pending is not None:
            pending.future.cancel()
        self._matchers.pop(sequence_id, None)

    def matcher(self, sequence_id: int) -> Matcher | None:
        return self._matchers.get(sequence_id)

    def fill_mask(self, row: Row, bits: NDArray[np.int32]) -> str | None:
        """The mask for a row's next token, after all its output so far; says what is wrong if there can be none."""
        matcher = self._matchers.get(row.sequence_id)
        if matcher is None:
            assert row.sampling.grammar is not None
            self.start(row.sequence_id, row.sampling.grammar, row.output_ids)
            pending = self._pending[row.sequence_id]
            try:
                pending.future.exception(self._timeout_seconds)
            except TimeoutError:
                del self._pending[row.sequence_id]
                return f"took more than {self._timeout_seconds:g} seconds to compile; simplify it"
            error = self._take(row.sequence_id, pending)
            if error is not None:
                return error
            matcher = self._matchers[row.sequence_id]
        return matcher.catch_up(row.output_ids) or matcher.fill_mask(bits)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, sequence_id: int, pending: _Pending) -> str | None:
        del self._pending[sequence_id]
        fault = pending.future.exception()
        if fault is None:
            self._matchers[sequence_id] = pending.future.result()
            return None
        if isinstance(fault, GrammarError):
            return str(fault)
        # The compiler's own fault (a panic of the native library) is no reason for other sequences to end.
        log.error("a grammar broke its compiler", exc_info=fault)
        return "does not compile: it breaks the grammar compiler"


class _Vocabulary:
    """A tokenizer in the compiler's form, made when first needed, and the grammars compiled for it."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: list[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar, output_ids: list[int]) -> Matcher:
        """Raises: GrammarError."""
        tokenizer = self._get_tokenizer()
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = LLMatcher(tokenizer, _form(grammar), log_level=0, limits=limits())
            if compiled.is_error():
                raise GrammarError(f"does not compile: {compiled.get_error()}")
            with self._lock:
                self._compiled[grammar] = compiled
                while len(self._compiled) > MAX_KEPT_GRAMMARS:
                    self._compiled.popitem(last=False)
        with self._lock:
            own = compiled.deep_copy()
        matcher = Matcher(own, -(-tokenizer.vocab_size // 32))
        error = matcher.catch_up(output_ids)
        if error is not None:
            raise GrammarError(error)
        return matcher

    def _get_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                tokenizer = Tokenizer.from_str(self._tokenizer_json)
                tokenizer.no_padding()
                tokenizer.no_truncation()
                num_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
                try:
                    self._tokenizer = LLTokenizer(
                        _known_decoder(tokenizer.to_str()),
                        n_vocab=max(num_ids, self._vocab_size),
                        eos_token=self._eos_ids,
                    )
                except ValueError as fault:
                    raise GrammarError(f"this checkpoint's tokenizer takes none: {fault}") from fault
            return self._tokenizer


def _known_decoder(tokenizer_json: str) -> str:
    """The same tokenizer with its `Metaspace` decoder (T5, Marian) in the form that Llama 2 has, which means the same.

    The compiler knows that one alone.
    """
    tokenizer = json.loads(tokenizer_json)
    decoder = tokenizer.get("decoder") or {}
    if decoder.get("type") != "Metaspace":
        return tokenizer_json
    space = {"type": "Replace", "pattern": {"String": decoder.get("replacement", "\u2581")}, "content": " "}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(tokenizer)


def _form(grammar: Grammar) -> str:
    try:
        return compiler_form(grammar)
    except ValueError as fault:
        raise GrammarError(f"does not compile: {fault}") from fault
