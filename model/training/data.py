"""From text to batches: token streams packed into windows, and padded conversations with a mask over the answer.

A batch is a pure function of (seed, step), so a resumed run sees exactly what an uninterrupted one would have seen.
Runs in the training process.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.training import corpus, sources
from model.training.tokenizers import END_OF_TEXT

IGNORED = -100
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
    """What the language model reads: pieces of novels, stories, fables and encyclopedia paragraphs, shuffled."""
    books, _ = corpus.novels(data)
    documents = [piece for text in books.values() for piece in cut_into_pieces(text)]
    story_rows, _ = corpus.stories(data)
    fable_rows, _ = corpus.fables(data)
    told = [f"{fable.title}\n\n{fable.text}\n\n{fable.lesson}\n" for fable in fable_rows]
    documents += (story_rows + told) * story_copies
    documents += sources.wikitext(data)
    random.Random(seed).shuffle(documents)
    return documents


def tokenize_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> NDArray[np.uint16]:
    """All documents as one stream of ids, an end-of-text token before each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[NDArray[np.uint16]] = []
    for start in range(0, len(documents), 512):
        encodings = tokenizer.encode_batch(list(documents[start : start + 512]))
        stream += [np.array([end, *encoding.ids], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(stream)


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """A stream cut into windows of `length` + 1 ids; every epoch visits all windows in a new seeded order."""

    stream: NDArray[np.uint16]
    length: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), both [batch_size, length], of one step."""
        num_windows = (len(self.stream) - 1) // self.length
        rows = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, position = divmod(index, num_windows)
            window = int(_order(num_windows, self.seed + epoch)[position])
            rows.append(self.stream[window * self.length : (window + 1) * self.length + 1])
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]


def _order(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)


@dataclass(frozen=True, slots=True)
class MaskedExamples:
    """Examples of (ids, index of the first id to learn), padded per batch; the prompt's ids carry no loss."""

    examples: Sequence[tuple[list[int], int]]
    length: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) [batch_size, longest], targets of the prompt and of the padding `IGNORED`."""
        rows = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, position = divmod(index, len(self.examples))
            rows.append(self.examples[int(_order(len(self.examples), self.seed + epoch)[position])])
        longest = min(self.length, max(len(ids) for ids, _ in rows) - 1)
        inputs = torch.zeros(len(rows), longest, dtype=torch.long)
        targets = torch.full((len(rows), longest), IGNORED)
        for row, (ids, first) in enumerate(rows):
            kept = torch.tensor(ids[: longest + 1])
            inputs[row, : len(kept) - 1] = kept[:-1]
            targets[row, max(first - 1, 0) : len(kept) - 1] = kept[max(first, 1) :]
        return inputs, targets
