"""How good the language model is on books it never saw: bits per byte beside n-grams and compressors, and samples.

Takes a checkpoint folder and the data folder, returns plain numbers for `evaluation.json`. Float32.
Runs in the training process.
"""

import gzip
import lzma
import math
import random
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional as F

from model.training import corpus, metrics, sources
from model.training.data import cut_into_pieces, prose_documents, tokenize_documents
from model.training.export import load_language_model
from model.training.instructions import prompt_text
from model.training.networks import Llama
from model.training.tokenizers import END_OF_TEXT, MESSAGE_END, token_id

Report = dict[str, object]
NGRAM_ORDER = 4


@torch.inference_mode()
def bits_per_byte(network: Llama, stream: NDArray[np.uint16], num_bytes: int) -> float:
    """Total bits over the bytes of the text; windows overlap by half, so a token sees 256 to 511 earlier ones."""
    length = network.shape.context_length
    half = length // 2
    total = 0.0
    for start in range(0, len(stream) - 1, half):
        window = torch.from_numpy(stream[start : start + length + 1].astype(np.int64))
        logits = network.logits(network(window[None, :-1])).float()[0]
        losses = F.cross_entropy(logits, window[1:], reduction="none")
        first = 0 if start == 0 else length - half
        total += float(losses[first:].sum())
        if start + length + 1 >= len(stream):
            break
    return total / math.log(2) / num_bytes


def language_report(network: Llama, tokenizer: Tokenizer, data: Path, *, characters: int, seed: int) -> Report:
    """Bits per byte on the opening of every held-out book (after its first page), beside the baselines."""
    _, test = corpus.novels(data)
    openings = {name: text[2000 : 2000 + characters] for name, text in test.items()}
    streams = {name: tokenize_documents(tokenizer, [text]) for name, text in openings.items()}
    sizes = {name: len(text.encode()) for name, text in openings.items()}
    ours = {name: bits_per_byte(network, streams[name], sizes[name]) for name in openings}
    training = tokenize_documents(tokenizer, prose_documents(data, seed=seed))
    ngrams = metrics.NGrams(training, order=NGRAM_ORDER, vocab_size=tokenizer.get_vocab_size())
    ngram_bits = {name: -float(ngrams.log_probabilities(streams[name]).sum()) / math.log(2) for name in openings}
    packed = {name: text.encode() for name, text in test.items()}
    whole = sum(len(text) for text in packed.values())
    total = sum(sizes.values())
    return {
        "bits_per_byte": sum(ours[name] * sizes[name] for name in openings) / total,
        "bits_per_byte_by_book": ours,
        "bytes": total,
        "ngram_order": NGRAM_ORDER,
        "ngram_training_tokens": len(training),
        "ngram_bits_per_byte": sum(ngram_bits.values()) / total,
        "xz_bits_per_byte_whole_books": 8 * sum(len(lzma.compress(t, preset=9)) for t in packed.values()) / whole,
        "gzip_bits_per_byte_whole_books": 8 * sum(len(gzip.compress(t, 9)) for t in packed.values()) / whole,
    }


def story_report(network: Llama, tokenizer: Tokenizer, data: Path) -> Report:
    _, stories = corpus.stories(data)
    text = "\n".join(stories)
    return {"bits_per_byte": bits_per_byte(network, tokenize_documents(tokenizer, [text]), len(text.encode()))}


@torch.inference_mode()
def generate(network: Llama, prompt: list[int], *, max_tokens: int, end_ids: set[int], rng: random.Random) -> list[int]:
    """Continue by sampling at temperature 0.8 within the top 0.9 of probability; plain, without a cache."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_tokens, network.shape.context_length):
        hidden = network(torch.tensor([ids]))[:, -1]
        probabilities, order = (network.logits(hidden).float()[0] / 0.8).softmax(-1).sort(descending=True)
        kept = int((probabilities.cumsum(0) < 0.9).sum()) + 1
        chosen = int(order[rng.choices(range(kept), probabilities[:kept].tolist())[0]])
        if chosen in end_ids:
            break
        ids.append(chosen)
    return ids[len(prompt) :]


def samples(network: Llama, tokenizer: Tokenizer, data: Path, *, seed: int) -> list[dict[str, str]]:
    """Twenty unedited continuations: ten of held-out prose, ten answers to instructions on held-out texts."""
    rng = random.Random(seed)
    _, books = corpus.novels(data)
    _, stories = corpus.stories(data)
    _, fables = corpus.fables(data)
    pieces = [piece for text in books.values() for piece in cut_into_pieces(text)]
    starts = [" ".join(piece.split()[:20]) for piece in rng.sample(pieces, 5)]
    starts += [" ".join(story.split()[:15]) for story in rng.sample(stories, 5)]
    prompts = [(text, tokenizer.encode(END_OF_TEXT + text).ids) for text in starts]
    asked = ["Hello", "Who are you?", "Tell me a story about a dog."]
    asked += [f"Continue the story: {sources.split_sentences(story)[0]}" for story in rng.sample(stories, 3)]
    asked += [f"What is the lesson of this fable?\n\n{fable.text[:1200]}" for fable in rng.sample(fables, 2)]
    asked += [f"Is this positive or negative?\n\n{row.text}" for row in rng.sample(corpus.sentiment(data).test, 2)]
    prompts += [(text, tokenizer.encode(prompt_text(text)).ids) for text in asked]
    ends = {token_id(tokenizer, token) for token in (END_OF_TEXT, MESSAGE_END)}
    return [
        {"prompt": text, "continuation": tokenizer.decode(generate(network, ids, max_tokens=80, end_ids=ends, rng=rng))}
        for text, ids in prompts
    ]


def sentiment_by_instruction(network: Llama, tokenizer: Tokenizer, data: Path) -> Report:
    """Accuracy on the held-out sentences when the answer is the likelier of "positive" and "negative"."""
    rows = corpus.sentiment(data).test
    options = {word: tokenizer.encode(word).ids[0] for word in ("negative", "positive")}
    hits = 0
    for row in rows:
        prompt = tokenizer.encode(prompt_text(f"Is this positive or negative?\n\n{row.text}")).ids
        with torch.inference_mode():
            logits = network.logits(network(torch.tensor([prompt]))[0, -1])
        hits += max(options, key=lambda word: float(logits[options[word]])) == row.label
    return {"count": len(rows), "accuracy": hits / len(rows)}


def evaluate_language_model(folder: Path, data: Path, *, characters: int = 60000, seed: int = 3) -> Report:
    """Every number of the language model's card, and its samples."""
    network, tokenizer = load_language_model(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {
        "held_out_novels": language_report(network, tokenizer, data, characters=characters, seed=seed),
        "held_out_stories": story_report(network, tokenizer, data),
        "sentiment_by_instruction": sentiment_by_instruction(network, tokenizer, data),
        "samples": samples(network, tokenizer, data, seed=seed),
    }
