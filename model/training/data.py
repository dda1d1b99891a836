"""From text to batches: token streams packed into windows, and padded conversations whose answers carry the loss.

A batch is (inputs, targets, weights), each [B, L]; a weight says how much its target counts. It is a pure function of
(seed, step), so a resumed run sees what an uninterrupted one would have seen. The tokens lie on the device.
Runs in the training process.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.training import corpus, sources
from model.training.tables import MULTIPLE
from model.training.tokenizers import END_OF_TEXT

Batch = tuple[Tensor, Tensor, Tensor]
PIECE_CHARACTERS = 6000


def cut_into_pieces(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """A long text as consecutive pieces of about `size` characters that end where a line ends."""
    pieces, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + size)
        stop = len(text) if stop < 0 else stop + 1
        pieces.append(text[start:stop])
        start = stop
    return pieces


def prose_documents(data: Path, *, seed: int, story_copies: int = 2) -> list[str]:
    """What the language model reads: novels in pieces, stories, fables, reviews, encyclopedia paragraphs, shuffled."""
    books, _ = corpus.novels(data)
    documents = [piece for text in books.values() for piece in cut_into_pieces(text)]
    story_rows, _ = corpus.stories(data)
    fable_rows, _ = corpus.fables(data)
    told = [f"{fable.title}\n\n{fable.text}\n\n{fable.lesson}\n" for fable in fable_rows]
    documents += (story_rows + told) * story_copies
    documents += sources.wikitext(data) + [review.text for review in sources.movie_reviews(data)]
    random.Random(seed).shuffle(documents)
    return documents


def tokenize_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> NDArray[np.uint16]:
    """All documents as one stream of ids, an end-of-text token before each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[NDArray[np.uint16]] = []
    for start in range(0, len(documents), 2048):
        encodings = tokenizer.encode_batch_fast(list(documents[start : start + 2048]))
        stream += [np.array([end, *encoding.ids], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(stream)


@lru_cache(maxsize=8)
def _order(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)


def _epoch_rows(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of one step; every epoch takes all `count` rows once, in a new order."""
    places = (divmod(index, count) for index in range(step * batch_size, (step + 1) * batch_size))
    return [int(_order(count, seed + epoch)[position]) for epoch, position in places]


class PackedTokens:
    """A stream cut into windows of `length` + 1 ids; every epoch visits all windows in a new seeded order."""

    def __init__(
        self, stream: NDArray[np.uint16], length: int, batch_size: int, *, seed: int, device: str = "cpu"
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.num_windows = (len(stream) - 1) // length
        self._stream = torch.from_numpy(stream.astype(np.int32)).to(device)

    def batch(self, step: int) -> Batch:
        """One step's windows; every target counts 1."""
        rows = _epoch_rows(self.num_windows, self.batch_size, step, self.seed)
        starts = torch.tensor(rows, device=self._stream.device) * self.length
        offsets = torch.arange(self.length + 1, device=self._stream.device)
        ids = self._stream[starts[:, None] + offsets].long()
        return ids[:, :-1], ids[:, 1:], torch.ones(len(rows), self.length, device=ids.device)


class MaskedExamples:
    """Examples of (ids, index of the first id to learn), padded per batch; the prompt's ids carry no loss.

    The targets of an answer of N ids count 1 / sqrt(N) each: a one-word answer is not drowned by a story.
    """

    def __init__(
        self,
        examples: Sequence[tuple[list[int], int]],
        length: int,
        batch_size: int,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.batch_size, self.seed, self.length = batch_size, seed, length
        self._sizes = np.array([min(length, len(ids) - 1) for ids, _ in examples])
        ids = np.zeros((len(examples), length + 1), dtype=np.int32)
        weights = np.zeros((len(examples), length), dtype=np.float32)
        for row, (given, first) in enumerate(examples):
            kept, learnt = given[: length + 1], slice(max(first - 1, 0), min(length, len(given) - 1))
            ids[row, : len(kept)] = kept
            weights[row, learnt] = max(1, learnt.stop - learnt.start) ** -0.5
        self._ids, self._weights = torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device)

    def batch(self, step: int) -> Batch:
        """One step's examples, as long as the longest of them."""
        rows = _epoch_rows(len(self._sizes), self.batch_size, step, self.seed)
        longest = min(self.length, -(-int(self._sizes[rows].max()) // MULTIPLE) * MULTIPLE)
        index = torch.tensor(rows, device=self._ids.device)
        ids = self._ids[index, : longest + 1].long()
        return ids[:, :-1], ids[:, 1:], self._weights[index, :longest]
