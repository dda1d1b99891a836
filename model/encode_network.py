"""A checkpoint for single-pass work: an encoder or a headless decoder, and what is read off its states.

One class for everything that answers with vectors or scores, so that the runner has one kind of thing to run. Knows
no requests and no batching. Runs in the worker process.

Legend: T tokens packed in the step, B texts, E hidden size, L outputs of the head.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.architectures.encoders import num_labels
from model.architectures.mapping import WeightMap, part
from model.architectures.raw import RawConfig
from model.attention.attend import PackedAttend
from model.checkpoint import Progress, fill
from model.compiled_encoder import CompiledEncoder, compiled_encoder
from model.compiled_layers import Quantization, compile_layers
from model.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig, HeadConfig
from model.decoder import Decoder
from model.description import read_architecture
from model.embedding_config import LogitScore, PoolingMode, read_embedding_config
from model.encoder import Encoder
from model.encoder_decoder import ClassifyingEncoderDecoder, EncoderAlone
from model.errors import CheckpointError, UnsupportedArchitectureError
from model.heads import Head
from model.layers import Device
from model.packed_linear import pack
from model.pooling import POOLERS, Span
from model.sentence_transformer import SentenceModules
from model.splade import SpladePooling
from model.splade_config import Splade, read_splade
from model.task_head_modules import TaskHead
from model.task_heads import TaskHeadKind, read_task_heads

EncodeOutput = Literal["embedding", "sparse_embedding", "token_embeddings", "logits", "token_logits", "span_logits"]

HEAD_OUTPUTS: Mapping[str, EncodeOutput] = {"sequence": "logits", "token": "token_logits", "span": "span_logits"}
TASK_HEAD_OUTPUTS: Mapping[TaskHeadKind, EncodeOutput] = {
    "classification": "logits",
    "token": "token_logits",
    "span": "span_logits",
}
HEAD_POOLING: Mapping[str, PoolingMode] = {"first": "cls", "mean": "mean", "last": "lasttoken"}


class EncodeNetwork(nn.Module):
    """A network and one reading of its states: the checkpoint's head, sentence modules, or a score of two tokens.

    A masked language model's head is a reading of its own, or (where no modules say so) one beside sentence modules.
    """

    def __init__(
        self,
        network: Encoder | CompiledEncoder | Decoder | ClassifyingEncoderDecoder | EncoderAlone,
        *,
        head: Head | None = None,
        reading: SentenceModules | LogitScore | None = None,
        splade: SpladePooling | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.sentence_modules = reading if isinstance(reading, SentenceModules) else None
        self.logit_score = reading if isinstance(reading, LogitScore) else None
        self.splade = splade
        self.task_heads = nn.ModuleDict()
        self.requires_grad_(False)

    def add_task_heads(self, folder: Path, device: Device) -> None:
        """Loads the small heads that lie in the checkpoint's folder beside its sentence modules."""
        assert self.sentence_modules is not None
        for name, config in read_task_heads(folder).items():
            hidden_size = self.config.hidden_size
            size = self.sentence_modules.config.size(hidden_size) if config.input == "embedding" else hidden_size
            self.task_heads[name] = TaskHead(config, size, device)

    @property
    def config(self) -> EncoderConfig | DecoderConfig | EncoderDecoderConfig:
        return self.network.config

    @property
    def num_layer_weights(self) -> int:
        """About how many weights each token is multiplied with in the layers (plain ones; the head is left out)."""
        config, size = self.config, self.config.hidden_size
        inner, matrices = config.intermediate_size, 3 if config.gated else 2
        if isinstance(config, DecoderConfig) and config.experts is not None:
            inner = config.experts.num_inner
        own = config.num_layers * size * (4 * size + matrices * inner)
        if not isinstance(config, EncoderDecoderConfig):
            return own
        # A text goes through both, and the decoder has attention twice.
        crossing = config.num_layers * 4 * size**2
        read = size * (4 * size + matrices * config.encoder_intermediate_size)
        return own + crossing + config.num_encoder_layers * read

    @cached_property
    def outputs(self) -> frozenset[EncodeOutput]:
        """What can be asked of this checkpoint."""
        found: set[EncodeOutput] = {"token_embeddings"}
        if self.splade is not None:
            found.add("sparse_embedding")
        if self.head is not None:
            found.add(HEAD_OUTPUTS[self.head.config.kind])
        elif self.sentence_modules is not None:
            found.add("logits" if self.sentence_modules.config.scores else "embedding")
        elif self.logit_score is not None:
            found.add("logits")
        return frozenset(found)

    def outputs_of(self, head: str) -> frozenset[EncodeOutput]:
        """The same, of a task head where one is named."""
        if not head:
            return self.outputs
        return frozenset({TASK_HEAD_OUTPUTS[self._task_head(head).config.kind]})

    def _task_head(self, name: str) -> TaskHead:
        head = self.task_heads[name]
        assert isinstance(head, TaskHead)
        return head

    def forward(self, ids: Tensor, type_ids: Tensor, positions: Tensor, attend: PackedAttend) -> Tensor:
        """ids, type_ids and positions [T]; returns the hidden states [T, E]."""
        if isinstance(self.network, Encoder | CompiledEncoder):
            hidden: Tensor = self.network(ids, type_ids, positions, attend)
        else:
            hidden = self.network(ids, positions, attend)
        return hidden

    def per_text(self, hidden: Tensor, spans: Sequence[Span], head: str = "") -> Tensor:
        """Embeddings or logits, one row per text: hidden [T, E]; returns float32 [B, size]."""
        if head:
            assert self.sentence_modules is not None
            return self._task_head(head).per_text(hidden, spans, self.sentence_modules)
        if self.head is not None:
            if self.head.config.pooling == "late":
                return POOLERS["mean"](self.head(hidden), spans)
            states = POOLERS[HEAD_POOLING[self.head.config.pooling]](hidden, spans)
            logits: Tensor = self.head(states.to(hidden.dtype))
            return logits
        if self.sentence_modules is not None:
            vectors: Tensor = self.sentence_modules(hidden, spans)
            return vectors
        assert isinstance(self.network, Decoder)
        assert self.logit_score is not None
        logits = self.network.logits(POOLERS["lasttoken"](hidden, spans))  # [B, V]
        true_id, false_id = self.logit_score.true_id, self.logit_score.false_id
        scores = logits[:, true_id] if false_id is None else logits[:, true_id] - logits[:, false_id]
        return scores[:, None]

    def sparse(self, hidden: Tensor, spans: Sequence[Span]) -> list[NDArray[np.float32]]:
        """hidden [T, E]; returns float32 [2, N] of each text: the entries' ids and their weights."""
        assert self.splade is not None
        found: list[NDArray[np.float32]] = self.splade(hidden, spans)
        return found

    def per_token(self, hidden: Tensor, head: str = "") -> Tensor:
        """Logits of each token: hidden [T, E]; returns float32 [T, L]."""
        if head:
            return self._task_head(head).per_token(hidden)
        assert self.head is not None
        logits: Tensor = self.head(hidden)
        return logits


def load_encode_network(
    folder: Path | str,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    *,
    max_model_len: int | None = None,
    packed: bool = True,
    quantization: Quantization = "none",
    exact: bool = True,
) -> EncodeNetwork:
    """The checkpoint of a folder, filled, in `dtype` (None: as stored); modules after the network are float32.

    `packed` rearranges the weights for the CPU's kernels, if it is there that they are; unless `exact`, those may
    multiply 16 bits of float32 where that is much faster. Raises: CheckpointError, naming the file and the tensor at
    fault, or if a quantization is asked for that the device or dtype does not have.
    """
    if quantization == "int4":
        raise CheckpointError("quantization int4 is for networks that generate; int8 serves those of a single pass")
    network = _load(Path(folder), device, dtype, progress, max_model_len)
    if packed and isinstance(network.network, Encoder):
        network.network = compiled_encoder(network.network, quantization, exact=exact) or network.network
    if quantization != "none" and not isinstance(network.network, CompiledEncoder):
        compile_layers(network, quantization)
    if packed:
        # A matrix that the embedding needs as it is costs its memory again: a mere embedder should not pay for it.
        splade, pools = network.splade, network.sentence_modules is not None
        pack(network, kept=splade.head.output if splade is not None and pools else None)
    return network


def _load(
    folder: Path, device: Device, dtype: torch.dtype | None, progress: Progress | None, max_model_len: int | None
) -> EncodeNetwork:
    raw, name, architecture = read_architecture(folder)
    config = architecture.configure(raw, max_model_len)
    if isinstance(config, EncoderConfig):
        encoder = Encoder(config, device)
        fill(encoder, folder, architecture.weights(config), device=device, dtype=dtype, progress=progress)
        return _encoder(encoder, folder, device, pools=architecture.head == "embedding")
    if isinstance(config, EncoderDecoderConfig) and config.head is not None:
        classifier = ClassifyingEncoderDecoder(config, device)
        fill(classifier, folder, architecture.weights(config), device=device, dtype=dtype, progress=progress)
        return EncodeNetwork(classifier, head=classifier.head)
    if isinstance(config, EncoderDecoderConfig) and architecture.head == "embedding":
        alone = EncoderAlone(config, device)
        fill(alone, folder, architecture.weights(config), device=device, dtype=dtype, progress=progress)
        return _embedder(alone, folder, device)
    if not isinstance(config, DecoderConfig):
        raise UnsupportedArchitectureError(f"{folder}: {name} makes no vectors and no scores", file="config.json")
    network = _decoder(folder, raw, config, device=device, classifies=architecture.head == "sequence_classification")
    weights = _decoder_weights(network, architecture.weights(config))
    fill(network, folder, weights, device=device, dtype=dtype, progress=progress)
    return network


def _encoder(encoder: Encoder, folder: Path, device: Device, *, pools: bool) -> EncodeNetwork:
    """The filled encoder with what its folder says is read off it; `pools` where states become a vector, too."""
    splade = None
    if encoder.head is not None:
        if encoder.head.config.kind != "vocabulary":
            return EncodeNetwork(encoder, head=encoder.head)
        splade = SpladePooling(encoder.head, read_splade(folder) or Splade())
    if not pools:
        return EncodeNetwork(encoder, splade=splade)
    return _embedder(encoder, folder, device, splade)


def _embedder(
    encoder: Encoder | EncoderAlone, folder: Path, device: Device, splade: SpladePooling | None = None
) -> EncodeNetwork:
    network = EncodeNetwork(encoder, reading=SentenceModules(read_embedding_config(folder), device), splade=splade)
    network.add_task_heads(folder, device)
    return network


def _decoder(folder: Path, raw: RawConfig, config: DecoderConfig, *, device: Device, classifies: bool) -> EncodeNetwork:
    decoder = Decoder(config, device)
    if classifies:
        head = HeadConfig(kind="sequence", num_outputs=num_labels(raw), pooling="last", bias=False)
        del decoder.output
        return EncodeNetwork(decoder, head=Head(head, config.hidden_size))
    embedding = read_embedding_config(folder)
    if embedding.logit_score is not None:
        return EncodeNetwork(decoder, reading=embedding.logit_score)
    del decoder.output
    return EncodeNetwork(decoder, reading=SentenceModules(embedding, device))


def _decoder_weights(network: EncodeNetwork, weights: WeightMap) -> WeightMap:
    """The decoder's map with our names one level deeper, without the output where there is none, and the head's."""
    kept = dict(weights.parameters)
    dropped: tuple[str, ...] = ()
    if network.logit_score is None:
        outputs = [kept.pop(name, ()) for name in ("output.weight", "output.bias")]
        dropped = tuple(re.escape(source.name) for sources in outputs for source in sources)
    parameters = {f"network.{name}": sources for name, sources in kept.items()}
    if network.head is not None:
        parameters["head.output.weight"] = part("score.weight")
    return replace(
        weights,
        parameters=parameters,
        ignored=(*weights.ignored, *dropped),
        wide=frozenset(f"network.{name}" for name in weights.wide),
    )
