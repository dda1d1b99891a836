"""The head that finds proper names: one linear map over every token's state, fitted on the finished, frozen body.

    python -m model.training.name_head DATA CHECKPOINT     gives an encoder that is there the head and its numbers

Whether it beats looking words up is judged on the held-out novels. Runs in the training process.

Legend: T tokens learnt from, of all sentences together, E hidden size.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from torch.nn import functional as F

from model.training import corpus, metrics, sources
from model.training.cards import render_card
from model.training.export import load_encoder
from model.training.heads import Head, HeadConfig, best_temperature, head_token_states, load_head, save_head
from model.training.names import Word, gaps_inside_names, known_names, sentences_with_names, words_of
from model.training.networks import Bert
from model.training.refit import hold_back, refit
from model.training.teacher import MAX_TOKENS
from model.training.tokenizers import load_tokenizer

NAME = "names"
CONFIG = HeadConfig("token", "tokens", ("O", "NAME"), MAX_TOKENS)
SEED = 13
PER_BOOK, ENCYCLOPEDIA, PER_HELD_OUT_BOOK = 60, 1500, 400


def training_sentences(data: Path) -> list[str]:
    books, _ = corpus.novels(data)
    found = sentences_with_names(books.values(), per_text=PER_BOOK, seed=SEED)
    return found + sentences_with_names(["\n".join(sources.wikitext(data))], per_text=ENCYCLOPEDIA, seed=SEED)


def token_targets(sentence: str, encoding: Encoding) -> list[int | None]:
    """Each token's class, None where it is not to be learnt: special tokens, and words whose capital says nothing."""
    words = words_of(sentence)
    by_character: list[int | None] = [0] * len(sentence)
    for word in words:
        by_character[word.start : word.end] = [None if word.is_name is None else int(word.is_name)] * len(word.text)
    for start, end in gaps_inside_names(sentence, words):
        by_character[start:end] = [1] * (end - start)
    return [by_character[start] if end > start else None for start, end in encoding.offsets]


def _examples(network: Bert, head: Head, tokenizer: Tokenizer, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(states [T, E], classes [T]) of the tokens that are learnt from."""
    encodings = tokenizer.encode_batch(list(sentences))
    states = head_token_states(network, head, [encoding.ids for encoding in encodings])
    targets = [token_targets(sentence, encoding) for sentence, encoding in zip(sentences, encodings, strict=True)]
    chosen = [rows[[target is not None for target in wanted]] for rows, wanted in zip(states, targets, strict=True)]
    return torch.cat(chosen), torch.tensor([target for wanted in targets for target in wanted if target is not None])


def fit_name_head(network: Bert, tokenizer: Tokenizer, data: Path) -> tuple[Head, float]:
    """The head and its temperature; sentences held back choose both its strength and that."""
    head, (train, held) = Head(CONFIG, network.shape.hidden_size), hold_back(training_sentences(data))
    with torch.no_grad():
        head.weight.zero_()
    states, targets = _examples(network, head, tokenizer, train)
    judged, wanted = _examples(network, head, tokenizer, held)
    refit(head, (states, targets), (judged, wanted))
    return head.eval(), best_temperature(F.linear(judged, head.weight, head.bias).detach(), wanted)


@torch.inference_mode()
def find_names(network: Bert, tokenizer: Tokenizer, head: Head, sentences: Sequence[str]) -> list[list[bool]]:
    """For every word of every sentence whether its first token is a name's."""
    encodings = tokenizer.encode_batch(list(sentences))
    found = []
    for sentence, encoding, states in zip(
        sentences, encodings, head_token_states(network, head, [encoding.ids for encoding in encodings]), strict=True
    ):
        classes = F.linear(states, head.weight, head.bias).argmax(1).tolist()
        places = [encoding.char_to_token(word.start) for word in words_of(sentence)]
        found.append([place is not None and bool(classes[place]) for place in places])
    return found


def judge_names(network: Bert, tokenizer: Tokenizer, head: Head, data: Path) -> dict[str, object]:
    """Precision, recall and F1 over the words of held-out novels; beside it, what training calls a name."""
    sentences = sentences_with_names(corpus.novels(data)[1].values(), per_text=PER_HELD_OUT_BOOK, seed=SEED)
    words = [word for sentence in sentences for word in words_of(sentence)]
    found = [is_name for row in find_names(network, tokenizer, head, sentences) for is_name in row]
    training = training_sentences(data)
    known = known_names(training)
    looked_up = [known.get(word.text, False) for word in words]
    new_names = [is_name for word, is_name in zip(words, found, strict=True) if word.is_name and word.text not in known]
    return {
        "trained_on": len(training),
        "sentences": len(sentences),
        "names": sum(bool(word.is_name) for word in words),
        **_scores(words, found),
        "looked_up": _scores(words, looked_up),
        "new": {"names": len(new_names), "recall": sum(new_names) / len(new_names)},
    }


def _scores(words: Sequence[Word], found: Sequence[bool]) -> dict[str, float]:
    sure = [(is_name, word.is_name) for word, is_name in zip(words, found, strict=True) if word.is_name is not None]
    return metrics.precision_recall_f1([is_name for is_name, _ in sure], [bool(wanted) for _, wanted in sure])


def add_name_head(data: Path, checkpoint: Path) -> None:
    network, tokenizer = load_encoder(checkpoint), load_tokenizer(checkpoint, MAX_TOKENS)
    head, temperature = fit_name_head(network, tokenizer, data)
    save_head(head, checkpoint / "heads" / NAME, temperature=temperature)
    file = checkpoint / "evaluation.json"
    stored = load_head(checkpoint / "heads" / NAME)
    report = json.loads(file.read_text()) | {NAME: judge_names(network, tokenizer, stored, data)}
    file.write_text(json.dumps(report, indent=2) + "\n")
    (checkpoint / "README.md").write_text(render_card(checkpoint))


if __name__ == "__main__":
    add_name_head(Path(sys.argv[1]), Path(sys.argv[2]))
