"""Records adapters of the tiny checkpoints (`tiny_checkpoints.py`) as PEFT saves them, with the last logits of PEFT's
model of both (nothing merged), into `adapters/` beside it: one safetensors file for each case, the adapter's tensors
and `logits` together, `adapter_config.json` and the base's name in its metadata.

PEFT is not needed by the tests. To record again:

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy && \
    /tmp/venv/bin/python tests/reference/record_adapters.py
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make, random_tensor
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

OUTPUT = Path(__file__).with_name("adapters")
IDS = [3, 17, 5, 44, 60, 12, 9, 31, 2, 58, 40, 7]
TARGET_IDS = [1, 9, 30, 8, 77]
NUM_NEW_TOKENS = 3
NUM_LOGITS = 2
"""Of the last tokens; a classifier has one row."""


@dataclass(frozen=True)
class Case:
    base: str
    auto: Any
    task: str
    settings: dict[str, Any]
    loading: dict[str, Any] = field(default_factory=dict)
    grows: bool = False
    saves_embeddings: Any = False


def decoder(base: str, **settings: Any) -> Case:
    return Case(base, AutoModelForCausalLM, "CAUSAL_LM", settings)


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": decoder(
        "llama",
        target_modules=PROJECTIONS,
        rank_pattern={"down_proj": 4, r"layers.0.*.k_proj": 1},
        alpha_pattern={"q_proj": 7, "layers.1.mlp.up_proj": 1},
    ),
    "llama-dora": decoder("llama", target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=True),
    "llama-embedding": Case(
        "llama-tied",
        AutoModelForCausalLM,
        "CAUSAL_LM",
        {"target_modules": ["embed_tokens", "o_proj"]},
        saves_embeddings=True,
    ),
    "llama-embedding-dora": decoder("llama", target_modules=["embed_tokens"], use_dora=True),
    "llama-embedding-saved": decoder("llama-tied", target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    "llama-output": decoder("llama-tied", target_modules=["v_proj", "lm_head"]),
    "llama-vocabulary": Case(
        "llama", AutoModelForCausalLM, "CAUSAL_LM", {"target_modules": ["v_proj"]}, grows=True, saves_embeddings="auto"
    ),
    "llama-classifier": Case(
        "llama",
        AutoModelForSequenceClassification,
        "SEQ_CLS",
        {"target_modules": ["q_proj"]},
        {"num_labels": 3, "pad_token_id": 1},
    ),
    "gpt2": decoder("gpt2", target_modules=["c_attn", "c_proj", "c_fc"], bias="lora_only", fan_in_fan_out=True),
    "gpt2-dora": decoder("gpt2", target_modules=["c_attn", "attn.c_proj"], use_dora=True),
    "gpt2-lora-bias": decoder("gpt2", target_modules=["mlp.c_proj"], lora_bias=True),
    "bert-classifier": Case(
        "three-classes",
        AutoModelForSequenceClassification,
        "SEQ_CLS",
        {"target_modules": ["query", "dense"], "bias": "all"},
        {"num_labels": 5, "ignore_mismatched_sizes": True},
    ),
    "t5": Case("t5", AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", {"target_modules": ["q", "v", "wi", "wo"]}),
}


def record(name: str, case: Case) -> None:
    with tempfile.TemporaryDirectory() as root:
        base = make(case.base, Path(root) / "base")
        model = case.auto.from_pretrained(base, dtype=torch.float32, **case.loading)
        if case.grows:
            model.resize_token_embeddings(model.config.vocab_size + NUM_NEW_TOKENS, mean_resizing=False)
            case.settings["modules_to_save"] = ["embed_tokens", "lm_head"]
        settings = {"r": 2, "lora_alpha": 3, "task_type": case.task, **case.settings}
        adapted = get_peft_model(model, LoraConfig(**settings)).eval()
        for parameter_name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                train(parameter_name, parameter)
        adapted.save_pretrained(Path(root) / "adapter", save_embedding_layers=case.saves_embeddings)
        config = json.loads((Path(root) / "adapter" / "adapter_config.json").read_text())
        tensors = load_file(Path(root) / "adapter" / "adapter_model.safetensors")
        write(name, case, tensors, logits(adapted), config)


def train(name: str, parameter: Tensor) -> None:
    """Gives a parameter other values, such as bfloat16 holds."""
    noise = random_tensor(name, tuple(parameter.shape))
    changed = parameter.data * (1 + 0.3 * noise) if "magnitude" in name else parameter.data + 0.5 * noise
    parameter.data = changed.bfloat16().float()


def logits(model: PreTrainedModel) -> Tensor:
    extra = {"decoder_input_ids": torch.tensor([TARGET_IDS])} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([IDS]), **extra).logits[0]
    return (found[-NUM_LOGITS:] if found.dim() == 2 else found).clone()


def write(name: str, case: Case, tensors: dict[str, Tensor], expected: Tensor, config: dict[str, Any]) -> None:
    OUTPUT.mkdir(exist_ok=True)
    kept = {key: narrow(tensor) for key, tensor in tensors.items()}
    config["base_model_name_or_path"] = "../base"
    metadata = {"adapter_config.json": json.dumps(config), "base": case.base}
    save_file(kept | {"logits": expected}, OUTPUT / f"{name}.safetensors", metadata)


def narrow(tensor: Tensor) -> Tensor:
    """In bfloat16 where that holds the values."""
    return tensor.bfloat16() if torch.equal(tensor.bfloat16().float(), tensor) else tensor


if __name__ == "__main__":
    for name, case in CASES.items():
        record(name, case)
