"""What the tensors of a GGUF file are called in the checkpoint that it was made from, and what was done to them.

llama.cpp has one set of names for all architectures; those that it reads are turned back into each family's own here,
so that no architecture's file knows of GGUF. Plain data, no torch.

Sources: github.com/ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py for the names, the classes of `conversion/` for
what a conversion changes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
OUTER = re.compile(r"(\w+)\.(weight|bias)")
ONE_ROW = re.compile(r"blk\.\d+\.ffn_gate_inp_shexp\.weight")
"""A matrix of one row, which some converters store as a vector."""
ROTARY = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""What positions are divided by: part of the config elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """Names without "weight" and "bias", outside of layers and within one."""

    outer: Mapping[str, str]
    layers: str
    inner: Mapping[str, str]
    interleaved: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer whose heads lie with their halves interleaved, and which key counts those heads."""
    norm_offset: float = 0.0
    """What was added to the weights of norms."""
    regrouped: frozenset[str] = frozenset()
    """Tensors of a layer that lay head by head, each with its query, key and value, and now kind by kind."""

    def original(self, name: str) -> str:
        """The name in the checkpoint; one that is not known here stays as it is. {} in it stands for an expert's
        number: such a tensor has the matrices of all, one behind the other."""
        if (found := LAYER.fullmatch(name)) and found[2] in self.inner:
            return f"{self.layers}.{found[1]}.{self.inner[found[2]]}.{found[3]}"
        if (found := OUTER.fullmatch(name)) and found[1] in self.outer:
            return f"{self.outer[found[1]]}.{found[2]}"
        return name

    def offset(self, name: str) -> float:
        return self.norm_offset if name.removesuffix(".weight").endswith("norm") else 0.0

    def heads_key(self, name: str) -> str | None:
        """The key, behind the architecture's name, of how many heads lie interleaved in this tensor; None: none do."""
        found = LAYER.fullmatch(name)
        return self.interleaved.get(found[2]) if found else None

    def is_regrouped(self, name: str) -> bool:
        found = LAYER.fullmatch(name)
        return found is not None and found[2] in self.regrouped


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_BERT = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}

_NOMIC_BERT = {
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.out_proj",
    "attn_output_norm": "norm1",
    "ffn_up": "mlp.fc11",
    "ffn_gate": "mlp.fc12",
    "ffn_down": "mlp.fc2",
    "layer_output_norm": "norm2",
}

PLAIN = Naming(outer=_OUTER, layers="model.layers", inner=_INNER)
EXPERTS = Naming(outer=_OUTER, layers="model.layers", inner=_INNER | _EXPERTS)
LLAMA = Naming(
    outer=_OUTER,
    layers="model.layers",
    inner=_INNER | _MIXTRAL,
    interleaved={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
)
GEMMA1 = Naming(outer=_OUTER, layers="model.layers", inner=_INNER, norm_offset=1.0)
GEMMA = Naming(outer=_OUTER, layers="model.layers", inner=_INNER | _AROUND, norm_offset=1.0)
OLMO2 = Naming(outer=_OUTER, layers="model.layers", inner=_INNER | _AROUND)
PHI3 = Naming(outer=_OUTER, layers="model.layers", inner=_INNER | {"ffn_up": "mlp.gate_up_proj"})
SEED_OSS = Naming(
    outer=_OUTER, layers="model.layers", inner=_INNER | {"post_attention_norm": "post_attention_layernorm"}
)
GLM4 = Naming(
    outer=_OUTER,
    layers="model.layers",
    inner=_INNER
    | {
        "ffn_up": "mlp.gate_up_proj",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
)
STARCODER2 = Naming(
    outer=_OUTER, layers="model.layers", inner=_INNER | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
)
PHI2 = Naming(
    outer=_OUTER | {"output_norm": "model.final_layernorm"},
    layers="model.layers",
    inner=_INNER | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
)
GPT2 = Naming(
    outer={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    layers="transformer.h",
    inner=_GPT2,
)
_BY_HEADS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
GPT_NEOX = Naming(
    outer={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head"},
    layers="gpt_neox.layers",
    inner=_BY_HEADS | {"attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"},
    regrouped=frozenset({"attn_qkv"}),
)
BLOOM = Naming(
    outer={
        "token_embd": "transformer.word_embeddings",
        "token_embd_norm": "transformer.word_embeddings_layernorm",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    layers="transformer.h",
    inner=_BY_HEADS | {"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"},
    regrouped=frozenset({"attn_qkv"}),
)
MPT = Naming(
    outer={"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
    layers="transformer.blocks",
    inner={
        "attn_norm": "norm_1",
        "attn_qkv": "attn.Wqkv",
        "attn_output": "attn.out_proj",
        "ffn_norm": "norm_2",
        "ffn_up": "ffn.up_proj",
        "ffn_down": "ffn.down_proj",
    },
)
BERT = Naming(
    outer={
        "token_embd": "bert.embeddings.word_embeddings",
        "position_embd": "bert.embeddings.position_embeddings",
        "token_types": "bert.embeddings.token_type_embeddings",
        "token_embd_norm": "bert.embeddings.LayerNorm",
    },
    layers="bert.encoder.layer",
    inner=_BERT,
)
NOMIC_BERT = Naming(
    outer={
        "token_embd": "bert.embeddings.word_embeddings",
        "token_types": "bert.embeddings.token_type_embeddings",
        "token_embd_norm": "bert.emb_ln",
    },
    layers="bert.encoder.layers",
    inner=_NOMIC_BERT,
)
