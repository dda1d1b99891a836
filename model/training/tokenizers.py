"""The two vocabularies: a byte-level BPE trained on the corpus, and the teacher's WordPiece pruned to what is in use.

Written in the Hugging Face layout (tokenizer.json, tokenizer_config.json). Runs in the training process.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.training.tables import tokenize

END_OF_TEXT, PAD, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, MESSAGE_START, MESSAGE_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Words take their leading space; runs of at most three digits, so that numbers share pieces.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary is known to hold. Raises KeyError if it does not."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: no unknown tokens, exact round trip of any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_byte_bpe(tokenizer: Tokenizer, folder: Path, *, context_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": MESSAGE_END,
        "pad_token": PAD,
        "additional_special_tokens": [MESSAGE_START],
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def prune_word_pieces(teacher: Tokenizer, texts: Sequence[str], vocab_size: int) -> list[int]:
    """The teacher's ids to keep, ascending: special tokens, every ASCII character piece, then the pieces most in use.

    In use here and where the teacher's vocabulary was made: pieces are taken by the sum of their rank in the texts and
    their rank in that vocabulary, whose ids follow frequency.
    The order of the kept ids is that of the teacher, so row i of the student's embeddings is row kept[i] of its.
    """
    vocabulary = teacher.get_vocab()
    counts: Counter[int] = Counter()
    for ids in tokenize(teacher, texts):
        counts.update(ids[1:-1].tolist())
    always = [vocabulary[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    for piece, index in vocabulary.items():
        bare = piece.removeprefix("##")
        if len(bare) == 1 and bare.isascii():
            always.append(index)
    kept = dict.fromkeys(always)
    ranks = {index: rank for rank, (index, _) in enumerate(counts.most_common())}
    for index in sorted(ranks, key=lambda index: ranks[index] + index):
        if len(kept) >= vocab_size:
            break
        kept[index] = None
    return sorted(kept)


def dropped_words(teacher: Tokenizer, kept: Iterable[int]) -> list[str]:
    """The whole words of the teacher's vocabulary that are not kept."""
    left = set(kept)
    pieces = sorted(teacher.get_vocab().items(), key=lambda item: item[1])
    return [piece for piece, index in pieces if index not in left and len(piece) > 2 and piece.isalpha()]


def save_word_pieces(teacher: Tokenizer, kept: list[int], folder: Path, *, max_tokens: int) -> Tokenizer:
    """Write the pruned WordPiece tokenizer and return it."""
    document = json.loads(teacher.to_str())
    pieces = {index: piece for piece, index in teacher.get_vocab().items()}
    new_ids = {pieces[index]: new for new, index in enumerate(kept)}
    document["model"]["vocab"] = new_ids
    document["truncation"] = document["padding"] = None
    document["added_tokens"] = [{**token, "id": new_ids[token["content"]]} for token in document["added_tokens"]]
    for name, token in document["post_processor"].get("special_tokens", {}).items():
        token["ids"] = [new_ids[name]]
    if document["post_processor"]["type"] == "BertProcessing":
        document["post_processor"]["sep"] = ["[SEP]", new_ids["[SEP]"]]
        document["post_processor"]["cls"] = ["[CLS]", new_ids["[CLS]"]]
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False) + "\n")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_max_length": max_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "vocab.txt").write_text("\n".join(pieces[index] for index in kept) + "\n")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def load_tokenizer(folder: Path, max_tokens: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    return tokenizer
