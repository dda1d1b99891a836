"""MPNet: BERT with a relative bias that all layers share, and RoBERTa's way of counting positions.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.bert import configure_bert, embeddings, roberta_head, roberta_vocabulary_head
from model.architectures.encoders import UNUSED, Kind, biased, family, fused, masked_lm, tied_head
from model.architectures.llama import context_length
from model.architectures.mapping import WeightMap, part
from model.architectures.raw import RawConfig
from model.config import EncoderConfig

PADDING_ID = 1
"""The reference code has it as a constant, whatever `pad_token_id` says."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    config = configure_bert(raw, None, kind)
    return replace(
        config,
        head=roberta_vocabulary_head(raw, config) if kind == "vocabulary" else config.head,
        context_length=context_length(raw, limit, trained=config.num_positions - PADDING_ID - 1),
        position_offset=PADDING_ID + 1,
        pad_id=PADDING_ID,
        num_token_types=0,
        relative_buckets=raw.size("relative_attention_num_buckets", 32),
    )


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "mpnet.embeddings")
    parameters["relative_bias"] = part("mpnet.encoder.relative_attention_bias.weight")
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"mpnet.encoder.layer.{layer}"
        parameters |= fused(f"{ours}.query_key_value", *(f"{theirs}.attention.attn.{x}" for x in "qkv"))
        parameters |= biased(f"{ours}.output", f"{theirs}.attention.attn.o")
        parameters |= biased(f"{ours}.attention_norm", f"{theirs}.attention.LayerNorm")
        parameters |= biased(f"{ours}.mlp.up", f"{theirs}.intermediate.dense")
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.output.dense")
        parameters |= biased(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")
    parameters |= roberta_head(config)
    ignored = (*UNUSED, r"(mpnet\.)?pooler\..*")
    aliases = tied_head(config, parameters, bias="lm_head.bias")
    return WeightMap(parameters=parameters, ignored=ignored, prefix="mpnet.", aliases=aliases)


ARCHITECTURES = family("MPNet", configure, weights)
MASKED_LMS = masked_lm("MPNet", configure, weights)
