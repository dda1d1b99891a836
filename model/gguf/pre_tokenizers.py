"""How byte-level vocabularies cut a text before they merge: by the name that a GGUF file gives for it.

llama.cpp names the ways of cutting instead of storing them. The expressions are those of the `tokenizer.json` files of
the checkpoints that the names stand for; "default" is llama.cpp's own, for files that say nothing. API process.

Source of the names: github.com/ggml-org/llama.cpp, `llama_vocab::impl::load` in src/llama-vocab.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALIZED, _CAPITALS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{counts}" for counts in (f"*{_LOWER}+", f"+{_LOWER}*"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """Expressions by whose matches a text is cut, each within the pieces of the one before."""

    cuts: tuple[str, ...]
    whole_words: bool = False
    """A piece that is a token as it is is not merged."""
    composed: bool = False
    """Accents are joined with their letters first (NFC)."""
    opened: bool = False
    """A text begins with the start token where the file does not say."""

    @property
    def steps(self) -> Any:
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in self.cuts]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    @property
    def normalizer(self) -> Any:
        return normalizers.NFC() if self.composed else None


DEFAULT = PreTokenizer(cuts=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
GPT2 = PreTokenizer(cuts=(_GPT2,))
DIGITS = PreTokenizer(cuts=(r"\p{N}", _GPT2))
THREE_DIGITS = rf"{_CONTRACTED}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
LLAMA3 = PreTokenizer(cuts=(THREE_DIGITS,), whole_words=True, opened=True)
DBRX = PreTokenizer(cuts=(THREE_DIGITS,))
GLM4 = PreTokenizer(cuts=(THREE_DIGITS,), whole_words=True)
ONE_DIGIT = rf"{_CONTRACTED}|{_LETTERS}|\p{{N}}|{_REST}"
QWEN2 = PreTokenizer(cuts=(ONE_DIGIT,), composed=True)
SEED = PreTokenizer(cuts=(ONE_DIGIT.replace(_REST, r" ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"),))
BLOOM = PreTokenizer(cuts=(r" ?[^(\s|.,!?…。，、।۔،)]+",))
TEKKEN = PreTokenizer(cuts=(rf"{_CAPITALIZED}|{_CAPITALS}|\p{{N}}|{_REST_WITH_SLASH}",), whole_words=True, opened=True)
GPT4O = PreTokenizer(
    cuts=(rf"{_CAPITALIZED}{_CONTRACTED}?|{_CAPITALS}{_CONTRACTED}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",)
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "roberta-bpe"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), DBRX),
    **dict.fromkeys(("glm4", "glm5"), GLM4),
    "seed-coder": SEED,
    "bloom": BLOOM,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), QWEN2),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
}
