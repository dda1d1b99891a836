"""Runs single-pass work: any mixture of texts in one packed forward, a numpy array or an error for each.

Which texts share a step is the batcher's decision, and what the numbers mean the API's; requests are unknown here.
Runs in the worker process.

Legend: T tokens packed in the step, B texts, E hidden size, L outputs of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.attend import PackedAttend
from model.attention.interface import AttentionBackend, PackedLayout
from model.config import EncoderConfig
from model.encode_network import EncodeNetwork, EncodeOutput
from model.pooling import Span
from model.transfer import upload

Result = NDArray[np.float32] | str
Found = Tensor | list[NDArray[np.float32]]
"""What a part gives of one kind, on the device; or here already, text by text."""
Wish = tuple[EncodeOutput, str]
"""An output, and the head that gives it."""
PER_TEXT: frozenset[EncodeOutput] = frozenset({"embedding", "logits"})
PART_TOKENS = 16384
"""Tokens that keep a GPU busy for longer than it takes to make as many ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeItem:
    """A text (or pair) with its special tokens, and what is wanted of it."""

    ids: Sequence[int]
    output: EncodeOutput
    type_ids: Sequence[int] = ()
    """Empty means zeros."""
    skip_pooling: int = 0
    """Leading prompt tokens that pooling leaves out."""
    head: str = ""
    """The task head that is asked; empty: the checkpoint's own."""


class EncoderRunner:
    """One checkpoint on one device."""

    def __init__(self, network: EncodeNetwork, backend: AttentionBackend, device: torch.device | str = "cpu") -> None:
        self.network = network
        self.backend = backend
        self.device = torch.device(device)
        self._part_tokens = PART_TOKENS if self.device.type == "cuda" else None
        config = network.config
        self.context_length = config.context_length
        self._vocab_size = config.vocab_size
        encoder = config if isinstance(config, EncoderConfig) else None
        self._num_token_types = encoder.num_token_types if encoder else 0
        self._pad_id = encoder.pad_id if encoder else None

    def fault(self, item: EncodeItem) -> str | None:
        """Why an item cannot be run, as advice; None if it can."""
        if item.head and item.head not in self.network.task_heads:
            return f"this checkpoint has no head '{item.head}'"
        offered = self.network.outputs_of(item.head)
        if item.output not in offered:
            giver = f"the head '{item.head}'" if item.head else "this checkpoint"
            return f"{giver} gives {', '.join(sorted(offered))}, not {item.output}"
        if not item.ids:
            return "the input has no tokens"
        if len(item.ids) > self.context_length:
            return f"the input has {len(item.ids):,} tokens; the limit is {self.context_length:,}"
        if item.type_ids and len(item.type_ids) != len(item.ids):
            return f"the input has {len(item.ids):,} tokens and {len(item.type_ids):,} token types"
        if min(item.ids) < 0 or max(item.ids) >= self._vocab_size:
            return f"the input has a token id outside this checkpoint's vocabulary of {self._vocab_size:,}"
        types = self._num_token_types
        if types and item.type_ids and not 0 <= min(item.type_ids) <= max(item.type_ids) < types:
            return f"the input has a token type outside this checkpoint's {types:,}"
        return None

    @torch.inference_mode()
    def run(self, items: Sequence[EncodeItem]) -> list[Result]:
        """One result per item, in order: an array of float32, or what is wrong with that item alone.

        Shapes: embedding [size], token_embeddings [n, E], logits [L], token_logits and span_logits [n, L];
        sparse_embedding [2, N], the ids of the entries that are not zero and their weights.
        """
        results: list[Result | None] = [self.fault(item) for item in items]
        sound = [index for index, fault in enumerate(results) if fault is None]
        if sound:
            chosen = [items[index] for index in sound]
            for index, values in zip(sound, self._values(chosen), strict=True):
                results[index] = "the checkpoint's output for this input is not finite" if values is None else values
        return [result for result in results if result is not None]

    def recover(self) -> None:
        """After a step that raised: gives unused memory back.

        Raises where the fault stays with the device (a kernel's assertion): nothing can be computed any more.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _values(self, items: Sequence[EncodeItem]) -> list[NDArray[np.float32] | None]:
        """What is wanted of each item, or None where it is not finite."""
        # All is queued before any is waited for: the device computes a part while the next is made ready.
        queued = [(part, *self._queue(part)) for part in self._parts(items)]
        return [values for part in queued for values in _collect(*part)]

    def _parts(self, items: Sequence[EncodeItem]) -> list[Sequence[EncodeItem]]:
        """On a GPU runs of items, each as many as it takes to keep it busy; elsewhere all of them."""
        if self._part_tokens is None:
            return [items]
        ends = np.cumsum([len(item.ids) for item in items])
        firsts = np.unique((ends - 1) // self._part_tokens, return_index=True)[1].tolist()
        return [items[begin:end] for begin, end in pairwise([*firsts, len(items)])]

    def _queue(self, items: Sequence[EncodeItem]) -> tuple[list[Span], dict[Wish, Found]]:
        """Where each item's tokens are in the part, and what is wanted of its items, on the device."""
        hidden, spans = self._hidden(items)
        found: dict[Wish, Found] = {}
        for output, head in {(item.output, item.head) for item in items}:
            chosen = [
                span for item, span in zip(items, spans, strict=True) if (item.output, item.head) == (output, head)
            ]
            if output in PER_TEXT:
                found[output, head] = self.network.per_text(hidden, chosen, head)
            elif output == "sparse_embedding":
                found[output, head] = self.network.sparse(hidden, chosen)
            else:
                found[output, head] = hidden if output == "token_embeddings" else self.network.per_token(hidden, head)
        return spans, found

    def _hidden(self, items: Sequence[EncodeItem]) -> tuple[Tensor, list[Span]]:
        """The items' states, end to end [T, E], and where each item's are."""
        lengths = [len(item.ids) for item in items]
        starts = list(accumulate(lengths, initial=0))
        spans = [Span(*ends, item.skip_pooling) for item, ends in zip(items, pairwise(starts), strict=True)]
        ids = np.concatenate([np.asarray(item.ids, dtype=np.int64) for item in items])
        type_ids = np.zeros(len(ids), dtype=np.int64)
        for item, span in zip(items, spans, strict=True):
            if item.type_ids:
                type_ids[span.start : span.end] = item.type_ids
        places = positions(ids, np.array(starts, np.int64), self._pad_id)
        *arrays, boundaries = upload([ids, type_ids, places, np.array(starts, np.int32)], self.device)
        layout = PackedLayout(starts=boundaries, max_len=max(lengths))
        hidden: Tensor = self.network(*arrays, PackedAttend(layout, self.backend))
        return hidden, spans


def positions(ids: NDArray[np.int64], starts: NDArray[np.int64], pad_id: int | None) -> NDArray[np.int64]:
    """Each token's position in its text, from 0.

    Worked example, where a padding id 1 takes up no position (RoBERTa): ids 0 7 1 8 give 0 1 -1 2.
    """
    lengths = starts[1:] - starts[:-1]
    if pad_id is None or not (ids == pad_id).any():
        return np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
    counted = ids != pad_id
    before = np.concatenate(([0], np.cumsum(counted)))  # counted tokens before each token
    return np.where(counted, before[:-1] - np.repeat(before[starts[:-1]], lengths), -1)


def _collect(
    items: Sequence[EncodeItem], spans: Sequence[Span], found: Mapping[Wish, Found]
) -> list[NDArray[np.float32] | None]:
    """Waits for the device: what is wanted of each item of the part, or None where it is not finite."""
    values: dict[int, NDArray[np.float32] | None] = {}
    for (output, head), tensor in found.items():
        places = [place for place, item in enumerate(items) if (item.output, item.head) == (output, head)]
        if isinstance(tensor, list):
            parts, finite = tensor, False
        else:
            array: NDArray[np.float32] = tensor.float().cpu().numpy()
            whole = output in PER_TEXT
            parts = list(array) if whole else [array[spans[place].start : spans[place].end] for place in places]
            finite = bool(np.isfinite(array).all())  # asked of each item only where it is not so of all
        values |= {
            place: part if finite or np.isfinite(part).all() else None
            for place, part in zip(places, parts, strict=True)
        }
    return [values[place] for place in range(len(items))]
