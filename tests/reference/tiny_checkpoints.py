"""Tiny random checkpoints that are the same, byte for byte, wherever they are made: `make(name, folder)`.

Weights come from numpy's generator, seeded by each tensor's name, so that outputs recorded with one version of
`transformers` can be compared with another's or with ours. Configs and tokenizers are written out by hand for the same
reason. Needs torch, transformers (4.57 or 5), tokenizers, safetensors; knows nothing of this project.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = (
    "a an the of to in on and is was are were it he she they we you i not no with for from by at as that this which "
    "who what where when how why one two three four five year day city river mountain house school company people "
    "president king queen war peace water fire north south east west great small old new long short first last world "
    "country language book music film game team player won lost built found made born died lived wrote said called "
    "good bad best worst happy sad movie story actor summarize translate english german french about sports politics "
    "science example text : . , ? ! ' - france paris london berlin 1889 1912 2004"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
LANGUAGES = ("deu_Latn", "eng_Latn", "fra_Latn", "zho_Hans")

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
BART = {
    "model_type": "bart",
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 320,
    "activation_function": "gelu",
    "scale_embedding": False,
    "is_encoder_decoder": True,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "n_positions": 512,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "task_specific_params": {
        "summarization": {
            "early_stopping": True,
            "length_penalty": 2.0,
            "min_length": 8,
            "no_repeat_ngram_size": 3,
            "num_beams": 4,
            "prefix": "summarize: ",
        },
        "translation_en_to_de": {"early_stopping": True, "num_beams": 4, "prefix": "translate english to german: "},
        "translation_en_to_fr": {"early_stopping": True, "num_beams": 2, "prefix": "translate english to french: "},
    },
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def make(name: str, folder: Path) -> Path:
    """Writes the checkpoint `name` into `folder` and gives the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    CHECKPOINTS[name](folder)
    return folder


def _bert(class_name: str, **config: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        vocab = _write_wordpiece(folder)
        _write(folder, class_name, BERT | {"vocab_size": vocab} | config)

    return write


def _sequence_to_sequence(
    class_name: str, base: dict[str, Any], generation: dict[str, Any], end_bias: float = 0.0, **config: Any
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        vocab = _write_unigram(folder, languages=class_name.startswith("M2M"), start=class_name.startswith("Bart"))
        _write(folder, class_name, base | {"vocab_size": vocab} | config, end_bias)
        ids = {key: value for key, value in base.items() if key.endswith("_token_id")}
        (folder / "generation_config.json").write_text(json.dumps(ids | generation))

    return write


def _decoder(class_name: str, config: dict[str, Any], **changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        vocab = _write_unigram(folder, languages=False, start=True)
        _write(folder, class_name, config | {"vocab_size": vocab} | changes)

    return write


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "question-answering": _bert("BertForQuestionAnswering"),
    "three-classes": _bert("BertForSequenceClassification", id2label={"0": "bad", "1": "fair", "2": "good"}),
    "several-labels": _bert(
        "BertForSequenceClassification",
        id2label={"0": "sports", "1": "politics", "2": "science"},
        problem_type="multi_label_classification",
    ),
    "regression": _bert("BertForSequenceClassification", id2label={"0": "LABEL_0"}, problem_type="regression"),
    "entailment": _bert(
        "BertForSequenceClassification", id2label={"0": "contradiction", "1": "neutral", "2": "entailment"}
    ),
    "entailment-first": _bert("BertForSequenceClassification", id2label={"0": "ENTAILMENT", "1": "NOT_ENTAILMENT"}),
    "entailment-bart": _sequence_to_sequence(
        "BartForSequenceClassification",
        BART,
        {},
        id2label={"0": "contradiction", "1": "neutral", "2": "entailment"},
    ),
    "bart": _sequence_to_sequence("BartForConditionalGeneration", BART, {"no_repeat_ngram_size": 3}, end_bias=3.0),
    "bart-declared": _sequence_to_sequence(
        "BartForConditionalGeneration",
        BART,
        {
            "num_beams": 4,
            "length_penalty": 2.0,
            "max_length": 42,
            "min_length": 12,
            "no_repeat_ngram_size": 3,
            "early_stopping": True,
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
        },
        end_bias=5.0,
    ),
    "t5": _sequence_to_sequence("T5ForConditionalGeneration", T5, {"no_repeat_ngram_size": 2}),
    "llama": _decoder("LlamaForCausalLM", LLAMA, tie_word_embeddings=False),
    "llama-tied": _decoder("LlamaForCausalLM", LLAMA, tie_word_embeddings=True),
    "gpt2": _decoder("GPT2LMHeadModel", GPT2),
    "nllb": _sequence_to_sequence(
        "M2M100ForConditionalGeneration",
        BART | {"model_type": "m2m_100", "scale_embedding": True, "activation_function": "relu"},
        {"no_repeat_ngram_size": 3, "max_length": 30},
    ),
}


def _write(folder: Path, class_name: str, config: dict[str, Any], end_bias: float = 0.0) -> None:
    if "id2label" in config:
        config["label2id"] = {label: int(index) for index, label in config["id2label"].items()}
    values = {key: value for key, value in config.items() if key != "model_type"}
    config_class = transformers.AutoConfig.for_model(config["model_type"], **values)
    with torch.device("meta"):
        network = getattr(transformers, class_name)(config_class)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    tensors = {
        name: random_tensor(name, shape) for name, shape in sorted(shapes.items()) if "embed_positions" not in name
    }
    if config["model_type"] == "bart":
        for side in ("encoder", "decoder"):
            name = f"model.{side}.embed_positions.weight"
            tensors[name] = random_tensor(name, shapes[name])
    if class_name == "BartForConditionalGeneration":
        tensors["final_logits_bias"] = torch.zeros(1, config["vocab_size"])
        tensors["final_logits_bias"][0, config["eos_token_id"]] = end_bias
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps({"architectures": [class_name], "dtype": "float32"} | config, indent=1)
    (folder / "config.json").write_text(text)


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random by name; large enough that outputs depend on the input."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        is_norm = name.endswith("weight") and "norm" in name.lower()
        return torch.from_numpy(noise * np.float32(0.2) + np.float32(is_norm))
    scale = 0.3 if "embed" in name or "shared" in name else 2.0 / shape[-1] ** 0.5
    return torch.from_numpy(noise * np.float32(scale))


def _write_wordpiece(folder: Path) -> int:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [f"{prefix}{letter}" for prefix in ("", "##") for letter in LETTERS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*special, *letters, *WORDS]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(special)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    _write_tokenizer(folder, tokenizer, dict(zip(names, special, strict=True)))
    return len(vocab)


def _write_unigram(folder: Path, *, languages: bool, start: bool) -> int:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [f"▁{word}" for word in WORDS] + ["▁", *LETTERS]
    scores = {piece: -1.0 - index / 100 if len(piece) > 1 else -20.0 for index, piece in enumerate(pieces)}
    vocab = [(token, 0.0) for token in special] + list(scores.items())
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    config: dict[str, Any] = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    single = "$A </s>"
    ids = [("</s>", 2), ("<s>", 0)]
    if start:
        single = "<s> $A </s>"
    if languages:
        tokenizer.add_special_tokens(list(LANGUAGES))
        ids.append(("eng_Latn", len(vocab) + 1))
        single = "eng_Latn $A </s>"
        config |= {"additional_special_tokens": list(LANGUAGES), "tokenizer_class": "NllbTokenizer"}
        config |= {"src_lang": "eng_Latn", "tgt_lang": None, "legacy_behaviour": False}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B </s>", special_tokens=ids
    )
    _write_tokenizer(folder, tokenizer, config)
    return len(vocab) + len(LANGUAGES) * languages


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(common | config))
