"""What the keys of a GGUF file mean, family by family: the `config.json` of the checkpoint that it was made from.

Numbers that a file leaves out have the values that llama.cpp takes then. What is not a key but follows from the tensors
(the vocabulary's size, a tied head, biases, factors of rotary positions) is asked of them. No torch; both processes.

Source: github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py for the keys, `src/models/` for what they mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from model.errors import CheckpointError
from model.gguf import names, other_families
from model.gguf.experts import expert_counts, expert_size, has_experts
from model.gguf.facts import Config, Facts
from model.gguf.kinds import READ
from model.gguf.names import Naming
from model.gguf.rope import scaling

LARGEST_GEMMA: Mapping[str, int] = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose queries are scaled by the width of a head that they do not have."""
GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


@dataclass(frozen=True, slots=True)
class Family:
    naming: Naming
    configure: Callable[[Facts], Config]
    may_have_experts: bool = False


def family_of(facts: Facts) -> Family:
    """Raises: UnsupportedArchitectureError for an architecture, or a type of tensors, that is not read."""
    if facts.architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise facts.refused(f"GGUF files of the architecture {facts.architecture!r} cannot be read, only of {known}")
    for info in facts.tensors.values():
        if not info.kind.is_read:
            raise facts.refused(f"tensor {info.name!r} is stored as {info.kind.name}; read are {', '.join(READ)}")
    return FAMILIES[facts.architecture]


def read_config(facts: Facts) -> Config:
    """The `config.json` of the checkpoint; raises CheckpointError where a key is missing or makes no sense."""
    family = family_of(facts)
    if has_experts(facts) and not family.may_have_experts:
        raise facts.refused(f"a mixture of experts is not supported of {facts.architecture!r}")
    found = family.configure(facts)
    ids = {
        f"{name}_token_id": facts.token_id(key) for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    # Without an end there is none: not its class's.
    return found | {"eos_token_id": None} | {key: id for key, id in ids.items() if id is not None}


def _decoder(facts: Facts, class_name: str, model_type: str) -> Config:
    """What all that are like Llama have in common."""
    hidden_size, num_heads = facts.size("embedding_length"), facts.size("attention.head_count")
    head_size = facts.size("attention.key_length", max(1, hidden_size // num_heads))
    if facts.size("attention.value_length", head_size) != head_size:
        raise facts.refused("values of another width than keys are not supported")
    config: Config = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": facts.rows("token_embd.weight"),
        "hidden_size": hidden_size,
        "intermediate_size": facts.size("feed_forward_length"),
        "num_hidden_layers": facts.size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": facts.size("attention.head_count_kv", num_heads),
        "head_dim": head_size,
        "max_position_embeddings": facts.size("context_length"),
        "rms_norm_eps": facts.number(_epsilon(facts)),
        "rope_theta": facts.positive("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }
    if not facts.keys.flag(facts.key("attention.causal"), True):
        config["is_causal"] = False
    rotated = facts.size("rope.dimension_count", head_size)
    if rotated > head_size or rotated % 2:
        raise CheckpointError(
            f"{facts.keys.file}: {facts.key('rope.dimension_count')!r} is {rotated:,}; expected an even number of at "
            f"most {head_size:,}, the width of a head",
            file=facts.keys.file,
        )
    config["partial_rotary_factor"] = rotated / head_size
    stretched = scaling(facts, config["max_position_embeddings"], rotated // 2)
    return config if stretched is None else config | {"rope_scaling": stretched}


def _epsilon(facts: Facts) -> str:
    """The key of what is added before the root: of an RMSNorm, or else of a LayerNorm."""
    keys = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    return keys[0] if keys[0] in facts or keys[1] not in facts else keys[1]


def _llama(facts: Facts) -> Config:
    if has_experts(facts):
        return _decoder(facts, "MixtralForCausalLM", "mixtral") | expert_counts(facts, normalized=True)
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    found = {key: name in facts.tensors for key, name in biases.items()}
    return _decoder(facts, "LlamaForCausalLM", "llama") | found


def _qwen2(facts: Facts) -> Config:
    return _decoder(facts, "Qwen2ForCausalLM", "qwen2")


def _qwen3(facts: Facts) -> Config:
    return _decoder(facts, "Qwen3ForCausalLM", "qwen3") | {"attention_bias": "blk.0.attn_q.bias" in facts.tensors}


def _qwen2moe(facts: Facts) -> Config:
    config = _decoder(facts, "Qwen2MoeForCausalLM", "qwen2_moe") | expert_counts(facts, normalized=False)
    config |= expert_size(facts, config) | {"qkv_bias": "blk.0.attn_q.bias" in facts.tensors}
    shared = facts.size("expert_shared_feed_forward_length", config["intermediate_size"])
    return config | {"shared_expert_intermediate_size": shared}


def _qwen3moe(facts: Facts) -> Config:
    config = _decoder(facts, "Qwen3MoeForCausalLM", "qwen3_moe") | expert_counts(facts, normalized=True)
    return config | expert_size(facts, config) | {"attention_bias": "blk.0.attn_q.bias" in facts.tensors}


def _olmoe(facts: Facts) -> Config:
    return _decoder(facts, "OlmoeForCausalLM", "olmoe") | expert_counts(facts, normalized=False)


def _phi3(facts: Facts) -> Config:
    return _decoder(facts, "Phi3ForCausalLM", "phi3") | {"sliding_window": _window(facts)}


def _olmo2(facts: Facts) -> Config:
    """With a window it is the third."""
    window = _window(facts)
    if window is None:
        return _decoder(facts, "Olmo2ForCausalLM", "olmo2")
    config = _decoder(facts, "Olmo3ForCausalLM", "olmo3") | {"sliding_window": window}
    return config | _layer_types(facts, 4)


def _smollm3(facts: Facts) -> Config:
    """Every fourth layer is without positions: the file does not say so, llama.cpp knows no other."""
    return _llama(facts) | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}


def _granite(facts: Facts) -> Config:
    """Scales that are 0 or missing are none."""
    config = _llama(facts) | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    scales = {"embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale"}
    config |= {key: facts.number(stored, 0.0) or 1.0 for key, stored in scales.items()}
    config["attention_multiplier"] = facts.number("attention.scale", 0.0) or config["head_dim"] ** -0.5
    config["logits_scaling"] = facts.positive("logit_scale")
    return config


def _seed_oss(facts: Facts) -> Config:
    biases = {"attention_bias": "blk.0.attn_q.bias", "attention_out_bias": "blk.0.attn_output.bias"}
    found = {key: name in facts.tensors for key, name in biases.items()}
    return _decoder(facts, "SeedOssForCausalLM", "seed_oss") | found


def _ernie4_5(facts: Facts) -> Config:
    return _decoder(facts, "Ernie4_5ForCausalLM", "ernie4_5") | {"use_bias": "blk.0.attn_q.bias" in facts.tensors}


def _arcee(facts: Facts) -> Config:
    return _decoder(facts, "ArceeForCausalLM", "arcee") | {"attention_bias": "blk.0.attn_q.bias" in facts.tensors}


def _glm4(facts: Facts) -> Config:
    if "rope.dimension_sections" in facts:
        raise facts.refused("rotary positions of several kinds (a model that sees images) are not supported")
    bias = {"attention_bias": "blk.0.attn_q.bias" in facts.tensors}
    return _decoder(facts, "Glm4ForCausalLM", "glm4") | bias


def _exaone4(facts: Facts) -> Config:
    window = _window(facts)
    config = _decoder(facts, "Exaone4ForCausalLM", "exaone4") | {"sliding_window": window}
    return config if window is None else config | _layer_types(facts, 4)


def _olmo(facts: Facts) -> Config:
    clip = facts.number("attention.clamp_kqv", 0.0) or None
    return _with_layer_norms(facts, "OlmoForCausalLM", "olmo") | {"clip_qkv": clip}


def _starcoder2(facts: Facts) -> Config:
    config = _with_layer_norms(facts, "Starcoder2ForCausalLM", "starcoder2")
    return config | {"norm_epsilon": config["layer_norm_eps"], "use_bias": "blk.0.attn_q.bias" in facts.tensors}


def _stablelm(facts: Facts) -> Config:
    if "blk.0.attn_q_norm.weight" in facts.tensors:
        raise facts.refused("StableLM with normed queries and keys (12B) is not supported")
    config = _with_layer_norms(facts, "StableLmForCausalLM", "stablelm")
    return config | {
        "use_qkv_bias": "blk.0.attn_q.bias" in facts.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in facts.tensors,
    }


def _phi2(facts: Facts) -> Config:
    return _with_layer_norms(facts, "PhiForCausalLM", "phi")


def _command_r(facts: Facts) -> Config:
    config = _with_layer_norms(facts, "CohereForCausalLM", "cohere")
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in facts.tensors
    return config | {"logit_scale": facts.number("logit_scale", 0.0) or 1.0}


def _cohere2(facts: Facts) -> Config:
    config = _with_layer_norms(facts, "Cohere2ForCausalLM", "cohere2") | {"sliding_window": _window(facts)}
    return config | {"logit_scale": facts.number("logit_scale") or 1.0} | _layer_types(facts, 4)


def _nemotron(facts: Facts) -> Config:
    config = _with_layer_norms(facts, "NemotronForCausalLM", "nemotron")
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    found = {key: name in facts.tensors for key, name in biases.items()}
    return config | found | {"norm_eps": config["layer_norm_eps"]}


def _with_layer_norms(facts: Facts, class_name: str, model_type: str) -> Config:
    config = _decoder(facts, class_name, model_type)
    return config | {"layer_norm_eps": config.pop("rms_norm_eps")}


def _layer_types(facts: Facts, usual: int) -> Config:
    """Which layers have a window; by a number all but every so-manieth have."""
    key = facts.key("attention.sliding_window_pattern")
    pattern = facts.keys.values.get(key, usual)
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    return {"sliding_window_pattern": facts.keys.size(key, usual)}


def _gemma1(facts: Facts) -> Config:
    return _decoder(facts, "GemmaForCausalLM", "gemma")


def _gemma2(facts: Facts) -> Config:
    caps = {key: facts.number(key, usual) for key, usual in GEMMA2_CAPS.items()}
    return _gemma(facts, "Gemma2ForCausalLM", "gemma2") | caps


def _gemma3(facts: Facts) -> Config:
    config = _gemma(facts, "Gemma3ForCausalLM", "gemma3_text")
    config["rope_local_base_freq"] = facts.positive("rope.freq_base_swa", 10000.0)
    if "final_logit_softcapping" in facts:
        config["final_logit_softcapping"] = facts.number("final_logit_softcapping")
    return config


def _gemma(facts: Facts, class_name: str, model_type: str) -> Config:
    config = _decoder(facts, class_name, model_type)
    width: int = config["head_dim"]
    if config["num_hidden_layers"] == LARGEST_GEMMA[facts.architecture]:
        width = config["hidden_size"] // config["num_attention_heads"]
    config |= {"query_pre_attn_scalar": width, "sliding_window": _window(facts)}
    pattern = facts.keys.values.get(facts.key("attention.sliding_window_pattern"))
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    return config


def _window(facts: Facts) -> int | None:
    """None where the key is missing or 0."""
    key = facts.key("attention.sliding_window")
    return (facts.keys.whole(key) or None) if key in facts.keys else None


def _gptneox(facts: Facts) -> Config:
    config = _with_layer_norms(facts, "GPTNeoXForCausalLM", "gpt_neox")
    config["use_parallel_residual"] = facts.keys.flag(facts.key("use_parallel_residual"), True)
    return config | {"attention_bias": "blk.0.attn_qkv.bias" in facts.tensors}


FAMILIES: Mapping[str, Family] = {
    "llama": Family(names.LLAMA, _llama, may_have_experts=True),
    "qwen2": Family(names.PLAIN, _qwen2),
    "qwen2moe": Family(names.EXPERTS, _qwen2moe, may_have_experts=True),
    "qwen3": Family(names.PLAIN, _qwen3),
    "qwen3moe": Family(names.EXPERTS, _qwen3moe, may_have_experts=True),
    "gemma": Family(names.GEMMA1, _gemma1),
    "gemma2": Family(names.GEMMA, _gemma2),
    "gemma3": Family(names.GEMMA, _gemma3),
    "phi3": Family(names.PHI3, _phi3),
    "olmo": Family(names.LLAMA, _olmo),
    "olmo2": Family(names.OLMO2, _olmo2),
    "smollm3": Family(names.LLAMA, _smollm3),
    "granite": Family(names.LLAMA, _granite),
    "arcee": Family(names.LLAMA, _arcee),
    "seed_oss": Family(names.SEED_OSS, _seed_oss),
    "ernie4_5": Family(names.PLAIN, _ernie4_5),
    "glm4": Family(names.GLM4, _glm4),
    "exaone4": Family(names.OLMO2, _exaone4),
    "starcoder2": Family(names.STARCODER2, _starcoder2),
    "stablelm": Family(names.PLAIN, _stablelm),
    "phi2": Family(names.PHI2, _phi2),
    "command-r": Family(names.PLAIN, _command_r),
    "cohere2": Family(names.PLAIN, _cohere2),
    "nemotron": Family(names.GEMMA1, _nemotron),
    "olmoe": Family(names.EXPERTS, _olmoe, may_have_experts=True),
    "gpt2": Family(names.GPT2, other_families.gpt2),
    "starcoder": Family(names.GPT2, other_families.starcoder),
    "gptneox": Family(names.GPT_NEOX, _gptneox),
    "bloom": Family(names.BLOOM, other_families.bloom),
    "mpt": Family(names.MPT, other_families.mpt),
    "bert": Family(names.BERT, other_families.bert),
    "nomic-bert": Family(names.NOMIC_BERT, other_families.nomic_bert),
}
