"""Tiny checkpoints of every decoder architecture, made and saved by transformers, and packed runs of our network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model.attention.attend import PackedAttend
from model.attention.interface import Attend, PackedLayout
from model.attention.reference import ReferenceAttention
from model.decoder import Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HALVES = {"hidden_size": 48}
"""For those whose head size is always hidden_size / num_attention_heads."""
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
ERNIE = {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 24}
NEOX = {"hidden_size": 64, "head_dim": None}
GPT2_SIZES = {"vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
}
NAMED_SIZES = {"vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 96}
SOME_TURN = {"no_rope_layers": [1, 0, 1]}
MUP = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
}
QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
FALCON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 96,
}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OLMO3_ROTARY = {
    "full_attention": {**YARN, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
}
GEMMA = {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama, tied, biased": {
        "model_type": "llama",
        **SIZES,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama 3 scaling": {"model_type": "llama", **SIZES, "rope_parameters": LLAMA3},
    "llama, linear scaling": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
    },
    "llama, yarn": {"model_type": "llama", **SIZES, "rope_parameters": YARN},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **SIZES, **HALVES},
    "qwen2, sliding": {
        "model_type": "qwen2",
        **SIZES,
        **HALVES,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **SIZES},
    "gemma": {"model_type": "gemma", **SIZES},
    "gemma2": {"model_type": "gemma2", **SIZES, **GEMMA, "sliding_window": 5},
    "vaultgemma": {"model_type": "vaultgemma", **SIZES, **GEMMA, "sliding_window": 5},
    "gemma3": {
        "model_type": "gemma3_text",
        **SIZES,
        "num_hidden_layers": 7,
        "sliding_window": 5,
        "query_pre_attn_scalar": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "gemma3, softcaps": {"model_type": "gemma3_text", **SIZES, **GEMMA, "sliding_window": 5},
    "phi3": {"model_type": "phi3", **SIZES, **HALVES, "sliding_window": 9},
    "phi3, partial rotary": {
        "model_type": "phi3",
        **SIZES,
        **HALVES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "olmo2": {"model_type": "olmo2", **SIZES, **HALVES},
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, **EXPERTS, "norm_topk_prob": True},
    "qwen3_moe, some layers": {
        "model_type": "qwen3_moe",
        **SIZES,
        **EXPERTS,
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 5},
    "mixtral, sliding": {"model_type": "mixtral", **SIZES, "num_experts_per_tok": 3, "sliding_window": 7},
    "qwen2_moe": {"model_type": "qwen2_moe", **SIZES, **HALVES, **EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen2_moe, sliding": {
        "model_type": "qwen2_moe",
        **SIZES,
        **HALVES,
        **EXPERTS,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "olmoe": {"model_type": "olmoe", **SIZES, **HALVES, "num_experts": 6, "num_experts_per_tok": 3},
    "olmoe, normalized, biased": {
        "model_type": "olmoe",
        **SIZES,
        **HALVES,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "glm4_moe": {"model_type": "glm4_moe", **SIZES, **ROUTED, "routed_scaling_factor": 1.5},
    "glm4_moe, normed, biased": {
        "model_type": "glm4_moe",
        **SIZES,
        **ROUTED,
        "norm_topk_prob": False,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "dots1": {
        "model_type": "dots1",
        **SIZES,
        **ROUTED,
        "norm_topk_prob": True,
        "n_shared_experts": 2,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "granitemoe": {"model_type": "granitemoe", **SIZES, **HALVES, **MUP, "num_local_experts": 5},
    "ernie4_5_moe": {"model_type": "ernie4_5_moe", **SIZES, **ERNIE, "moe_num_shared_experts": 2},
    "ernie4_5_moe, some layers": {
        "model_type": "ernie4_5_moe",
        **SIZES,
        **ERNIE,
        "num_hidden_layers": 7,
        "moe_num_shared_experts": 0,
        "moe_layer_interval": 2,
        "moe_layer_start_index": 2,
        "moe_layer_end_index": 4,
        "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", **GPT2_SIZES},
    "gpt2, untied, gelu": {
        "model_type": "gpt2",
        **GPT2_SIZES,
        "n_inner": 40,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
    },
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, **NEOX, "rotary_pct": 0.25},
    "gpt_neox, sequential": {
        "model_type": "gpt_neox",
        **SIZES,
        **NEOX,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "smollm3": {"model_type": "smollm3", **SIZES, **SOME_TURN},
    "smollm3, sliding": {
        "model_type": "smollm3",
        **SIZES,
        **SOME_TURN,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "granite": {"model_type": "granite", **SIZES, **MUP},
    "hyperclovax": {"model_type": "hyperclovax", **SIZES, **MUP},
    "hyperclovax, norms before": {"model_type": "hyperclovax", **SIZES, "use_post_norm": False},
    "starcoder2": {"model_type": "starcoder2", **SIZES, "sliding_window": 6},
    "starcoder2, no biases": {"model_type": "starcoder2", **SIZES, "use_bias": False},
    "olmo": {"model_type": "olmo", **SIZES, **HALVES},
    "olmo, clipped": {"model_type": "olmo", **SIZES, **HALVES, "clip_qkv": 0.8},
    "olmo3": {"model_type": "olmo3", **SIZES, **HALVES, **MIXED, "rope_parameters": OLMO3_ROTARY},
    "phi": {"model_type": "phi", **SIZES, **HALVES},
    "phi, normed heads": {"model_type": "phi", **SIZES, **HALVES, "qk_layernorm": True},
    "stablelm": {"model_type": "stablelm", **SIZES, **NEOX, "use_qkv_bias": True},
    "stablelm 2": {
        "model_type": "stablelm",
        **SIZES,
        **NEOX,
        "qk_layernorm": True,
        "use_parallel_residual": True,
        "rope_parameters": {**QUARTER, "partial_rotary_factor": 0.5},
    },
    "cohere": {"model_type": "cohere", **SIZES},
    "cohere, normed heads": {
        "model_type": "cohere",
        **SIZES,
        "use_qk_norm": True,
        "attention_bias": True,
        "logit_scale": 0.5,
    },
    "cohere2": {"model_type": "cohere2", **SIZES, **MIXED},
    "glm": {"model_type": "glm", **SIZES, "rope_parameters": {**QUARTER, "partial_rotary_factor": 0.5}},
    "glm4": {"model_type": "glm4", **SIZES, "attention_bias": False},
    "exaone4": {"model_type": "exaone4", **SIZES, **MIXED},
    "exaone4, no windows": {
        "model_type": "exaone4",
        **SIZES,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
    },
    "nemotron": {"model_type": "nemotron", **SIZES, "head_dim": 16},
    "nemotron, biased": {"model_type": "nemotron", **SIZES, "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "arcee": {"model_type": "arcee", **SIZES},
    "jais2": {"model_type": "jais2", **SIZES},
    "apertus": {"model_type": "apertus", **SIZES},
    "seed_oss": {"model_type": "seed_oss", **SIZES, "attention_out_bias": True},
    "ernie4_5": {"model_type": "ernie4_5", **SIZES, "use_bias": True},
    "helium": {"model_type": "helium", **SIZES, "head_dim": 8},
    "cwm": {"model_type": "cwm", **SIZES, **MIXED},
    "ministral": {"model_type": "ministral", **SIZES, **MIXED},
    "ministral3": {
        "model_type": "ministral3",
        **SIZES,
        "rope_parameters": {**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.7},
    },
    "hunyuan": {"model_type": "hunyuan_v1_dense", **SIZES},
    "hunyuan, stretched": {
        "model_type": "hunyuan_v1_dense",
        **SIZES,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 20.0, "factor": 1.0},
    },
    "persimmon": {"model_type": "persimmon", **SIZES, "head_dim": None},
    "persimmon, plain heads": {"model_type": "persimmon", **SIZES, "head_dim": None, "qk_layernorm": False},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **NAMED_SIZES},
    "gpt_bigcode, heads apart": {"model_type": "gpt_bigcode", **NAMED_SIZES, "multi_query": False, "n_inner": 40},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "vocab_size": 97,
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 3,
        "attention_types": [[["global"], 1], [["local"], 2]],
        "window_size": 6,
        "max_position_embeddings": 96,
    },
    "gptj": {"model_type": "gptj", **NAMED_SIZES, "rotary_dim": 4},
    "gptj, tied": {"model_type": "gptj", **NAMED_SIZES, "rotary_dim": 8, "n_inner": 40, "tie_word_embeddings": True},
    "codegen": {"model_type": "codegen", **NAMED_SIZES, "n_embd": 64, "n_head": 8, "rotary_dim": 6},
    "falcon": {"model_type": "falcon", **FALCON},
    "falcon 40b": {"model_type": "falcon", **FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon 11b": {
        "model_type": "falcon",
        **FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "falcon, alibi": {
        "model_type": "falcon",
        **FALCON,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "opt": {"model_type": "opt", **SIZES, "ffn_dim": 48},
    "opt, plain": {
        "model_type": "opt",
        **SIZES,
        "ffn_dim": 48,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
    "bloom": {"model_type": "bloom", "vocab_size": 97, "hidden_size": 32, "n_head": 4, "n_layer": 3},
    "bloom, 6 heads": {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_head": 6, "n_layer": 2},
    "mpt": {"model_type": "mpt", "vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 96},
    "mpt, clipped": {
        "model_type": "mpt",
        "vocab_size": 97,
        "d_model": 48,
        "n_heads": 6,
        "n_layers": 2,
        "max_seq_len": 96,
        "attn_config": {"clip_qkv": 0.9, "softmax_scale": 0.3},
    },
}

Saved = tuple[Path, PreTrainedModel]


def randomize(model: torch.nn.Module) -> None:
    """Weights so large that every norm, cap and scale shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensor.data = noise * 1.2 * tensor.shape[-1] ** -0.5
        else:
            tensor.data = noise * 0.3 + (1.0 if name.endswith("weight") else 0.0)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3


@pytest.fixture(scope="session")
def save_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """`save_reference(**config)`: transformers' model with random weights, and the folder it was saved to."""

    def save(make: Any = AutoModelForCausalLM, **values: Any) -> Saved:
        torch.manual_seed(0)
        config = AutoConfig.for_model(**values)
        # Falcon's plain attention adds ALiBi's bias twice.
        attention = "sdpa" if values["model_type"] == "falcon" else "eager"
        reference = make.from_config(config, attn_implementation=attention).eval()
        randomize(reference)
        folder = tmp_path_factory.mktemp(values["model_type"])
        reference.save_pretrained(folder)
        return folder, reference

    return save


@pytest.fixture(scope="session", params=CASES.values(), ids=CASES.keys())
def saved(request: pytest.FixtureRequest, save_reference: Callable[..., Saved]) -> Saved:
    return save_reference(**request.param)


def packed(lengths: list[int]) -> tuple[Tensor, Attend]:
    """Positions and attention of texts of these lengths, laid end to end."""
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return positions, PackedAttend(PackedLayout(starts=starts, max_len=max(lengths)), ReferenceAttention())


@pytest.fixture(scope="session")
def run_packed() -> Callable[..., list[Tensor]]:
    """`run_packed(network, texts)`: logits [length, V] of each text, from one packed pass."""

    def run(network: Decoder, texts: list[list[int]], wrap: Callable[[Attend], Attend] = lambda x: x) -> list[Tensor]:
        positions, attend = packed([len(text) for text in texts])
        ids = torch.tensor([token for text in texts for token in text])
        logits = network.logits(network(ids, positions, wrap(attend)))
        return list(logits.split([len(text) for text in texts]))

    return run


@pytest.fixture
def texts() -> list[list[int]]:
    """Four texts of mixed lengths; the longest outgrows every window of the cases."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (5, 1, 31, 12)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
