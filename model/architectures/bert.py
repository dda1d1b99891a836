"""BERT and ERNIE, and RoBERTa, XLM-RoBERTa, CamemBERT and Data2Vec (text), whose positions start elsewhere.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace
from functools import partial

from model.architectures.encoders import (
    TENSORFLOW_NORMS,
    UNUSED,
    Kind,
    biased,
    family,
    fused,
    head_size,
    masked_lm,
    num_labels,
    only,
    plain_head,
    tied_head,
    vocabulary_head,
    vocabulary_head_parts,
)
from model.architectures.llama import ACTIVATIONS, context_length
from model.architectures.mapping import Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.config import EncoderConfig, HeadConfig

POOLED = ("bert", "ernie")
"""Those that classify a text by the pooler of pre-training; the others' classifier has a dense layer of its own."""


def configure_bert(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    hidden_size, num_heads = raw.size("hidden_size", 768), raw.size("num_attention_heads", 12)
    only(raw, {"position_embedding_type": "absolute"})
    num_positions = raw.size("max_position_embeddings", 512)
    head = None if kind is None else plain_head(raw, kind)
    if kind == "sequence":
        head = HeadConfig(kind="sequence", num_outputs=num_labels(raw), dense=True, activation="tanh")
    activation, epsilon = raw.choice("hidden_act", ACTIVATIONS, "gelu"), raw.number("layer_norm_eps", 1e-12)
    if kind == "vocabulary":
        head = vocabulary_head(raw, activation=activation, epsilon=epsilon)
    return EncoderConfig(
        architecture="BertModel",
        vocab_size=raw.size("vocab_size", 30522),
        hidden_size=hidden_size,
        intermediate_size=raw.size("intermediate_size", 3072),
        num_layers=raw.size("num_hidden_layers", 12),
        num_heads=num_heads,
        context_length=context_length(raw, limit, trained=num_positions),
        num_positions=num_positions,
        embedding_size=hidden_size,
        num_token_types=raw.whole("type_vocab_size", 2),
        norm_epsilon=epsilon,
        attention_scale=head_size(raw, hidden_size, num_heads) ** -0.5,
        activation=activation,
        head=head,
    )


def configure_ernie(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    """ERNIE 2.0 and 3.0: a text's task is the first, as transformers has it where a caller names none."""
    num_task_types = raw.size("task_type_vocab_size", 3) if raw.flag("use_task_id", False) else 0
    return replace(configure_bert(raw, limit, kind), num_task_types=num_task_types)


def configure_roberta(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    """Positions are counted from behind the padding id: of 514 rows of the table 512 are for tokens."""
    config = configure_bert(raw, None, kind)
    pad_id = raw.whole("pad_token_id", 1)
    return replace(
        config,
        head=roberta_vocabulary_head(raw, config) if kind == "vocabulary" else config.head,
        context_length=context_length(raw, limit, trained=config.num_positions - pad_id - 1),
        position_offset=pad_id + 1,
        pad_id=pad_id,
    )


def roberta_vocabulary_head(raw: RawConfig, config: EncoderConfig) -> HeadConfig:
    """Its activation is GELU, whatever the layers' is."""
    return vocabulary_head(raw, activation="gelu", epsilon=config.norm_epsilon)


def weights(config: EncoderConfig, *, base: str) -> WeightMap:
    parameters = embeddings(config, f"{base}.embeddings")
    for layer in range(config.num_layers):
        parameters |= bert_layer(f"layers.{layer}", f"{base}.encoder.layer.{layer}")
    ignored: tuple[str, ...] = (*UNUSED, rf"({base}\.)?pooler\..*")
    pools = base in POOLED
    parameters |= bert_head(config, base) if pools else roberta_head(config)
    return WeightMap(
        parameters=parameters,
        ignored=ignored,
        prefix=f"{base}.",
        renamed=TENSORFLOW_NORMS,
        aliases=tied_head(config, parameters, bias="cls.predictions.bias" if pools else "lm_head.bias"),
    )


def embeddings(config: EncoderConfig, theirs: str) -> dict[str, tuple[Part, ...]]:
    found = {"embedding.tokens.weight": part(f"{theirs}.word_embeddings.weight")}
    if config.embedding_norm:
        found |= biased("embedding.norm", f"{theirs}.LayerNorm")
    if config.learned_positions:
        found["embedding.positions.weight"] = part(f"{theirs}.position_embeddings.weight")
    if config.num_token_types:
        found["embedding.types.weight"] = part(f"{theirs}.token_type_embeddings.weight")
    if config.num_task_types:
        found["embedding.tasks.weight"] = part(f"{theirs}.task_type_embeddings.weight")
    return found


def bert_layer(
    ours: str,
    theirs: str,
    *,
    attention_norm: str = "attention.output.LayerNorm",
    mlp_norm: str = "output.LayerNorm",
) -> dict[str, tuple[Part, ...]]:
    """One layer's parameters; its descendants have the norms in other places."""
    attention = f"{theirs}.attention"
    return {
        **fused(f"{ours}.query_key_value", *(f"{attention}.self.{name}" for name in ("query", "key", "value"))),
        **biased(f"{ours}.output", f"{attention}.output.dense"),
        **biased(f"{ours}.attention_norm", f"{theirs}.{attention_norm}"),
        **biased(f"{ours}.mlp.up", f"{theirs}.intermediate.dense"),
        **biased(f"{ours}.mlp.down", f"{theirs}.output.dense"),
        **biased(f"{ours}.mlp_norm", f"{theirs}.{mlp_norm}"),
    }


def bert_head(config: EncoderConfig, base: str) -> dict[str, tuple[Part, ...]]:
    """The classifier of texts reads what was the pooler of pre-training; the others are RoBERTa's."""
    if config.head is not None and config.head.kind == "vocabulary":
        theirs = "cls.predictions"
        return vocabulary_head_parts(f"{theirs}.transform.dense", f"{theirs}.transform.LayerNorm", f"{theirs}.decoder")
    if config.head is not None and config.head.kind == "sequence":
        return biased("head.dense", f"{base}.pooler.dense") | biased("head.output", "classifier")
    return roberta_head(config)


def roberta_head(config: EncoderConfig) -> dict[str, tuple[Part, ...]]:
    if config.head is None:
        return {}
    if config.head.kind == "vocabulary":
        return vocabulary_head_parts("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
    if config.head.kind == "sequence":
        return biased("head.dense", "classifier.dense") | biased("head.output", "classifier.out_proj")
    return biased("head.output", "qa_outputs" if config.head.kind == "span" else "classifier")


ARCHITECTURES = {
    **family("Bert", configure_bert, partial(weights, base="bert")),
    **family("Ernie", configure_ernie, partial(weights, base="ernie")),
    **family("Roberta", configure_roberta, partial(weights, base="roberta")),
    **family("XLMRoberta", configure_roberta, partial(weights, base="roberta")),
    **family("Camembert", configure_roberta, partial(weights, base="roberta")),
    **family("Data2VecText", configure_roberta, partial(weights, base="data2vec_text")),
}
MASKED_LMS = {
    **masked_lm("Bert", configure_bert, partial(weights, base="bert")),
    **masked_lm("Ernie", configure_ernie, partial(weights, base="ernie")),
    **masked_lm("Roberta", configure_roberta, partial(weights, base="roberta")),
    **masked_lm("XLMRoberta", configure_roberta, partial(weights, base="roberta")),
    **masked_lm("Camembert", configure_roberta, partial(weights, base="roberta")),
    **masked_lm("Data2VecText", configure_roberta, partial(weights, base="data2vec_text")),
}
