"""jina-embeddings-v3 as transformers has it (arXiv 2409.10173): RoBERTa with rotary positions.

The LoRAs of its tasks are refused, not left out: which of them makes a vector is for the request to say. Maps
`config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.bert import configure_bert, embeddings, roberta_head, roberta_vocabulary_head
from model.architectures.encoders import UNUSED, Kind, biased, family, fused, masked_lm, only, tied_head
from model.architectures.llama import context_length, most_positions, with_defaults
from model.architectures.mapping import Part, WeightMap
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import EncoderConfig

DEFAULTS = {
    "vocab_size": 250002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
"""What an absent key means, where it is not what it means for BERT."""

RENAMED = (
    ("emb_ln.", "embeddings.LayerNorm."),
    ("encoder.layers.", "layers."),
    ("mixer.out_proj.", "self_attn.o_proj."),
    ("norm1.", "post_attention_layernorm."),
    ("norm2.", "post_mlp_layernorm."),
)
DIVIDED = (("mixer.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),)
"""The authors' names, which are in files, and transformers', by which adapters know modules."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    only(raw, {"lora_adaptations": []})
    raw = with_defaults(raw, DEFAULTS)
    config = configure_bert(raw, None, kind)
    only(raw, {"head_dim": config.head_size})
    trained = raw.size("max_position_embeddings")
    length = context_length(raw, limit, trained=trained, most=most_positions(raw, trained))
    return replace(
        config,
        head=roberta_vocabulary_head(raw, config) if kind == "vocabulary" else config.head,
        context_length=length,
        learned_positions=False,
        num_positions=0,
        rotary=rotary(raw, config.head_size, length=length, theta=20000.0),
    )


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "roberta.embeddings")
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"roberta.layers.{layer}"
        parameters |= attention_and_norms(ours, theirs)
        parameters |= biased(f"{ours}.mlp.up", f"{theirs}.mlp.fc1")
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.mlp.fc2")
    parameters |= roberta_head(config)
    ignored = (*UNUSED, r"(roberta\.)?pooler\..*")
    aliases = tied_head(config, parameters, bias="lm_head.bias")
    return WeightMap(
        parameters=parameters,
        ignored=ignored,
        prefix="roberta.",
        renamed=RENAMED,
        divided=DIVIDED,
        aliases=aliases,
    )


def attention_and_norms(ours: str, theirs: str, *, bias: bool = True) -> dict[str, tuple[Part, ...]]:
    """Of one layer, by transformers' names, which NomicBERT and GTE share."""
    attention = f"{theirs}.self_attn"
    return {
        **fused(f"{ours}.query_key_value", *(f"{attention}.{x}_proj" for x in "qkv"), bias=bias),
        **biased(f"{ours}.output", f"{attention}.o_proj", bias=bias),
        **biased(f"{ours}.attention_norm", f"{theirs}.post_attention_layernorm"),
        **biased(f"{ours}.mlp_norm", f"{theirs}.post_mlp_layernorm"),
    }


ARCHITECTURES = family("JinaEmbeddingsV3", configure, weights)
MASKED_LMS = masked_lm("JinaEmbeddingsV3", configure, weights)
