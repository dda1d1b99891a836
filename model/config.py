"""The few numbers and choices that make one of our three networks into a particular architecture.

Frozen and torch-free, derived once from a checkpoint's `config.json` by `model.architectures` and never patched later.
Says what a network is, not where its tensors are stored (that is an architecture's `WeightMap`). Both processes.
Every config has `architecture`, `vocab_size` and `context_length`.
"""

from dataclasses import dataclass, replace
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
DecoderActivation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "xielu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are stretched past the trained length; fields that a kind does not use stay at 0.

    linear: arXiv 2306.15595. dynamic: NTK-aware, for sequences up to `length`. llama3: Llama 3.1. yarn: arXiv
    2309.00071. per_dimension: LongRoPE (arXiv 2402.13753), its short or long factors already chosen.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "per_dimension"]
    factor: float = 1.0
    original_length: int = 0
    length: int = 0
    low_frequency_factor: float = 0.0
    high_frequency_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it (yarn, per_dimension)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary positions (arXiv 2104.09864) over the first `size` dimensions of a head, halves paired."""

    theta: float
    size: int
    scaling: RotaryScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryGrowth:
    """Queries of later positions are larger, so that long texts' attention stays sharp (Llama 4, Ministral 3): by
    1 + beta log(1 + floor(position / length))."""

    beta: float
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """Gated MLPs in the place of a layer's only one: a router has each token computed by a few (arXiv 2101.03961)."""

    num_experts: int
    num_chosen: int
    """Of them for each token."""
    intermediate_size: int
    """Of one expert."""
    layers: frozenset[int]
    """Those that have experts; the others have the usual MLP."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What makes an expert's share of the router's scores: of all of them, or of its own."""
    normalized: bool = False
    """The shares of a token's experts are divided by their sum."""
    scale: float = 1.0
    """And then multiplied by it."""
    selection_bias: bool = False
    """Experts are chosen by their share plus a number of their own (arXiv 2408.15664)."""
    shared_size: int | None = None
    """Intermediate size of one more MLP, which computes every token."""
    shared_gate: bool = False
    """What that makes is multiplied by the sigmoid of a score of its own (Qwen2)."""

    @property
    def num_inner(self) -> int:
        """Inner values of all the MLPs that compute a token."""
        return self.num_chosen * self.intermediate_size + (self.shared_size or 0)

    def divided(self, num_parts: int) -> "ExpertsConfig":
        """Experts of which each has so much less of its inner values."""
        shared = None if self.shared_size is None else self.shared_size // num_parts
        return replace(self, intermediate_size=self.intermediate_size // num_parts, shared_size=shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A causal decoder. The defaults are Llama's choices."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int

    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    """Added to a norm's stored weight (1 in Gemma)."""
    norm_weight: bool = True
    norm_bias: bool = True
    """What a LayerNorm has learned: OLMo's nothing, Cohere's no bias. (An RMSNorm has a weight and no bias.)"""
    norm_places: Literal["before", "after", "around"] = "before"
    """A sublayer's norms are on its input, on its output before the residual sum (OLMo 2), or on both (Gemma)."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, through a norm each, and are summed (GPT-NeoX)."""
    shared_norm: bool = False
    """Of those that are parallel: they read it through one norm (Phi, Cohere)."""
    residual_scale: float = 1.0
    """What sublayers add to the residual stream is multiplied by it (Granite)."""
    embedding_norm: bool = False
    """The embedding goes through a norm before the first layer (BLOOM)."""

    positions: Literal["rotary", "learned", "alibi"] = "rotary"
    num_learned_positions: int = 0
    """Rows of the learned position embedding; may be more than `context_length`, which a caller can lower."""
    position_offset: int = 0
    """Row of the learned position embedding that position 0 reads."""
    alibi_scale: float = 1.0
    """Factor on ALiBi's slopes, for texts longer than the trained length, or as scores are scaled (Falcon)."""
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """For the layers that have a window, where they differ (Gemma 3)."""
    rotary_layers: tuple[bool, ...] = ()
    """Whether each layer turns queries and keys to their positions (SmolLM3, Cohere 2); empty means all do."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer; empty means none anywhere."""
    causal: bool = True
    """False where a decoder was made into an embedder that sees the whole text (EmbeddingGemma)."""
    attention_scale: float
    attention_softcap: float | None = None
    query_key_norm: Literal["head", "heads", "full"] | None = None
    """Norm of queries and keys: over each head, with one weight for all of them (Qwen3, Gemma 3) or one for each
    (Cohere, StableLM), or over all heads together (OLMo 2)."""
    turned_norm: bool = False
    """Queries and keys are normed after they are turned to their positions (HunYuan)."""
    query_growth: QueryGrowth | None = None
    """How queries grow in texts longer than were trained on."""
    query_key_value_clip: float | None = None
    """Queries, keys and values are kept within this, as they are projected (OLMo)."""
    query_key_value_bias: bool = False
    attention_output_bias: bool = False

    activation: DecoderActivation = "silu"
    gated: bool = True
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None

    embedding_scale: float = 1.0
    embedding_scale_in_dtype: bool = False
    """The scale is rounded to the weights' dtype first, as Gemma was trained with."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    logits_bias: bool = False
    """The projection to logits has a bias (Phi, GPT-J)."""
    tied_embeddings: bool = False

    @property
    def norm_parameters(self) -> tuple[str, ...]:
        """What every norm has."""
        if self.norm == "rms":
            return ("weight",)
        return ("weight",) * self.norm_weight + ("bias",) * self.norm_bias

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def rotates(self, layer: int) -> bool:
        return self.rotary is not None and (not self.rotary_layers or self.rotary_layers[layer])

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        return self.experts if self.experts is not None and layer in self.experts.layers else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderConfig:
    """A sequence-to-sequence network. The defaults are BART's choices.

    `num_layers`, `num_heads`, `num_kv_heads` and `head_size` are the decoder's: its cache is made by them, and the
    cross-attention keys and values, which lie in the same blocks, have the same shape.
    """

    architecture: str
    vocab_size: int
    """Of the target; the source's is `source_vocab_size` where it has its own (some Marian checkpoints)."""
    source_vocab_size: int | None = None
    hidden_size: int
    num_layers: int
    num_heads: int
    head_size: int
    intermediate_size: int
    num_encoder_layers: int
    num_encoder_heads: int
    encoder_head_size: int
    encoder_intermediate_size: int
    context_length: int
    """Most tokens of the source, and most of the target."""

    norm: Literal["rms", "layer"] = "layer"
    norm_epsilon: float = 1e-5
    norm_first: bool = False
    """Each sublayer reads the normalised residual (pre-norm); else the residual sum is normalised (post-norm)."""
    embedding_norm: bool = False
    target_norm_before_positions: bool = False
    """Positions are added to the target's embeddings once these are normed (BlenderbotSmall), and not before."""
    final_norm: bool = False
    bias: bool = True

    positions: Literal["learned", "sinusoidal", "tensor2tensor", "relative"] = "learned"
    """Added to the embeddings: a learned table; sines and cosines as in arXiv 1706.03762 with the halves not
    interleaved (Marian, Pegasus); tensor2tensor's variant of them (M2M100). Or T5's bias on the attention scores."""
    num_positions: int = 0
    position_offset: int = 0
    """Row of the position table that position 0 reads."""
    num_relative_buckets: int = 32
    max_relative_distance: int = 128
    shared_relative_bias: bool = True
    """All layers of a side have one table of the bias; else each has its own (UMT5)."""
    attention_scale: float
    encoder_attention_scale: float

    activation: Activation = "gelu"
    gated: bool = False

    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logits_bias: bool = False
    target_start_id: int | None = None
    """Classifiers read the source a second time, as the target behind this id."""
    head: "HeadConfig | None" = None

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class DisentangledAttention:
    """DeBERTa's attention (arXiv 2006.03654): what a token is also looks at where others are, and the reverse."""

    content_to_position: bool
    position_to_content: bool
    shared_projections: bool
    """Positions go through the layer's own key and query projections, not through projections of their own."""
    span: int
    """Half the rows of the table of relative positions; (bucketed) distances are clamped to it."""
    num_buckets: int | None
    """Distances beyond half of this many share buckets of growing width; None: every distance has its own."""
    max_distance: int
    normalized: bool
    """The table of relative positions goes through a LayerNorm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """DeBERTa-v2's convolution over the embeddings, added to the first layer's output."""

    kernel_size: int
    groups: int
    activation: Literal["gelu", "gelu_tanh", "relu", "tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """What is read off the last hidden states: optionally dense, activation and norm, then one linear layer."""

    kind: Literal["sequence", "token", "span", "vocabulary"]
    """What is labelled; "vocabulary": each token, by the masked language model's head."""
    num_outputs: int
    pooling: Literal["first", "mean", "last", "late"] = "first"
    """Which hidden state of its text a "sequence" head reads; "late": each, and the logits' mean is the text's."""
    dense: bool = False
    dense_bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"] = "tanh"
    norm: bool = False
    norm_bias: bool = False
    norm_epsilon: float = 1e-5
    bias: bool = True
    tied: bool = True
    """A "vocabulary" head's matrix is the embedding's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A bidirectional encoder. The defaults are BERT's choices."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    context_length: int

    embedding_size: int
    """Width of the embedding tables; where it is not `hidden_size` a projection follows."""
    embedding_projection: Literal["before_norm", "after_norm"] | None = None
    num_token_types: int = 0
    learned_positions: bool = True
    position_offset: int = 0
    """Row of the position table that holds position 0 (RoBERTa's follow its padding id)."""
    num_positions: int = 0
    """Rows of the position table."""
    pad_id: int | None = None
    """Set where a padding id inside a text takes up no position (RoBERTa, MPNet)."""

    num_task_types: int = 0
    """Rows of the table of tasks, of which each token has the first (ERNIE)."""
    embedding_norm: bool = True

    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-12
    norm_bias: bool = True
    pre_norm: bool = False
    """Norms on each sublayer's input and one at the end (ModernBERT), instead of after each residual sum."""
    first_norm: bool = True
    """The first attention has a norm of its own, where norms are on inputs (ModernBERT: the embeddings' serves)."""
    weight_order: tuple[int, ...] = ()
    """Which set of weights each layer uses, where several layers share one (ALBERT); empty: each has its own."""
    weights_per_group: int = 1
    """Sets of weights that are stored together (ALBERT)."""

    num_kv_heads: int | None = None
    """None: as many as `num_heads`."""
    attention_bias: bool = True
    attention_scale: float
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """For the layers that have a window."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer: |i - j| < window; empty means none anywhere."""
    relative_buckets: int | None = None
    """Buckets of the relative bias that all layers share (MPNet)."""
    disentangled: DisentangledAttention | None = None
    convolution: Convolution | None = None

    activation: Activation = "gelu"
    gated: bool = False
    mlp_bias: bool = True
    mlp_down_bias: bool | None = None
    """Of a gated MLP's last projection, where it is not as that of the others (GTE)."""

    head: HeadConfig | None = None

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_weight_sets(self) -> int:
        return max(self.weight_order) + 1 if self.weight_order else self.num_layers

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None
