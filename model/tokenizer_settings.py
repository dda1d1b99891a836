"""Settings of `tokenizer_config.json` that change what a `tokenizer.json` beside it does, by class of tokenizer.

transformers' classes do not leave that file as it is: BERT's set its normalizer anew from `do_lower_case` and its like,
byte-level ones its `add_prefix_space`, and (before transformers 5) Llama's and Gemma's what is put around a text from
`add_bos_token` and `add_eos_token`. Checkpoints were trained with those settings, which `tokenizer.json` may lack.
Also says which classes are a family's own. Runs in the API process.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from model.errors import CheckpointError
from model.plain_vocabularies import text_of
from model.sentencepiece_reader import put_around

Config = Mapping[str, Any]

CLASSES: Mapping[str, tuple[str, ...]] = {
    "bert": ("Bert", "DistilBert", "Electra"),
    "distilbert": ("DistilBert", "Bert"),
    "electra": ("Electra", "Bert"),
    "ernie": ("Bert",),
    "megatron-bert": ("Bert",),
    "nomic_bert": ("Bert",),
    "roformer": ("RoFormer",),
    "mpnet": ("MPNet",),
    "roberta": ("Roberta", "GPT2", "Bart"),
    "roberta-prelayernorm": ("Roberta",),
    "data2vec-text": ("Roberta",),
    "bart": ("Bart", "Roberta"),
    "gpt2": ("GPT2",),
    "gpt_neo": ("GPT2",),
    "gptj": ("GPT2",),
    "codegen": ("CodeGen", "GPT2"),
    "opt": ("GPT2",),
    "gpt_neox": ("GPTNeoX",),
    "t5": ("T5",),
    "mt5": ("T5", "MT5"),
    "umt5": ("T5",),
    "pegasus": ("Pegasus",),
    "albert": ("Albert",),
    "deberta-v2": ("DebertaV2",),
    "camembert": ("Camembert",),
    "xlm-roberta": ("XLMRoberta",),
    "mbart": ("MBart", "MBart50"),
    "m2m_100": ("M2M100", "Nllb"),
    "marian": ("Marian",),
    "llama": ("Llama", "CodeLlama"),
    "mistral": ("Llama",),
    "phi3": ("Llama",),
    "gemma": ("Gemma",),
    "gemma2": ("Gemma",),
    "gemma3": ("Gemma",),
    "gemma3_text": ("Gemma",),
}
"""By `model_type`: the classes of transformers (without "Tokenizer") that read a family's vocabulary files as we do."""

LOWERING = frozenset({"Bert", "DistilBert", "Electra", "MPNet"})
SPACING = frozenset({"GPT2", "Roberta", "Bart", "GPTNeoX"})
OPENING = frozenset({"Llama", "CodeLlama", "Gemma"})
CUTTING = frozenset({"RoFormer"})
"""Those that look words up in jieba's dictionary, in the place of what `tokenizer.json` says."""


def check_class(raw: Config, config: Config) -> None:
    """Refuses vocabulary files that another class of tokenizer than the family's is to read (Japanese BERTs' MeCab).

    `raw` is `config.json`, `config` what stands beside the vocabulary. Raises: CheckpointError.
    """
    own = CLASSES.get(str(raw.get("model_type")), ())
    for file, values in (("tokenizer_config.json", config), ("config.json", raw)):
        named = values.get("tokenizer_class")
        if own and isinstance(named, str) and _plain(named) not in own:
            raise _refused(file, "tokenizer_class", named)
        words = values.get("word_tokenizer_type", "basic")
        if words != "basic":
            raise _refused(file, "word_tokenizer_type", words)


def apply_settings(backend: Tokenizer, raw: Config, config: Config) -> None:
    """Changes the tokenizer of a `tokenizer.json` as the class that the checkpoint names would.

    Raises: CheckpointError for a class whose work is in no file.
    """
    named = config.get("tokenizer_class") or raw.get("tokenizer_class")
    kind = _plain(named) if isinstance(named, str) else next(iter(CLASSES.get(str(raw.get("model_type")), ())), "")
    if kind in CUTTING:
        raise CheckpointError(
            f"tokenizer_config.json: {kind}Tokenizer finds Chinese words by jieba, which is not supported; a "
            "checkpoint of other texts may name BertTokenizer as its 'tokenizer_class'",
            file="tokenizer_config.json",
        )
    if kind in LOWERING:
        _set_normalizer(backend, config)
    if kind in SPACING:
        _set_prefix_space(backend, config)
    # Classes of a checkpoint's own (gte-Qwen2's) are as Llama's in this.
    own_class = "AutoTokenizer" in (config.get("auto_map") or {})
    if (kind in OPENING or own_class) and {"add_bos_token", "add_eos_token"} & config.keys():
        _set_marks(backend, config, opened=kind in OPENING)


def _plain(name: str) -> str:
    return name.removesuffix("Fast").removesuffix("Tokenizer")


def _state(part: object) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__()) if part is not None else {}  # type: ignore[arg-type]
    return state


def _set_normalizer(backend: Tokenizer, config: Config) -> None:
    state = _state(backend.normalizer)
    if state.pop("type", None) != "BertNormalizer":
        return
    wanted = {
        "lowercase": config.get("do_lower_case", True),
        "strip_accents": config.get("strip_accents"),
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
    }
    if state | wanted != state:
        backend.normalizer = normalizers.BertNormalizer(**(state | wanted))


def _set_prefix_space(backend: Tokenizer, config: Config) -> None:
    state, spaced = _state(backend.pre_tokenizer), bool(config.get("add_prefix_space", False))
    if state.pop("type", None) == "ByteLevel" and state["add_prefix_space"] != spaced:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(**(state | {"add_prefix_space": spaced}))


def _set_marks(backend: Tokenizer, config: Config, *, opened: bool) -> None:
    """Sets what is put around a text, where the file puts anything else there: e5-mistral pools a `</s>` it lacks.

    The whole of it is set, so that no start is put there twice. transformers 5 takes the two keys to be the file's
    matter wherever there is a `tokenizer.json`, which leaves such checkpoints with ids that they were not trained on.
    """
    before = [text_of(config, "bos_token", "")] if config.get("add_bos_token", opened) else []
    after = [text_of(config, "eos_token", "")] if config.get("add_eos_token", False) else []
    ids = [backend.token_to_id(token) for token in (*before, *after)]
    if None not in ids and backend.encode("").ids != ids:
        put_around(backend, before=before, after=after, between=[*after, *before])


def _refused(file: str, key: str, value: object) -> CheckpointError:
    message = f"{file}: {key!r} is {value!r}; without a tokenizer.json only the family's own tokenizer can be made"
    return CheckpointError(message, file=file)
