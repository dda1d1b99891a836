"""The `config.json` of families that are not like Llama: GPT-2, StarCoder, BLOOM, MPT, BERT and NomicBERT.

Like `families`, which has the others, of the keys and tensors of a GGUF file. No torch; both processes.
"""

from model.gguf.facts import Config, Facts
from model.gguf.rope import scaling


def gpt2(facts: Facts) -> Config:
    if not facts.keys.flag(facts.key("attention.causal"), True):
        raise facts.refused(f"{facts.architecture} without causal attention is not supported")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": facts.rows("token_embd.weight"),
        "n_embd": facts.size("embedding_length"),
        "n_inner": facts.size("feed_forward_length"),
        "n_layer": facts.size("block_count"),
        "n_head": facts.size("attention.head_count"),
        "n_positions": facts.size("context_length"),
        "layer_norm_epsilon": facts.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }


def starcoder(facts: Facts) -> Config:
    config = gpt2(facts) | {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode"}
    return config | {"multi_query": True}


def bloom(facts: Facts) -> Config:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": facts.rows("token_embd.weight"),
        "hidden_size": facts.size("embedding_length"),
        "n_layer": facts.size("block_count"),
        "n_head": facts.size("attention.head_count"),
        "seq_length": facts.size("context_length"),
        "layer_norm_epsilon": facts.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }


def mpt(facts: Facts) -> Config:
    if any(name.endswith(".bias") for name in facts.tensors):
        raise facts.refused("MPT with biases is not supported")
    alibi = facts.number("attention.max_alibi_bias", 0.0)
    attention = {"clip_qkv": facts.number("attention.clamp_kqv", 0.0) or None, "alibi": alibi != 0}
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "vocab_size": facts.rows("token_embd.weight"),
        "d_model": facts.size("embedding_length"),
        "n_layers": facts.size("block_count"),
        "n_heads": facts.size("attention.head_count"),
        "max_seq_len": facts.size("context_length"),
        "layer_norm_epsilon": facts.number("attention.layer_norm_epsilon"),
        "attn_config": attention | ({"alibi_bias_max": alibi} if alibi else {}),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }


def bert(facts: Facts) -> Config:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": facts.rows("token_embd.weight"),
        "hidden_size": facts.size("embedding_length"),
        "intermediate_size": facts.size("feed_forward_length"),
        "num_hidden_layers": facts.size("block_count"),
        "num_attention_heads": facts.size("attention.head_count"),
        "max_position_embeddings": facts.rows("position_embd.weight"),
        "type_vocab_size": facts.rows("token_types.weight"),
        "layer_norm_eps": facts.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
    }


def nomic_bert(facts: Facts) -> Config:
    hidden_size, num_heads = facts.size("embedding_length"), facts.size("attention.head_count")
    length = facts.size("context_length")
    config: Config = {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "vocab_size": facts.rows("token_embd.weight"),
        "hidden_size": hidden_size,
        "intermediate_size": facts.size("feed_forward_length"),
        "num_hidden_layers": facts.size("block_count"),
        "num_attention_heads": num_heads,
        "max_position_embeddings": length,
        "type_vocab_size": facts.rows("token_types.weight"),
        "layer_norm_eps": facts.number("attention.layer_norm_epsilon"),
        "rope_theta": facts.positive("rope.freq_base", 10000.0),
    }
    stretched = scaling(facts, length, hidden_size // num_heads // 2)
    return config if stretched is None else config | {"rope_scaling": stretched}
