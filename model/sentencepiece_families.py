"""Tokenizers of checkpoints that have SentencePiece files and no `tokenizer.json`, family by family.

A family says how ids are numbered (fairseq's four tokens first, Pegasus' hundred and three, Marian's own `vocab.json`)
and what is put around a text. Pieces of a model that a `vocab.json` leaves out are cut further. Those of encoders are
`model.sentencepiece_encoders`, those of language models `model.sentencepiece_decoders`; here are the other ones, and
the table of all. Knows how texts are cut only as `model.sentencepiece_reader`. Runs in the API process.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers

from model.architectures.raw import read_json
from model.errors import CheckpointError
from model.sentencepiece_decoders import gemma, listed_tokens, llama
from model.sentencepiece_encoders import FAIRSEQ_TOKENS, albert, camembert, deberta_v2, fairseq, xlm_roberta
from model.sentencepiece_reader import make_backend, put_around, read_sentencepiece

MBART_CODES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX "
    "ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()
MBART_50_CODES = (
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN "
    "te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
).split()
M2M100_CODES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy "
    "id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru "
    "sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
).split()
"""The order in which fairseq numbered them, which no file of such a checkpoint need say."""

TARGET_ONLY = "\ue000"
"""Put before pieces that only Marian's target side has, so that no source text is cut into them."""
UNKNOWN = "\ue001"
"""What that character becomes in a source text: another one that no vocabulary has."""

Config = Mapping[str, Any]


def sentencepiece_backend(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder without `tokenizer.json`; None if its files are none that a family here knows.

    Raises: CheckpointError if a file is broken or the files do not fit together.
    """
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        return None
    file, build = family
    return build(folder, config) if (folder / file).is_file() else None


def _t5(folder: Path, config: Config) -> Tokenizer:
    model = read_sentencepiece(folder / "spiece.model")
    num_extra = config.get("extra_ids", 100)
    extra = [f"<extra_id_{index}>" for index in reversed(range(num_extra if isinstance(num_extra, int) else 100))]
    vocabulary = model.vocabulary + [(token, 0.0) for token in extra]
    special = ["<pad>", "</s>", "<unk>", *extra]
    backend = make_backend(model, vocabulary, unknown_id=model.unknown_id, special=special)
    return put_around(backend, after=["</s>"], between=["</s>"])


def _pegasus(folder: Path, config: Config) -> Tokenizer:
    """Ids from 2 to 104 were for pre-training; the model's own pieces come behind them."""
    model = read_sentencepiece(folder / "spiece.model")
    offset = int(config.get("offset", 103))
    first = ["<pad>", "</s>"]
    if offset > 0:
        first += ["<mask_1>", "<mask_2>", *(f"<unk_{index}>" for index in range(2, offset))]
    vocabulary = [(token, -100.0 if token.startswith("<unk_") else 0.0) for token in first] + model.vocabulary[2:]
    unknown = model.unknown_id + offset
    backend = make_backend(model, vocabulary, unknown_id=unknown, special=[*first, vocabulary[unknown][0]])
    return put_around(backend, after=["</s>"])


def _mbart(folder: Path, config: Config) -> Tokenizer:
    fifty = "50" in str(config.get("tokenizer_class", ""))
    codes = MBART_CODES + MBART_50_CODES if fifty else MBART_CODES
    source = config.get("src_lang")
    code = source if source in codes else "en_XX"
    backend = fairseq(read_sentencepiece(folder / "sentencepiece.bpe.model"), codes)
    return put_around(backend, before=[code] if fifty else [], after=["</s>"] if fifty else ["</s>", code])


def _m2m100(folder: Path, config: Config) -> Tokenizer:
    if not (folder / "vocab.json").is_file():
        return _nllb(folder, config)
    model = read_sentencepiece(folder / "sentencepiece.bpe.model")
    tokens = _numbered(folder / "vocab.json")
    scores = {piece.text: piece.score for piece in model.pieces}
    languages = [f"__{code}__" for code in M2M100_CODES]
    vocabulary = [(token, scores.get(token, 0.0)) for token in tokens] + [(token, 0.0) for token in languages]
    special = [*FAIRSEQ_TOKENS, *languages]
    backend = make_backend(model, vocabulary, unknown_id=_id_of(tokens, "<unk>", "vocab.json"), special=special)
    source = f"__{config.get('src_lang') or 'en'}__"
    return put_around(backend, before=[source if source in languages else "__en__"], after=["</s>"])


def _nllb(folder: Path, config: Config) -> Tokenizer:
    """Its two hundred codes are among the special tokens that every such tokenizer lists."""
    codes = [token for token in listed_tokens(folder, config) if len(token) == 8 and token[3] == "_"]
    backend = fairseq(read_sentencepiece(folder / "sentencepiece.bpe.model"), codes)
    source = config.get("src_lang") or "eng_Latn"
    before = [source] if source in codes else []
    last = bool(config.get("legacy_behaviour", False))
    return put_around(backend, before=[] if last else before, after=["</s>", *before] if last else ["</s>"])


def _marian(folder: Path, config: Config) -> Tokenizer:
    """Ids are `vocab.json`'s, for the pieces of both sides; a text is cut by the source's model."""
    if config.get("separate_vocabs"):
        raise CheckpointError("tokenizer_config.json: separate vocabularies of source and target are not implemented")
    model = read_sentencepiece(folder / "source.spm")
    tokens = _numbered(folder / "vocab.json")
    scores = {piece.text: piece.score for piece in model.pieces if piece.role not in ("control", "unknown")}
    languages = [token for token in tokens if token.startswith(">>") and token.endswith("<<")]
    special = [token for token in ("</s>", "<unk>", "<pad>") if token in tokens]
    own = {*special, *languages}
    vocabulary = [
        (token if token in own or token in scores else TARGET_ONLY + token, scores.get(token, 0.0)) for token in tokens
    ]
    backend = make_backend(model, vocabulary, unknown_id=_id_of(tokens, "<unk>", "vocab.json"), special=special)
    backend.add_tokens([AddedToken(token, normalized=False) for token in languages])
    steps = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([normalizers.Replace(TARGET_ONLY, UNKNOWN), *steps])
    backend.decoder = decoders.Sequence([decoders.Replace(TARGET_ONLY, ""), backend.decoder])
    return put_around(backend, after=["</s>"])


def _numbered(path: Path) -> list[str]:
    """The tokens of a `vocab.json` by id.

    Raises: CheckpointError if ids are missing.
    """
    ids = read_json(path)
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(f"{path.name}: ids are not the numbers from 0 to {len(tokens) - 1:,}", file=path.name)
    return tokens


def _id_of(tokens: Sequence[str], token: str, file: str) -> int:
    if token not in tokens:
        raise CheckpointError(f"{file} has no {token!r}", file=file)
    return tokens.index(token)


FAMILIES: Mapping[str, tuple[str, Callable[[Path, Config], Tokenizer]]] = {
    "t5": ("spiece.model", _t5),
    "mt5": ("spiece.model", _t5),
    "umt5": ("spiece.model", _t5),
    "pegasus": ("spiece.model", _pegasus),
    "albert": ("spiece.model", albert),
    "deberta-v2": ("spm.model", deberta_v2),
    "camembert": ("sentencepiece.bpe.model", camembert),
    "xlm-roberta": ("sentencepiece.bpe.model", xlm_roberta),
    "mbart": ("sentencepiece.bpe.model", _mbart),
    "m2m_100": ("sentencepiece.bpe.model", _m2m100),
    "marian": ("source.spm", _marian),
    "llama": ("tokenizer.model", llama),
    "mistral": ("tokenizer.model", llama),
    "phi3": ("tokenizer.model", llama),
    "gemma": ("tokenizer.model", gemma),
    "gemma2": ("tokenizer.model", gemma),
    "gemma3": ("tokenizer.model", gemma),
    "gemma3_text": ("tokenizer.model", gemma),
}
"""By `model_type`: the file that must be there, and who reads it."""
