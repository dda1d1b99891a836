"""Checkpoints of well-known shapes with random weights, for benchmarks where no real weights are at hand.

The tokenizer has a word per id, "w17 " for 17: token ids or text can be sent, and text comes back. Needs torch; run as
a tool only.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0,
    },
    "narrow": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": 49152,
        "max_position_embeddings": 16384, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
"""Narrow is nobody's: hardly any arithmetic, so that what surrounds it can be seen."""


def make_checkpoint(shape: str, folder: Path) -> Path:
    """Writes the shape's checkpoint in bfloat16, unless it is there already. The seed is fixed."""
    target = folder / shape
    if (target / "model.safetensors").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}, indent=2))
    vocabulary = {f"w{id} ": id for id in range(config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0 "))
    tokenizer.pre_tokenizer = Split(" ", "merged_with_previous")
    tokenizer.decoder = Fuse()
    tokenizer.save(str(target / "tokenizer.json"))
    classes = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0 ", "unk_token": "w0 "}
    (target / "tokenizer_config.json").write_text(json.dumps(classes))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1 and "norm" in name
        else (torch.randn(size, generator=generator) * 0.02).bfloat16()
        for name, size in _tensor_shapes(config).items()
    }
    save_file(tensors, target / "model.safetensors")
    return target


def make_adapter(shape: str, folder: Path, number: int, rank: int = 16) -> Path:
    """Writes a LoRA of all projections of the shape's checkpoint, unless it is there already; each number's is its
    own."""
    target = folder / f"{shape}-adapter{number}"
    if (target / "adapter_model.safetensors").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": f"../{shape}", "r": rank, "lora_alpha": 2 * rank}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(number)
    tensors: dict[str, torch.Tensor] = {}
    for name, size in _tensor_shapes(SHAPES[shape]).items():
        if "proj.weight" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, size[1], generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(size[0], rank, generator=generator) * 0.02
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def make_drafted(shape: str, folder: Path, loudness: float) -> tuple[Path, Path]:
    """Writes a checkpoint of the shape whose layers, but for the first tenth, add so much of what they would, and those
    first ones as its draft, unless they are there already: the fainter the others, the more often it is right."""
    plain = make_checkpoint(shape, folder)
    num_layers = SHAPES[shape]["num_hidden_layers"]
    num_own = max(1, num_layers // 10)
    large, draft = folder / f"{shape}-loudness{loudness:g}", folder / f"{shape}-draft{num_own}"
    tensors = load_file(plain / "model.safetensors")
    later = {name for name in tensors if "layers." in name and int(name.split(".")[2]) >= num_own}
    louder = {name for name in later if name.endswith(("o_proj.weight", "down_proj.weight"))}
    for target, count, kept in (
        (
            large,
            num_layers,
            {name: tensor * loudness if name in louder else tensor for name, tensor in tensors.items()},
        ),
        (draft, num_own, {name: tensor for name, tensor in tensors.items() if name not in later}),
    ):
        if not (target / "model.safetensors").exists():
            shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
            config = json.loads((plain / "config.json").read_text()) | {"num_hidden_layers": count}
            (target / "config.json").write_text(json.dumps(config, indent=2))
            save_file(kept, target / "model.safetensors")
    return large, draft


def _tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, size in (("q", hidden), ("k", kv_size), ("v", kv_size)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes
