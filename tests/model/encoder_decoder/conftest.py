"""Tiny random encoder-decoder checkpoints of every family, as `transformers` saves them, and an engine to run one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    BlenderbotSmallConfig,
    BlenderbotSmallForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    MvpConfig,
    MvpForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PLBartConfig,
    PLBartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from model.attention.reference import ReferenceAttention
from model.block_manager import BlockManager
from model.checkpoint import load_network
from model.description import describe
from model.encoder_decoder import EncoderDecoder
from model.generation_defaults import Choices
from model.kv_cache import KVCache
from model.runner import Runner
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.sequence import Sequence

VOCAB_SIZE = 96
BLOCK_SIZE = 4
T5_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
}
MARIAN = {
    "scale_embedding": True,
    "activation_function": "swish",
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)),
    "flan-t5": lambda: T5ForConditionalGeneration(
        T5Config(**T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**T5_SIZES)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**T5_SIZES)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART_SIZES)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART_SIZES, scale_embedding=True)),
    "marian": lambda: MarianMTModel(MarianConfig(**BART_SIZES, **MARIAN, pad_token_id=95, decoder_start_token_id=95)),
    "marian-two-vocabularies": lambda: MarianMTModel(
        MarianConfig(
            **BART_SIZES,
            **MARIAN,
            decoder_vocab_size=80,
            share_encoder_decoder_embeddings=False,
            pad_token_id=79,
            decoder_start_token_id=79,
        )
    ),
    "m2m100": lambda: M2M100ForConditionalGeneration(M2M100Config(**BART_SIZES)),
    "pegasus": lambda: PegasusForConditionalGeneration(
        PegasusConfig(**BART_SIZES, scale_embedding=True, activation_function="relu")
    ),
    "blenderbot": lambda: BlenderbotForConditionalGeneration(BlenderbotConfig(**BART_SIZES)),
    "blenderbot-small": lambda: BlenderbotSmallForConditionalGeneration(BlenderbotSmallConfig(**BART_SIZES)),
    "mvp": lambda: MvpForConditionalGeneration(MvpConfig(**BART_SIZES)),
    "plbart": lambda: PLBartForConditionalGeneration(PLBartConfig(**BART_SIZES)),
}


END_BIAS = {
    "bart": 4.0,
    "blenderbot": 0.0,
    "blenderbot-small": 4.0,
    "marian": 4.5,
    "mbart": 1.0,
    "mvp": 4.0,
    "pegasus": 0.0,
    "plbart": 4.0,
}
"""What makes these seeds' texts end at different lengths."""


def enliven(model: PreTrainedModel) -> None:
    """Weights so large that what is generated depends on source and position, and now and then ends."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
        elif "shared" in name or "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(std=0.5)
        model.final_logits_bias[0, model.config.eos_token_id] = END_BIAS[model.config.model_type]


SaveSeq2Seq = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def save_seq2seq(tmp_path_factory: pytest.TempPathFactory) -> SaveSeq2Seq:
    """`save_seq2seq(family, seed=0, **generation)` gives a folder and the model that is in it."""

    def save(family: str, seed: int = 0, **generation: Any) -> tuple[Path, PreTrainedModel]:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(seed)
        model = FAMILIES[family]().eval()
        enliven(model)
        for name, value in generation.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(folder)
        return folder, model

    return save


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass(slots=True)
class Engine:
    """One checkpoint from sources to finished ids, without processes."""

    folder: Path
    max_batch_tokens: int = 200
    num_blocks: int = 256
    num_preempted: int = 0

    def generate(self, sources: list[list[int]], choices: Choices, task: str | None = None) -> list[list[int]]:
        network = load_network(self.folder)
        assert isinstance(network, EncoderDecoder)
        config = network.config
        defaults = describe(self.folder).sequence_to_sequence
        assert defaults is not None
        cache = KVCache(
            num_layers=config.num_layers,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            dtype=torch.float32,
            device="cpu",
        )
        runner = Runner(network, config, cache, ReferenceAttention())
        limits = SchedulerLimits(
            max_batch_tokens=self.max_batch_tokens, max_sequences=64, max_model_len=config.context_length
        )
        scheduler = Scheduler(BlockManager(self.num_blocks, BLOCK_SIZE), limits)
        for number, source in enumerate(sources):
            sampling = defaults.sampling(task, choices)
            sequence = Sequence(number, list(defaults.decoder_prompt), sampling, encoder_ids=source)
            assert scheduler.add(sequence, now=0.0) is None
        found: list[list[int]] = [[] for _ in sources]
        for _ in range(1000):
            if not scheduler.has_work:
                return found
            batch = scheduler.schedule(0.0)
            self.num_preempted += scheduler.num_preempted
            for output in scheduler.update(batch, runner.run(batch), 0.0):
                assert output.error is None
                found[output.request_id] += output.token_ids
        raise AssertionError("the requests do not end")


@pytest.fixture(scope="session")
def make_engine() -> type[Engine]:
    """`make_engine(folder).generate(sources, choices)` gives the ids that each source's text has."""
    return Engine
