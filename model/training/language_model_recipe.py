"""The recipe of the causal language model: vocabulary, tokens, prose, then instructions at falling rates, then manners.

Every stage leaves its result in the work folder and is skipped when that is there, so a run can be stopped and resumed.
Knows the order of things and nothing of how each is done. Runs in the training process.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from model.training import corpus
from model.training.cards import render_card
from model.training.data import (
    Batch,
    MaskedExamples,
    PackedTokens,
    cut_into_pieces,
    prose_documents,
    tokenize_documents,
)
from model.training.evaluate_language_model import evaluate_language_model
from model.training.export import export_language_model
from model.training.instructions import Turn, courteous_turns, encode_turn, instruction_turns
from model.training.networks import Llama, LlamaShape
from model.training.pretrain import LanguageModelSettings, train_language_model
from model.training.run import Run
from model.training.tokenizers import save_byte_bpe, train_byte_bpe

VALIDATION_WINDOWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelRecipe:
    """The language model's config file."""

    shape: LlamaShape
    batch_size: int
    instruction_batch_size: int
    prose: LanguageModelSettings
    instructions: LanguageModelSettings
    courtesies: LanguageModelSettings
    seed: int = 3


def _tokenizer(recipe: LanguageModelRecipe, data: Path, work: Path) -> Tokenizer:
    if not (work / "tokenizer.json").exists():
        documents = prose_documents(data, seed=recipe.seed)
        turns = instruction_turns(data, seed=recipe.seed)
        texts = [*documents[::5], *corpus.stories(data)[0], *(question for question, _ in turns[::4])]
        save_byte_bpe(train_byte_bpe(texts, recipe.shape.vocab_size), work, context_length=recipe.shape.context_length)
    return Tokenizer.from_file(str(work / "tokenizer.json"))


def _stream(
    file: Path, tokenizer: Tokenizer, documents: Callable[[], list[str]]
) -> "np.ndarray[tuple[int], np.dtype[np.uint16]]":
    if not file.exists():
        np.save(file, tokenize_documents(tokenizer, documents()))
    found: np.ndarray[tuple[int], np.dtype[np.uint16]] = np.load(file)
    return found


def instruction_examples(
    recipe: LanguageModelRecipe, tokenizer: Tokenizer, turns: list[Turn], *, device: str
) -> MaskedExamples:
    """The exchanges that fit the context."""
    encoded = [encode_turn(tokenizer, turn) for turn in turns]
    length = recipe.shape.context_length
    fitting = [(ids, first) for ids, first in encoded if first < length - 8]
    return MaskedExamples(fitting, length, recipe.instruction_batch_size, seed=recipe.seed, device=device)


def alternate(prose: PackedTokens, examples: MaskedExamples, *, first_prose_step: int) -> Callable[[int], Batch]:
    """Even steps go on in the prose where the first stage stopped, odd steps take instructions."""

    def batches(step: int) -> Batch:
        turn, odd = divmod(step, 2)
        return examples.batch(turn) if odd else prose.batch(first_prose_step + turn)

    return batches


def _sizes(network: Llama) -> dict[str, int]:
    shape = network.shape
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "vocabulary": shape.vocab_size,
        "layers": shape.num_layers,
        "hidden": shape.hidden_size,
        "intermediate": shape.intermediate_size,
        "heads": shape.num_heads,
        "kv_heads": shape.num_kv_heads,
        "context": shape.context_length,
    }


def _summary(recipe: LanguageModelRecipe, prose_run: Run, instruction_run: Run, courtesy_run: Run) -> dict[str, object]:
    """What the card says of this run."""
    per_step = recipe.batch_size * recipe.shape.context_length
    prose, mixed = prose_run.last_step, instruction_run.last_step
    return {
        "tokens": (prose + mixed // 2) * per_step,
        "summary": (
            f"First stage: {prose:,} steps of {per_step:,} tokens of prose. Second stage: {mixed:,} steps, half of "
            f"them prose, half {recipe.instruction_batch_size} instructions each, while the rates fall to zero. "
            f"Third stage: {courtesy_run.last_step:,} steps of instructions at low rates, a fifth of them "
            f"greetings and questions about itself."
        ),
    }


def train_language_model_checkpoint(
    recipe: LanguageModelRecipe, data: Path, work: Path, output: Path, *, device: str, train_only: bool = False
) -> None:
    """All stages; leaves the checkpoint, its curves and `evaluation.json` in `output`."""
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, data, work)
    length = recipe.shape.context_length
    train = _stream(work / "train.npy", tokenizer, lambda: prose_documents(data, seed=recipe.seed))
    held = _stream(
        work / "held.npy",
        tokenizer,
        lambda: [piece for text in corpus.novels(data)[1].values() for piece in cut_into_pieces(text)],
    )
    prose = PackedTokens(train, length, recipe.batch_size, seed=1, device=device)
    held_out = PackedTokens(held, length, VALIDATION_WINDOWS // 4, seed=9, device=device)
    validation = [held_out.batch(step) for step in range(4)]
    torch.manual_seed(recipe.seed)
    network = Llama(recipe.shape).to(device)
    prose_run, instruction_run = Run(work / "prose"), Run(work / "instructions")
    train_language_model(network, prose.batch, validation, settings=recipe.prose, run=prose_run)
    examples = instruction_examples(recipe, tokenizer, instruction_turns(data, seed=recipe.seed), device=device)
    mixed = alternate(prose, examples, first_prose_step=prose_run.last_step)
    train_language_model(network, mixed, validation, settings=recipe.instructions, run=instruction_run)
    courteous = instruction_examples(recipe, tokenizer, courteous_turns(data, seed=recipe.seed), device=device)
    courtesy_run = Run(work / "courtesies")
    train_language_model(network, courteous.batch, validation, settings=recipe.courtesies, run=courtesy_run)
    if train_only:
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (output / name).write_bytes((work / name).read_bytes())
    export_language_model(network.cpu(), tokenizer, output)
    prose_run.plot(output / "prose.png", title="first stage: prose")
    instruction_run.plot(output / "instructions.png", title="second stage: prose and instructions")
    report = {"sizes": _sizes(network), "training": _summary(recipe, prose_run, instruction_run, courtesy_run)}
    report |= evaluate_language_model(output, data, seed=recipe.seed)
    (output / "evaluation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (output / "README.md").write_text(render_card(output))
