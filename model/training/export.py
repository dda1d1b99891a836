"""Trained networks as ordinary Hugging Face checkpoints, and back into the training networks for evaluation.

Matrices are stored in 8 bits, as `rounding` has prepared them for, to keep the repository small. The config asks for
float32, so a reader computes without further rounding.
The tokenizer files are written by `tokenizers`, the heads by `heads`. Runs in the training process.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from model.training.networks import Bert, BertShape, Llama, LlamaShape
from model.training.rounding import stored
from model.training.tokenizers import END_OF_TEXT, MESSAGE_END, PAD, token_id

_SENTENCE_TRANSFORMERS = "sentence_transformers.models."


def _write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def _save_weights(network: torch.nn.Module, path: Path) -> None:
    tensors = {name: stored(tensor).cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _load_weights(network: torch.nn.Module, path: Path) -> None:
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    network.eval()


def export_language_model(network: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, generation defaults and weights of the causal language model."""
    folder.mkdir(parents=True, exist_ok=True)
    end, pad, message_end = (token_id(tokenizer, token) for token in (END_OF_TEXT, PAD, MESSAGE_END))
    eos_ids = [message_end, end]
    _write_json(folder / "config.json", network.shape.hf_config(bos_id=end, eos_ids=eos_ids, pad_id=pad))
    generation = {
        "bos_token_id": end,
        "eos_token_id": eos_ids,
        "pad_token_id": pad,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
    }
    _write_json(folder / "generation_config.json", generation)
    _save_weights(network, folder / "model.safetensors")


def load_language_model(folder: Path) -> Llama:
    raw = json.loads((folder / "config.json").read_text())
    shape = LlamaShape(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        context_length=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
    )
    network = Llama(shape)
    _load_weights(network, folder / "model.safetensors")
    return network


def export_encoder(network: Bert, folder: Path, *, max_tokens: int) -> None:
    """Write the body in the sentence-transformers layout: Transformer, mean pooling, L2 normalization."""
    _write_json(folder / "config.json", network.shape.hf_config())
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": _SENTENCE_TRANSFORMERS + name}
        for number, (path, name) in enumerate(parts)
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    pooling = {
        "word_embedding_dimension": network.shape.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _save_weights(network, folder / "model.safetensors")


def load_encoder(folder: Path) -> Bert:
    raw = json.loads((folder / "config.json").read_text())
    shape = BertShape(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        context_length=raw["max_position_embeddings"],
        dropout=raw["hidden_dropout_prob"],
    )
    network = Bert(shape)
    _load_weights(network, folder / "model.safetensors")
    return network
