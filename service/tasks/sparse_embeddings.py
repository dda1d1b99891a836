"""Sparse embeddings: of a text, the weights of the vocabulary's entries that say what it is about.

What a weight is the checkpoint says (`model.splade_config`), and the network computes. Knows neither HTTP nor tensors
beyond numpy. Runs in the API process.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.description import SPARSE_TASK
from service.engine.models import LoadedModel
from service.errors import PayloadTooLarge
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions, run_texts, tokenize

__all__ = ["SPARSE_TASK", "embed_sparse", "entries_of"]


async def embed_sparse(
    engine: EncodeEngine,
    model: LoadedModel,
    texts: Sequence[str],
    options: EncodeOptions,
    *,
    prompt: str = "",
    max_entries: int,
) -> list[EncodedText]:
    """One vector per text, in `values`: float32 [2, N], as `entries_of` reads it.

    Raises: PayloadTooLarge if the vectors have more than `max_entries` together. How many they have is known only as
    they come; the texts that are left are not read then.
    """
    encoded = await tokenize(model, texts, room=options.room(), prompt=prompt)
    try:
        # An entry is two numbers: its id and its weight.
        await run_texts(engine, model, encoded, "sparse_embedding", options, max_numbers=2 * max_entries)
    except PayloadTooLarge as error:
        raise PayloadTooLarge(
            f"the {len(texts):,} vectors have more than {max_entries:,} entries that are not zero, which is the limit "
            "of an answer. Send fewer texts at once"
        ) from error
    return encoded


def entries_of(vector: NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """The ids of the vocabulary's entries that are not zero, ascending, and their weights.

    Worked example: [[5, 9], [0.5, 1.25]] gives [5, 9] and [0.5, 1.25].
    """
    ids, weights = vector
    return ids.astype(np.int64).tolist(), weights.tolist()
