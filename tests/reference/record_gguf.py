"""Records tiny checkpoints as llama.cpp's own converter writes them, with what `transformers` computes of what they
were, into `gguf/` beside it: a compressed file for each case, and one with all logits (or states) and token ids.

Weights are numbers of 16 bits, so that a conversion to F16 loses none. The file of types has random blocks of each
type, and what the `gguf` package makes of them. None of it is needed by the tests. To record again, with the source of
llama.cpp (here as llama-cpp-python 0.3.36 has it) in LLAMA_CPP:

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch==2.13.0 transformers==5.23.0 sentencepiece==0.2.3 && \
    PYTHONPATH=$LLAMA_CPP:$LLAMA_CPP/gguf-py /tmp/venv/bin/python tests/reference/record_gguf.py
"""

import gzip
import json
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from conversion import ModelBase, get_model_class
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

OUTPUT = Path(__file__).with_name("gguf")
IDS = [3, 17, 5, 24, 30, 12, 9, 31, 2, 28, 30, 7]
TEXTS = [
    "",
    " ",
    "The lion and the mouse lived in the forest, didn't they?  IT'S 1234567.89!",
    "  two  spaces,  the lion    and the\ttabs\n\n and lines \r\n",
    "naïve café, e\u0301te\u0301 – “quotes” … ½ ﬁ",
    "狮子和老鼠 日本語 Лев и мышь 123 １２３",
    "emoji 😀👩‍👩‍👧 🇫🇷 ▁▁ <|im_start|>user\nhi<|im_end|> </s> <s>",
    "<think>the forest</think>",
    "def f(x):\n    return {'a': [1,22,333]}\n",
]
TRAINED_ON = [*TEXTS, "the mouse and the lion, the forest and the river " * 4, "user assistant system 12 34 567 " * 4]
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NOMIC: dict[str, Any] = {
    "activation_function": "swiglu",
    "causal": False,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "n_inner": 16,
    "n_positions": 8192,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}
"""What the authors of nomic-embed-text wrote and the converter asks for, beside what transformers writes."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 4, "tie_word_embeddings": True}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA_3.replace("{1,3}", "")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
SEED = QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
"""As the `tokenizer.json` of those checkpoints have them."""
BERT_MARKS = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
GEMMA_SPACES = ["▁▁", "▁▁▁▁"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

expected: dict[str, Tensor] = {}
expected_ids: dict[str, dict[str, list[int]]] = {}


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that each shows in the logits, all of them numbers of 16 bits."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        scale = 1.2 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        plain_norm = "norm" in name.lower() and name.endswith("weight") and "gemma" not in type(model).__name__.lower()
        parameter.data = (drawn + (1.0 if plain_norm else 0.0)).half().float()
    return model.eval()


def convert(folder: Path, target: Path, kind: gguf.LlamaFileType, pre: str | None, *, vocab_only: bool = False) -> None:
    """By the converter's class for the architecture; `pre` names the pre-tokenizer, None leaves the vocabulary out."""
    # What transformers passes over of a config is the converter's to read all the same.
    hparams = json.loads((folder / "config.json").read_text()) | ModelBase.load_hparams(folder, False)
    converter = get_model_class(hparams["architectures"][0])

    class Converter(converter):  # type: ignore[misc, valid-type]
        model_arch = converter.model_arch

        def get_vocab_base_pre(self, _: Any) -> str:
            return pre or ""

        def set_vocab(self) -> None:
            if pre is not None:
                super().set_vocab()

    made = Converter(folder, kind, target, hparams=hparams)
    made.write_vocab() if vocab_only else made.write()


def quantize(model: torch.nn.Module) -> None:
    """Gives all matrices the values that they have in Q8_0; the converter leaves routers alone."""
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("mlp.gate.weight"):
            parameter.data = torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind))


def record(name: str, model: torch.nn.Module, *, quantized: bool = False, **config: Any) -> None:
    """Without a vocabulary: what the network computes of ids. `config`: keys as files of the hub have them."""
    random_weights(model)
    original = deepcopy(model)
    if quantized:
        quantize(model)
    with torch.inference_mode():
        output = model(torch.tensor([IDS]))
    found = output.logits if hasattr(output, "logits") else output.last_hidden_state
    expected[f"{name}.output"] = found[0, -2:].contiguous()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / name  # which the converter writes into the file
        original.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        # The converter counts Gemma's tokens there.
        words = {str(id): id for id in range(SHAPE["vocab_size"])}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
        kinds = gguf.LlamaFileType
        kind = kinds.MOSTLY_Q8_0 if quantized else kinds.MOSTLY_F16
        convert(folder, OUTPUT / f"{name}.gguf", kind, None)


def byte_level(pre: pre_tokenizers.PreTokenizer, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def whole_words(tokenizer: Tokenizer) -> Tokenizer:
    """As Llama 3's: a word that is a token is taken as it is, even where no merges lead to it."""
    state = json.loads(tokenizer.to_str())
    state["model"] |= {"ignore_merges": True, "merges": state["model"]["merges"][:-20]}
    return Tokenizer.from_str(json.dumps(state))


def word_piece() -> Tokenizer:
    """Letters, and some words (a trainer would choose among equals by chance)."""
    letters = sorted({letter for text in TEXTS for letter in text.lower() if letter.isalnum() or letter in ".,!?'"})
    words = ["the", "lion", "mouse", "forest", "##s", "##est", "did", "##n", "cafe", "user", "lines", "tab", "##es"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)])
    ids = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def train_sentencepiece(folder: Path, *, gemma: bool) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        split_digits=True,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        user_defined_symbols=GEMMA_SPACES if gemma else [],
        minloglevel=2,
        num_threads=1,
    )


def record_vocabulary(
    name: str, model: torch.nn.Module, write: Callable[[Path], None], pre: str, *, whole: bool = False, **config: Any
) -> None:
    """The ids that the original tokenizer gives of each text; `whole`: with the weights, too."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / name
        random_weights(model)
        if whole:
            with torch.inference_mode():
                output = model(torch.tensor([IDS]))
            found = output.logits if hasattr(output, "logits") else output.last_hidden_state
            expected[f"{name}.output"] = found[0, -2:].contiguous()
        model.save_pretrained(folder)
        write(folder)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = original(folder)
        expected_ids[name] = {text: tokenizer.ids(text) for text in TEXTS if tokenizer.takes(text)}
        convert(folder, OUTPUT / f"{name}.gguf", gguf.LlamaFileType.MOSTLY_F16, pre, vocab_only=not whole)


def original(folder: Path) -> "Original | OriginalSentencePiece":
    path = folder / "tokenizer.json"
    return Original(path) if path.is_file() else OriginalSentencePiece(folder / "tokenizer.model")


class Original:
    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))

    def takes(self, text: str) -> bool:
        return True

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)


class OriginalSentencePiece:
    """Behind a start token, as in all that use it; which of them cut control symbols out of a text, it does not say."""

    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def takes(self, text: str) -> bool:
        return "<" not in text

    def ids(self, text: str) -> list[int]:
        return [1, *self.model.encode(text)]


def record_types() -> None:
    """A row of random blocks of each type; their scales are numbers that are no fault."""
    generator = np.random.default_rng(11)
    writer = gguf.GGUFWriter(OUTPUT / "types.gguf", "llama")
    kinds = gguf.GGMLQuantizationType
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2)}
    scales |= {"Q5_1": (0, 2), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
    for name, places in scales.items():
        num_values, num_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
        blocks = generator.integers(0, 256, (256 // num_values, num_bytes), np.uint8)
        for place in places:
            drawn = generator.normal(size=(len(blocks), 1)).astype(np.float16)
            blocks[:, place : place + 2] = drawn.view(np.uint8)
        data = blocks.reshape(1, -1)
        writer.add_tensor(name, data, raw_dtype=kinds[name])
        expected[f"types.{name}"] = torch.from_numpy(gguf.dequantize(data, kinds[name])).reshape(1, 256).contiguous()
    for name in ("F32", "F16", "BF16"):
        values = gguf.quantize(generator.normal(size=(2, 32)).astype(np.float32), kinds[name])
        writer.add_tensor(name, values, raw_dtype=kinds[name])
        expected[f"types.{name}"] = torch.from_numpy(gguf.dequantize(values, kinds[name])).reshape(2, 32).clone()
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


def saved(tokenizer: Tokenizer) -> Callable[[Path], None]:
    return lambda folder: tokenizer.save(str(folder / "tokenizer.json"))


def record_vocabularies() -> None:
    t, byte = transformers, pre_tokenizers.ByteLevel
    marks = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    small = SHAPE | {"vocab_size": 301, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2}

    def llama() -> torch.nn.Module:
        return t.LlamaForCausalLM(t.LlamaConfig(**small))

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte(add_prefix_space=False)])
    chat = marks | {"chat_template": CHAT_TEMPLATE}
    record_vocabulary("bpe-smollm", llama(), saved(byte_level(digits)), "smollm", whole=True, **chat)
    record_vocabulary("bpe-gpt-2", llama(), saved(byte_level(byte(add_prefix_space=False))), "gpt-2", **marks)
    record_vocabulary("bpe-qwen2", llama(), saved(byte_level(cut_by(QWEN2), normalizers.NFC())), "qwen2", **marks)
    opened = whole_words(byte_level(cut_by(LLAMA_3)))
    opened.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    record_vocabulary("bpe-llama", llama(), saved(opened), "llama-bpe", **marks)
    record_vocabulary("bpe-glm4", llama(), saved(whole_words(byte_level(cut_by(LLAMA_3)))), "glm4", **marks)
    record_vocabulary("bpe-bloom", llama(), saved(byte_level(cut_by(BLOOM))), "bloom", **marks)
    record_vocabulary("bpe-seed", llama(), saved(byte_level(cut_by(SEED))), "seed-coder", **marks)
    spiece = SHAPE | {"vocab_size": 420}
    for name, model in (
        ("spm-llama", t.LlamaForCausalLM(t.LlamaConfig(**spiece))),
        ("spm-gemma2", t.Gemma2ForCausalLM(t.Gemma2Config(**spiece | GEMMA))),
    ):
        write = partial(train_sentencepiece, gemma="gemma" in name)
        marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        if "gemma" in name:
            # So the converter stores these as spaces, with scores that are none.
            added = {str(5 + index): {"content": token, "special": False} for index, token in enumerate(GEMMA_SPACES)}
            marks["added_tokens_decoder"] = added
        record_vocabulary(name, model, write, "default", **marks)
    words = word_piece()
    config = t.BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    bert = t.BertModel(config, add_pooling_layer=False)
    record_vocabulary("bert", bert, with_pooling(saved(words)), "bert", whole=True, **BERT_MARKS)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    nomic = t.NomicBertModel(t.NomicBertConfig(vocab_size=words.get_vocab_size(), **sizes))
    write = with_keys(with_pooling(saved(words)), NOMIC)
    record_vocabulary("nomic-bert", nomic, write, "bert", whole=True, **BERT_MARKS)


def with_keys(write: Callable[[Path], None], more: Mapping[str, Any]) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        write(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(more)))

    return written


def with_pooling(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        write(folder)
        (folder / "modules.json").write_text(json.dumps([{"path": "1_Pooling", "type": "Pooling"}]))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))

    return written


def cut_by(expression: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def more_decoders() -> None:
    """Those whose classes need nothing but their config, by the names that llama.cpp has for them."""
    wide = SHAPE | {"hidden_size": 16}
    deep, tied = {"num_hidden_layers": 4, "sliding_window": 4}, {"tie_word_embeddings": True}
    mup = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 4.0}
    narrow = {"head_dim": 4}
    gpt2 = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
    clipped = {"attn_config": {"clip_qkv": 0.5}}
    cases: dict[str, dict[str, Any]] = {
        "smollm3": SHAPE | {"num_hidden_layers": 4},
        "granite": SHAPE | narrow | mup,
        "arcee": SHAPE,
        "seed_oss": SHAPE,
        "ernie4_5": SHAPE | {"use_bias": False},
        "glm4": SHAPE,
        "exaone4": SHAPE | deep,
        "olmo": SHAPE | narrow | {"clip_qkv": 0.5},
        "olmo3": SHAPE | deep | narrow,
        "starcoder2": SHAPE,
        "stablelm": wide | {"use_qkv_bias": True},
        "phi": wide | {"num_key_value_heads": 2, "intermediate_size": 64},
        "cohere": SHAPE | narrow | tied | {"logit_scale": 0.5},
        "cohere2": SHAPE | deep | narrow | tied | {"logit_scale": 0.5, "rotary_pct": 1.0},
        "cohere-plus": SHAPE | narrow | tied | {"use_qk_norm": True},
        "nemotron": SHAPE | narrow,
        "gpt_neox": SHAPE | narrow | {"rotary_pct": 0.5},
        "gpt_bigcode": gpt2,
        "bloom": {"vocab_size": 32, "hidden_size": 8, "n_head": 2, "n_layer": 1, "seq_length": 64},
        "mpt": {"vocab_size": 32, "d_model": 8, "n_heads": 2, "n_layers": 1, "max_seq_len": 64} | clipped,
    }
    for name, values in cases.items():
        kind = name.removesuffix("-plus")
        config = transformers.AutoConfig.for_model(kind, **values)
        keys = {"mpt": {"architectures": ["MPTForCausalLM"]}, "gpt_neox": {"rotary_pct": 0.5}}.get(kind, {})
        record(name, transformers.AutoModelForCausalLM.from_config(config), **keys)


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    t = transformers
    record("llama", t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3)))
    wide = SHAPE | {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    record("llama-q8", t.LlamaForCausalLM(t.LlamaConfig(**wide)), quantized=True)
    record("qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE, rope_parameters=YARN)))
    record("qwen3", t.Qwen3ForCausalLM(t.Qwen3Config(**SHAPE | {"tie_word_embeddings": True})))
    record("gemma", t.GemmaForCausalLM(t.GemmaConfig(**SHAPE | {"tie_word_embeddings": True})))
    record("gemma2", t.Gemma2ForCausalLM(t.Gemma2Config(**SHAPE | GEMMA | {"num_hidden_layers": 2})))
    record(
        "gemma3",
        t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**SHAPE | GEMMA | {"num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE})
        ),
    )
    record("olmo2", t.Olmo2ForCausalLM(t.Olmo2Config(**SHAPE, rope_parameters=LINEAR)))
    record("phi3", t.Phi3ForCausalLM(t.Phi3Config(**SHAPE | {"head_dim": 4, "sliding_window": 6})))
    more_decoders()
    gpt2 = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64, "n_ctx": 64}
    record("gpt2", t.GPT2LMHeadModel(t.GPT2Config(**gpt2)))
    experts = {"num_experts": 3, "num_experts_per_tok": 2}
    qwen = experts | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 16}
    record("mixtral", t.MixtralForCausalLM(t.MixtralConfig(**SHAPE, num_local_experts=3)))
    record("qwen2moe", t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**SHAPE, **qwen)))
    qwen3moe = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**wide, **qwen, norm_topk_prob=True))
    record("qwen3moe-q8", qwen3moe, quantized=True)
    record("olmoe", t.OlmoeForCausalLM(t.OlmoeConfig(**SHAPE | {"head_dim": 4, "rms_norm_eps": 1e-5}, **experts)))
    record_vocabularies()
    record_types()
    save_file(expected, OUTPUT / "expected.safetensors", {"ids": json.dumps(expected_ids)})
    for path in OUTPUT.glob("*[fs]"):
        (OUTPUT / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()


if __name__ == "__main__":
    main()
