"""Tokenizers of GGUF files, from the tokens, merges, scores and types that they list: as a checkpoint folder has them.

Three kinds are read: "gpt2" (byte-level BPE), "llama" (SentencePiece's BPE) and "bert" (WordPiece). What happens to a
text before it is cut is the kind's, or has a name (`model.gguf.pre_tokenizers`). API process.

Source: github.com/ggml-org/llama.cpp, docs and src/llama-vocab.cpp for the keys and for what holds where they are left
out.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models

from model.errors import CheckpointError
from model.gguf.facts import Facts
from model.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from model.sentencepiece_reader import ROLES, SPACE, Piece, SentencePieceModel, make_backend, put_around

ROLE_KEYS: Mapping[str, str] = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
"""Names in `tokenizer_config.json` to those within `tokenizer.ggml.*_token_id` (one of them misspelt there, too)."""
SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
ENDS_OF_TURNS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> <|return|> <|call|> <|calls|> <|flush|> "
    "<end_of_turn> <end_of_utterance> <EOT> _<EOT> [EOT] [EOS] <｜end▁of▁sentence｜>".split()
)
"""Tokens at which llama.cpp stops, too, and which it takes for control tokens, whatever type a file gives them.

Its list has those of architectures that are not read here, besides; `</s>`, one of them, is plain HTML to Gemma.
"""
CALLS, LAST_WORDS = {"<|call|>", "<|calls|>"}, {"<|return|>", "<|flush|>"}
"""Where a vocabulary has one of each, `<|end|>` ends a message within a turn and is no end."""
STRIPPING_NAMES = ("phi-3", "phi3", "phi 3")
"""Models (`general.name`) whose special tokens take the spaces behind them, all but these:"""
NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a file lists, by token id; `roles` are SentencePiece's (normal, control, user_defined, byte...)."""

    file: str
    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    special: Mapping[str, str] = field(default_factory=dict)
    """Roles like `bos_token` to tokens."""
    stripping: frozenset[str] = frozenset()
    """Tokens that take the spaces behind them."""

    def of_role(self, *roles: str) -> list[str]:
        return [token for token, role in zip(self.tokens, self.roles, strict=True) if role in roles]


def write_tokenizer(facts: Facts, folder: Path) -> dict[str, Any]:
    """Writes `tokenizer.json` or `vocab.txt` into the folder; returns what `tokenizer_config.json` shall say.

    Raises: CheckpointError (UnsupportedArchitectureError for a kind of tokenizer that is not read).
    """
    kind = facts.keys.text("tokenizer.ggml.model")
    vocabulary = _vocabulary(facts, kind)
    config: dict[str, Any] = dict(vocabulary.special)
    if kind == "bert":
        _write_words(vocabulary, folder / "vocab.txt")
        config |= _lowering(facts, vocabulary)
    elif kind in BACKENDS:
        # Written here: the library says nothing of a full disk that could be caught as such.
        (folder / "tokenizer.json").write_text(BACKENDS[kind](facts, vocabulary).to_str(), encoding="utf-8")
    else:
        raise facts.refused(f"tokenizers of the kind {kind!r} cannot be read, only of {', '.join((*BACKENDS, 'bert'))}")
    template = _chat_template(facts)
    return config if template is None else config | {"chat_template": template}


def ends_of_text(facts: Facts) -> list[int]:
    """The ids after which nothing is generated: of the text, of a turn, of a message."""
    found = [id for role in ("eos", "eot", "eom") if (id := facts.token_id(role)) is not None]
    tokens = _tokens(facts)
    ends = _ends_of_turns(tokens)
    found += [id for id, token in enumerate(tokens) if token in ends]
    return list(dict.fromkeys(found))


def _ends_of_turns(tokens: Sequence[str]) -> frozenset[str]:
    found = ENDS_OF_TURNS.intersection(tokens)
    return found - {"<|end|>"} if found & CALLS and found & LAST_WORDS else found


def _tokens(facts: Facts) -> tuple[str, ...]:
    """An empty text is none that could be found again: such tokens are given names."""
    tokens = facts.keys.texts("tokenizer.ggml.tokens")
    return tuple(token or f"[EMPTY_{id}]" for id, token in enumerate(tokens))


def _vocabulary(facts: Facts, kind: str) -> Vocabulary:
    tokens = _tokens(facts)
    if len(set(tokens)) != len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise CheckpointError(f"{facts.keys.file}: the token {twice!r} is there twice", file=facts.keys.file)
    ends, types = _ends_of_turns(tokens), _listed(facts, "token_type", len(tokens), 1)
    roles = [ROLES.get(type, "normal") for type in types]
    roles = ["control" if token in ends else role for token, role in zip(tokens, roles, strict=True)]
    strips = any(name in facts.keys.text("general.name", "").lower() for name in STRIPPING_NAMES)
    defaults = SENTENCEPIECE_IDS if kind == "llama" else {}
    return Vocabulary(
        file=facts.keys.file,
        tokens=tokens,
        roles=tuple(roles),
        scores=tuple(float(score) for score in _listed(facts, "scores", len(tokens), 0.0)),
        merges=_merges(facts),
        special={
            role: tokens[id]
            for role, name in ROLE_KEYS.items()
            if (id := facts.token_id(name, defaults.get(role))) is not None
        },
        stripping=_special_tokens(tokens, roles) - NOT_STRIPPING if strips else frozenset(),
    )


def _special_tokens(tokens: Sequence[str], roles: Sequence[str]) -> frozenset[str]:
    special = ("control", "user_defined", "unknown")
    return frozenset(token for token, role in zip(tokens, roles, strict=True) if role in special)


def _listed(facts: Facts, name: str, count: int, default: Any) -> list[Any]:
    """One number for each token."""
    key = f"tokenizer.ggml.{name}"
    if key not in facts.keys:
        return [default] * count
    if len(facts.keys.numbers(key)) != count:
        raise CheckpointError(
            f"{facts.keys.file}: {key!r} has {len(facts.keys.numbers(key)):,} entries for {count:,} tokens",
            file=facts.keys.file,
        )
    found: list[Any] = facts.keys.values[key]
    return found


def _merges(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Pairs, which are stored with a space between them."""
    key = "tokenizer.ggml.merges"
    listed = facts.keys.texts(key) if key in facts.keys else ()
    pairs = [(text[:place], text[place + 1 :]) for text in listed if (place := text.find(" ", 1)) > 0]
    if len(pairs) != len(listed):
        raise CheckpointError(f"{facts.keys.file}: {key!r} has an entry without a space", file=facts.keys.file)
    return tuple(pairs)


def _byte_level(facts: Facts, vocabulary: Vocabulary) -> Tokenizer:
    pre = _pre_tokenizer(facts)
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    try:
        backend = Tokenizer(models.BPE(ids, list(vocabulary.merges), ignore_merges=pre.whole_words))
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"{vocabulary.file}: its merges do not fit its tokens: {error}") from error
    if pre.normalizer is not None:
        backend.normalizer = pre.normalizer
    backend.pre_tokenizer = pre.steps
    backend.decoder = decoders.ByteLevel()
    strips = vocabulary.stripping
    own, special = vocabulary.of_role("user_defined"), vocabulary.of_role("control")
    backend.add_tokens([AddedToken(token, normalized=False, rstrip=token in strips) for token in own])
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True, rstrip=token in strips) for token in special]
    )
    return _marked(facts, vocabulary, backend, opened=pre.opened)


def _pre_tokenizer(facts: Facts) -> PreTokenizer:
    name = facts.keys.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise facts.refused(f"texts cannot be cut as {name!r} does; known are {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _sentencepiece(facts: Facts, vocabulary: Vocabulary) -> Tokenizer:
    """Merges follow from the scores; Gemma's, which are no order of merges, from the places of the tokens.

    A text, and what follows a special token in it, begins with a space where the file does not say otherwise, as in
    llama.cpp and in SentencePiece itself.
    """
    gemma = facts.architecture.startswith("gemma")
    scores = tuple(-float(id) for id in range(len(vocabulary.tokens))) if gemma else vocabulary.scores
    pieces = zip(vocabulary.tokens, scores, vocabulary.roles, strict=True)
    model = SentencePieceModel(
        pieces=tuple(Piece(token, score, role) for token, score, role in pieces),  # type: ignore[arg-type]
        kind="bpe",
        character_map=b"",
        add_dummy_prefix=facts.keys.flag("tokenizer.ggml.add_space_prefix", True) and not gemma,
        remove_extra_whitespaces=False,
        byte_fallback="byte" in vocabulary.roles,
    )
    unknown = vocabulary.special.get("unk_token", "")
    if unknown not in vocabulary.tokens:
        raise CheckpointError(f"{vocabulary.file}: no token stands for what is unknown", file=vocabulary.file)
    special = list(dict.fromkeys([*vocabulary.of_role("control", "unknown"), unknown]))
    unknown_id = vocabulary.tokens.index(unknown)
    backend = make_backend(
        model, model.vocabulary, unknown_id=unknown_id, special=special, stripping=vocabulary.stripping
    )
    return _marked(facts, vocabulary, backend, opened=True)


def _marked(facts: Facts, vocabulary: Vocabulary, backend: Tokenizer, *, opened: bool) -> Tokenizer:
    """Puts a start before each text and an end behind it where the file, or else its kind, asks for them."""
    special = vocabulary.special
    before = [special["bos_token"]] if _asks(facts, "add_bos_token", opened) and "bos_token" in special else []
    after = [special["eos_token"]] if _asks(facts, "add_eos_token", False) and "eos_token" in special else []
    return put_around(backend, before=before, after=after, between=[*after, *before])


def _asks(facts: Facts, name: str, default: bool) -> bool:
    return facts.keys.flag(f"tokenizer.ggml.{name}", default)


def _write_words(vocabulary: Vocabulary, path: Path) -> None:
    """WordPiece's list; there the beginnings of words have a mark, in `vocab.txt` what is no beginning has."""
    if any("\n" in token or "\r" in token for token in vocabulary.tokens):
        raise CheckpointError(f"{vocabulary.file}: a token of its WordPiece vocabulary has a line break")
    pairs = zip(vocabulary.tokens, vocabulary.roles, strict=True)
    words = [token if role == "control" else _word(token) for token, role in pairs]
    path.write_text("\n".join(words) + "\n", encoding="utf-8")


def _word(token: str) -> str:
    return token[1:] if token.startswith(SPACE) else "##" + token


def _lowering(facts: Facts, vocabulary: Vocabulary) -> dict[str, Any]:
    """Whether texts are put into lower case; a file that does not say has a vocabulary that shows it."""
    plain = vocabulary.of_role("normal")
    lowers = _asks(facts, "normalizer.lowercase", all(token == token.lower() for token in plain))
    key = "tokenizer.ggml.normalizer.strip_accents"
    strips = facts.keys.flag(key) if key in facts.keys else None
    return {"do_lower_case": lowers, "strip_accents": strips}


def _chat_template(facts: Facts) -> str | list[dict[str, str]] | None:
    """The template, or all of them where some have names."""
    key = "tokenizer.chat_template"
    plain = {"default": facts.keys.text(key)} if key in facts.keys else {}
    named = {name.removeprefix(f"{key}."): facts.keys.text(name) for name in facts.keys if name.startswith(f"{key}.")}
    if not named:
        return plain.get("default")
    return [{"name": name, "template": template} for name, template in (plain | named).items()]


BACKENDS: Mapping[str, Callable[[Facts, Vocabulary], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
