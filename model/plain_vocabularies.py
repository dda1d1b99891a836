"""Tokenizers of checkpoints that have a plain vocabulary and no `tokenizer.json`.

It is WordPiece's `vocab.txt`, or the `vocab.json` and `merges.txt` of byte-level BPE: many older checkpoints have
nothing else. Runs in the API process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from model.architectures.raw import read_json
from model.errors import CheckpointError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The special tokens of a family, where its files name no others."""

    start: str
    end: str
    unknown: str
    mask: str
    padding: str


BERT = Marks(start="[CLS]", end="[SEP]", unknown="[UNK]", mask="[MASK]", padding="[PAD]")
MPNET = Marks(start="<s>", end="</s>", unknown="[UNK]", mask="<mask>", padding="<pad>")
ROBERTA = Marks(start="<s>", end="</s>", unknown="<unk>", mask="<mask>", padding="<pad>")
WORDPIECE: Mapping[str, Marks] = {
    **dict.fromkeys(("bert", "distilbert", "electra", "ernie", "megatron-bert", "nomic_bert"), BERT),
    "mpnet": MPNET,
}
BYTE_LEVEL: Mapping[str, Marks | None] = {
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "data2vec-text", "bart"), ROBERTA),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "codegen", "opt"), None),
}
"""None: nothing is put around a text, unless the config asks for a start."""
TEXT_END = "<|endoftext|>"


def plain_backend(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder without `tokenizer.json`; None if its files are none that are known here.

    Raises: CheckpointError for a file that is not what it should be.
    """
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    names = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    config: dict[str, Any] = {}
    for path in names:
        config |= read_json(path) if path.is_file() else {}
    kind = str(raw.get("model_type"))
    if kind in WORDPIECE and (folder / "vocab.txt").is_file():
        return _wordpiece(folder / "vocab.txt", config, named(WORDPIECE[kind], config), doubled=kind == "mpnet")
    if kind in BYTE_LEVEL and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        marks = BYTE_LEVEL[kind]
        return _byte_level(folder, config, None if marks is None else named(marks, config))
    return None


def named(marks: Marks, config: Config) -> Marks:
    """As the config names them, where it does."""
    return Marks(
        start=text_of(config, "cls_token", marks.start),
        end=text_of(config, "sep_token", marks.end),
        unknown=text_of(config, "unk_token", marks.unknown),
        mask=text_of(config, "mask_token", marks.mask),
        padding=text_of(config, "pad_token", marks.padding),
    )


def text_of(config: Config, role: str, usual: str) -> str:
    """The token that a config names for a role like `cls_token`, as a text or as an entry with its properties."""
    value = config.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else usual


def _wordpiece(path: Path, config: Config, marks: Marks, *, doubled: bool) -> Tokenizer:
    """`doubled`: two closing tokens stand between the texts of a pair, which are of one type."""
    try:
        tokens = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not UTF-8: {error}", file=path.name) from error
    tokens = tokens[:-1] if tokens[-1] == "" else tokens
    vocabulary = {token.rstrip("\r"): id for id, token in enumerate(tokens)}
    _check(vocabulary, marks, path)
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=marks.unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    second = f"{marks.end} $B {marks.end}" if doubled else f"$B:1 {marks.end}:1"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{marks.start} $A {marks.end}",
        pair=f"{marks.start} $A {marks.end} {second}",
        special_tokens=[(token, vocabulary[token]) for token in (marks.start, marks.end)],
    )
    _add_marks(backend, vocabulary, marks, config)
    return backend


def _byte_level(folder: Path, config: Config, marks: Marks | None) -> Tokenizer:
    path, spaced = folder / "vocab.json", bool(config.get("add_prefix_space", False))
    vocabulary: dict[str, Any] = read_json(path)
    try:
        model = models.BPE.from_file(str(path), str(folder / "merges.txt"))
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"vocab.json and merges.txt cannot be read: {error}", file="merges.txt") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = decoders.ByteLevel()
    if marks is None:
        return _with_start(backend, vocabulary, config)
    _check(vocabulary, marks, path)
    backend.post_processor = processors.RobertaProcessing(
        sep=(marks.end, vocabulary[marks.end]),
        cls_token=(marks.start, vocabulary[marks.start]),
        trim_offsets=bool(config.get("trim_offsets", True)),
        add_prefix_space=spaced,
    )
    _add_marks(backend, vocabulary, marks, config)
    return backend


def _with_start(backend: Tokenizer, vocabulary: Mapping[str, Any], config: Config) -> Tokenizer:
    """GPT-2's: its marks are all the same token, unless the config names others (OPT); one may open a text."""
    usual = {"bos_token": TEXT_END, "eos_token": TEXT_END, "unk_token": TEXT_END, "pad_token": ""}
    marks = {role: text_of(config, role, token) for role, token in usual.items()}
    backend.add_special_tokens([token for token in dict.fromkeys(marks.values()) if token in vocabulary])
    start = marks["bos_token"]
    if not config.get("add_bos_token", False):
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    elif start in vocabulary:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, vocabulary[start])]
        )
    else:
        raise CheckpointError(f"vocab.json has no {start!r}, which is to open a text", file="vocab.json")
    return backend


def _check(vocabulary: Mapping[str, Any], marks: Marks, path: Path) -> None:
    for token in (marks.start, marks.end, marks.unknown):
        if token not in vocabulary:
            raise CheckpointError(f"{path.name} has no {token!r}", file=path.name)


def _add_marks(backend: Tokenizer, vocabulary: Mapping[str, Any], marks: Marks, config: Config) -> None:
    plain = [token for token in (marks.start, marks.padding, marks.end, marks.unknown) if token in vocabulary]
    backend.add_special_tokens(plain)
    if marks.mask in vocabulary:
        entry = config.get("mask_token")
        takes_space = isinstance(entry, dict) and bool(entry.get("lstrip"))
        backend.add_special_tokens([AddedToken(marks.mask, lstrip=takes_space, special=True)])
