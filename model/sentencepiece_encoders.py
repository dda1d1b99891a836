"""Tokenizers of encoders that have a SentencePiece file and no `tokenizer.json`: ALBERT, DeBERTa, (XLM-)RoBERTa.

What happens to a text before it is cut is the family's; ids and offsets are those of `transformers`. Knows how texts
are cut only as `model.sentencepiece_reader`. Runs in the API process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from model.plain_vocabularies import BERT, ROBERTA, Marks, named
from model.sentencepiece_reader import SPACE, SentencePieceModel, make_backend, put_around, read_sentencepiece

FAIRSEQ_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
ALBERT = replace(BERT, unknown="<unk>", padding="<pad>")

Config = Mapping[str, Any]


def albert(folder: Path, config: Config) -> Tokenizer:
    model, marks = read_sentencepiece(folder / "spiece.model"), named(ALBERT, config)
    backend = _marked(model, model.vocabulary, marks, unknown_id=model.unknown_id)
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not config.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if config.get("do_lower_case", True):
        steps.append(normalizers.Lowercase())
    _cut_words(backend, [*steps, *model.character_steps])
    return _two_types(backend, marks)


def deberta_v2(folder: Path, config: Config) -> Tokenizer:
    """A word's place in the text begins with the space before it, as these checkpoints' `tokenizer.json` has it.

    The model's own map of characters holds, as in training; `transformers` 5 leaves it out.
    """
    model, marks = read_sentencepiece(folder / "spm.model"), named(BERT, config)
    backend = _marked(model, model.vocabulary, marks, unknown_id=model.unknown_id)
    _add_mask(backend, marks.mask, config)
    steps: list[Any] = [normalizers.Lowercase()] if config.get("do_lower_case", False) else []
    steps += [*model.character_steps, normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), normalizers.NFC()]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Strip(left=False, right=True)])
    cuts: list[Any] = [pre_tokenizers.Punctuation("isolated")] if config.get("split_by_punct", False) else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.Metaspace(SPACE, "always")])
    return _two_types(backend, marks)


def camembert(folder: Path, config: Config) -> Tokenizer:
    """The model's own `<s>` and `</s>` are used; fairseq's stand before them and are not."""
    model, marks = read_sentencepiece(folder / "sentencepiece.bpe.model"), named(ROBERTA, config)
    first = ["<s>NOTUSED", marks.padding, "</s>NOTUSED", marks.unknown]
    vocabulary = [(token, 0.0) for token in first] + [("<unk>NOTUSED", -100.0)] + model.vocabulary[1:]
    backend = _marked(model, [*vocabulary, (marks.mask, 0.0)], marks, unknown_id=3)
    _add_mask(backend, marks.mask, config, takes_space=True)
    _cut_words(backend, model.character_steps)
    return put_around(backend, before=[marks.start], after=[marks.end], between=[marks.end, marks.end])


def xlm_roberta(folder: Path, _: Config) -> Tokenizer:
    model = read_sentencepiece(folder / "sentencepiece.bpe.model")
    backend = fairseq(model, [])
    _cut_words(backend, model.character_steps)
    return put_around(backend, before=["<s>"], after=["</s>"], between=["</s>", "</s>"])


def fairseq(model: SentencePieceModel, codes: Sequence[str]) -> Tokenizer:
    """Fairseq's own four tokens for the model's first three, then its pieces, then the languages and the mask."""
    first, last = [(token, 0.0) for token in FAIRSEQ_TOKENS], [*codes, "<mask>"]
    vocabulary = first + model.vocabulary[3:] + [(token, 0.0) for token in last]
    return make_backend(model, vocabulary, unknown_id=3, special=[*FAIRSEQ_TOKENS, *last])


def _marked(
    model: SentencePieceModel, vocabulary: Sequence[tuple[str, float]], marks: Marks, *, unknown_id: int
) -> Tokenizer:
    """Special are the family's tokens and what the model itself never cuts a text into."""
    own = [piece.text for piece in model.pieces if piece.role == "control"]
    special = dict.fromkeys([*own, marks.start, marks.end, marks.unknown, marks.padding])
    return make_backend(model, vocabulary, unknown_id=unknown_id, special=[*special])


def _add_mask(backend: Tokenizer, mask: str, config: Config, *, takes_space: bool = False) -> None:
    """A mask that the model does not have; `takes_space`: the space before it is its own, if its entry does not say."""
    entry = config.get("mask_token")
    spaced = bool(entry.get("lstrip")) if isinstance(entry, dict) else takes_space
    backend.add_special_tokens([AddedToken(mask, lstrip=spaced, normalized=False, special=True)])


def _cut_words(backend: Tokenizer, steps: Sequence[Any]) -> None:
    """Each word is cut alone, and no piece's place in the text has the space before it.

    `steps` are what is done to a text before.
    """
    backend.normalizer = normalizers.Sequence(list(steps))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, "always")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)


def _two_types(backend: Tokenizer, marks: Marks) -> Tokenizer:
    """The second text of a pair is of another type."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{marks.start} $A {marks.end}",
        pair=f"{marks.start} $A {marks.end} $B:1 {marks.end}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (marks.start, marks.end)],
    )
    return backend
