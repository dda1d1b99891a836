"""DeBERTa-v2 and -v3: attention that tells what from where (`model.disentangled`), and sometimes a convolution.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.bert import bert_layer, configure_bert, embeddings
from model.architectures.encoders import TENSORFLOW_NORMS, UNUSED, Kind, biased, family, fused, num_labels
from model.architectures.llama import ACTIVATIONS
from model.architectures.mapping import Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.config import Convolution, DisentangledAttention, EncoderConfig, HeadConfig
from model.errors import UnsupportedArchitectureError

CONVOLUTION_ACTIVATIONS = {"tanh": "tanh", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    config = configure_bert(raw, limit, kind)
    terms = _position_terms(raw)
    width = raw.size("embedding_size", config.hidden_size)
    head = config.head
    if kind == "sequence":
        if raw.size("pooler_hidden_size", config.hidden_size) != config.hidden_size:
            raise UnsupportedArchitectureError(f"{raw.file}: a pooler_hidden_size of its own is not supported")
        activation = raw.choice("pooler_hidden_act", {**ACTIVATIONS, "tanh": "tanh"}, "gelu")
        head = HeadConfig(kind="sequence", num_outputs=num_labels(raw), dense=True, activation=activation)
    return replace(
        config,
        vocab_size=raw.size("vocab_size", 128100),
        embedding_size=width,
        embedding_projection="before_norm" if width != config.hidden_size else None,
        num_token_types=raw.whole("type_vocab_size", 0),
        learned_positions=raw.flag("position_biased_input", True),
        norm_epsilon=raw.number("layer_norm_eps", 1e-7),
        attention_scale=(config.head_size * (1 + len(terms))) ** -0.5,
        disentangled=_disentangled(raw, terms) if raw.flag("relative_attention", False) else None,
        convolution=_convolution(raw),
        head=head,
    )


def _position_terms(raw: RawConfig) -> frozenset[str]:
    if "pos_att_type" not in raw:
        return frozenset()
    listed = raw.values["pos_att_type"]
    terms = listed.lower().split("|") if isinstance(listed, str) else raw.texts("pos_att_type")
    return frozenset(term.strip() for term in terms) & {"c2p", "p2c"}


def _disentangled(raw: RawConfig, terms: frozenset[str]) -> DisentangledAttention:
    distance = raw.whole("max_relative_positions", -1)
    distance = distance if distance > 0 else raw.size("max_position_embeddings", 512)
    buckets = raw.whole("position_buckets", -1)
    return DisentangledAttention(
        content_to_position="c2p" in terms,
        position_to_content="p2c" in terms,
        shared_projections=raw.flag("share_att_key", False),
        span=buckets if buckets > 0 else distance,
        num_buckets=buckets if buckets > 0 else None,
        max_distance=distance,
        normalized="layer_norm" in [name.strip() for name in raw.text("norm_rel_ebd", "none").lower().split("|")],
    )


def _convolution(raw: RawConfig) -> Convolution | None:
    size = raw.whole("conv_kernel_size", 0)
    if size <= 0:
        return None
    if not raw.flag("relative_attention", False):
        raise UnsupportedArchitectureError(f"{raw.file}: a convolution without relative_attention is not supported")
    return Convolution(
        kernel_size=size,
        groups=raw.size("conv_groups", 1),
        activation=raw.choice("conv_act", CONVOLUTION_ACTIVATIONS, "tanh"),
    )


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "deberta.embeddings")
    if config.embedding_projection is not None:
        parameters |= biased("embedding.projection", "deberta.embeddings.embed_proj", bias=False)
    rules = config.disentangled
    ignored: tuple[str, ...] = (*UNUSED, r"lm_predictions\..*", r"mask_predictions\..*", r".*position_embeddings.*")
    if rules is not None:
        parameters["relative_positions.weight"] = part("deberta.encoder.rel_embeddings.weight")
        if rules.normalized:
            parameters |= biased("relative_positions.norm", "deberta.encoder.LayerNorm")
    else:
        ignored = (*ignored, r"(deberta\.)?encoder\.LayerNorm\..*")
    if config.convolution is not None:
        parameters |= biased("convolution", "deberta.encoder.conv.conv")
        parameters |= biased("convolution.norm", "deberta.encoder.conv.LayerNorm")
    for layer in range(config.num_layers):
        parameters |= _layer(config, f"layers.{layer}", f"deberta.encoder.layer.{layer}")
    if config.head is not None:
        if config.head.dense:
            parameters |= biased("head.dense", "pooler.dense")
        parameters |= biased("head.output", "qa_outputs" if config.head.kind == "span" else "classifier")
    else:
        ignored = (*ignored, r"pooler\..*")
    return WeightMap(parameters=parameters, ignored=ignored, prefix="deberta.", renamed=TENSORFLOW_NORMS)


def _layer(config: EncoderConfig, ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    attention = f"{theirs}.attention.self"
    found = bert_layer(ours, theirs)
    found |= fused(f"{ours}.query_key_value", *(f"{attention}.{x}_proj" for x in ("query", "key", "value")))
    rules = config.disentangled
    if rules is not None and not rules.shared_projections:
        if rules.content_to_position:
            found |= biased(f"{ours}.disentangled.position_key", f"{attention}.pos_key_proj")
        if rules.position_to_content:
            found |= biased(f"{ours}.disentangled.position_query", f"{attention}.pos_query_proj")
    return found


ARCHITECTURES = family("DebertaV2", configure, weights)
