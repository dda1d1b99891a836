"""Runners over tiny random checkpoints, and a scheduler as simple as can be: everything runs in every step."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend
from model.batch import Batch, Row, RowOutput, SamplingParams, TokenLogprobs
from model.checkpoint import load_network
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache
from model.runner import Runner

VOCAB_SIZE, BLOCK_SIZE, NUM_BLOCKS = 97, 4, 2000
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
}
T5 = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_max_distance": 20}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 128,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=7)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, **T5, decoder_start_token_id=0)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=VOCAB_SIZE, **BART)),
}


@dataclass
class Work:
    """A request of the test and what became of it."""

    prompt_ids: list[int]
    sampling: SamplingParams
    encoder_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None
    num_computed: int = 0
    done: bool = False


@dataclass
class Everything:
    """Runs all its work to the end; `chunk` bounds the tokens of a row in a step. Blocks are dealt out scattered."""

    runner: Runner
    chunk: int = 1000
    works: list[Work] = field(default_factory=list)
    first_id: int = 0
    """Where sequence ids begin: rows of different runs must not share them."""

    def run(self) -> list[Work]:
        while rows := [self._row(index, work) for index, work in enumerate(self.works) if not work.done]:
            found = self.runner.run(Batch(rows))
            for row, output in zip(rows, found.rows, strict=True):
                assert output.sequence_id == row.sequence_id
                self._take(self.works[row.sequence_id - self.first_id], row, output)
        return self.works

    def _row(self, index: int, work: Work) -> Row:
        known = work.prompt_ids + work.output_ids
        ids = known[work.num_computed : work.num_computed + self.chunk]
        return Row(
            self.first_id + index,
            ids,
            work.num_computed,
            self._blocks(2 * index, work.num_computed + len(ids)),
            work.sampling,
            work.num_computed + len(ids) == len(known),
            work.output_ids,
            work.prompt_ids,
            self._blocks(2 * index + 1, len(work.encoder_ids)),
            work.encoder_ids,
            bool(work.encoder_ids) and work.num_computed == 0,
        )

    def _blocks(self, owner: int, num_tokens: int) -> list[int]:
        owners = 2 * len(self.works)
        return [(owner + owners * i) * 7 % NUM_BLOCKS for i in range(-(-num_tokens // BLOCK_SIZE))]

    @staticmethod
    def _take(work: Work, row: Row, output: RowOutput) -> None:
        work.num_computed += len(row.token_ids)
        work.error = output.error
        work.prompt_logprobs += output.prompt_logprobs or []
        if row.samples and output.token_id is not None:
            work.output_ids.append(output.token_id)
            if output.logprobs is not None:
                work.logprobs.append(output.logprobs)
        ended = bool(work.output_ids) and work.output_ids[-1] in work.sampling.stop_ids
        full = len(work.output_ids) >= work.sampling.max_tokens
        work.done = work.error is not None or output.grammar_finished or ended or full


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """`saved_model("llama")`: the folder of a tiny random checkpoint, and the model of transformers that it is."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            torch.manual_seed(5)
            model = MODELS[name]().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    # Far from uniform: the most likely token must be clear of the second by more than rounding.
                    parameter.mul_(3)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return make


@pytest.fixture
def make_runner(saved_model: Callable[[str], tuple[Path, PreTrainedModel]]) -> Callable[..., Runner]:
    def make(name: str, backend: AttentionBackend | None = None, grammars: GrammarCompiler | None = None) -> Runner:
        return runner_of(saved_model(name)[0], backend, grammars)

    return make


def runner_of(folder: Path, backend: AttentionBackend | None = None, grammars: GrammarCompiler | None = None) -> Runner:
    network = load_network(folder)
    config = network.config
    cache = KVCache(
        config.num_layers,
        NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=torch.float32,
        device="cpu",
    )
    return Runner(network, config, cache, backend or CpuAttention(), grammars=grammars)


@pytest.fixture
def run_all(make_runner: Callable[..., Runner]) -> Callable[..., list[Work]]:
    """`run_all(works, model="llama", chunk=7)` runs them together, the works given unchanged.

    `known` are output ids that each has already.
    """
    numbers = iter(range(0, 10**9, 10**4))

    def run(
        works: list[Work],
        *,
        model: str = "llama",
        runner: Runner | None = None,
        chunk: int = 1000,
        known: list[int] | None = None,
    ) -> list[Work]:
        fresh = [replace(work, output_ids=list(known or []), logprobs=[], prompt_logprobs=[]) for work in works]
        return Everything(runner or make_runner(model), chunk, fresh, next(numbers)).run()

    return run


@pytest.fixture
def work() -> type[Work]:
    return Work


@pytest.fixture
def run_folder() -> Callable[..., Runner]:
    return runner_of


@pytest.fixture
def letters_tokenizer() -> Tokenizer:
    """The end of the text, an unused id, and the letters a to z."""
    pieces = ["<end>", "<unused>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<unused>"])
    return tokenizer
