"""The recipe of the sentence encoder, stage by stage: texts, vocabulary, teacher, start, distill, fine-tune, evaluate.

Every stage leaves its result in the work folder and is skipped when that is there, so a run can be stopped and resumed.
Knows the order of things and nothing of how each is done. Runs in the training process.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.training import corpus
from model.training.cards import render_card
from model.training.compress import restrict_vocabulary, start_student
from model.training.distill import DistillSettings, distill
from model.training.evaluate_encoder import classification, evaluate_encoder, load_tokenizer
from model.training.export import export_encoder
from model.training.finetune import Encoded, FinetuneSettings, Task, encode_labelled, encode_questions, finetune
from model.training.heads import Head, HeadConfig, best_temperature, head_logits, save_head
from model.training.networks import Bert, BertShape
from model.training.questions import training_questions
from model.training.refit import refit_head
from model.training.run import Run
from model.training.sources import LabelledText
from model.training.teacher import MAX_TOKENS, embed_to_file, load_teacher, load_teacher_tokenizer
from model.training.tokenizers import prune_word_pieces, save_word_pieces

CALIBRATION_EVERY = 20
ANSWER_TOKENS = 384


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe:
    """The encoder's config file."""

    max_texts: int
    vocab_size: int
    layers: tuple[int, ...]
    intermediate_size: int
    num_calibration_texts: int
    num_cloze_questions: int
    distill: DistillSettings
    finetune: FinetuneSettings
    teacher_finetune: FinetuneSettings
    seed: int = 11


def _texts(recipe: EncoderRecipe, data: Path, work: Path) -> list[str]:
    file = work / "texts.json"
    if not file.exists():
        texts = corpus.encoder_texts(data, seed=recipe.seed)[: recipe.max_texts]
        file.write_text(json.dumps(texts))
    found: list[str] = json.loads(file.read_text())
    return found[: recipe.max_texts]


def _tokenizer(recipe: EncoderRecipe, texts: list[str], work: Path) -> tuple[Tokenizer, list[int]]:
    """The pruned tokenizer and the teacher's ids that it keeps."""
    kept_file = work / "kept.json"
    if not kept_file.exists():
        teacher_tokenizer = load_teacher_tokenizer()
        kept = prune_word_pieces(teacher_tokenizer, texts, recipe.vocab_size)
        save_word_pieces(teacher_tokenizer, kept, work, max_tokens=MAX_TOKENS)
        kept_file.write_text(json.dumps(kept))
    return load_tokenizer(work, MAX_TOKENS), json.loads(kept_file.read_text())


def _start(recipe: EncoderRecipe, kept: list[int], ids: list[list[int]], work: Path) -> Bert:
    shape = BertShape(
        vocab_size=len(kept),
        num_layers=len(recipe.layers),
        intermediate_size=recipe.intermediate_size,
        dropout=0.0,
    )
    file = work / "start.pt"
    if not file.exists():
        sample = sorted((row[:64] for row in ids[1000 : 1000 + recipe.num_calibration_texts]), key=len)
        teacher = restrict_vocabulary(load_teacher(), kept)
        started = start_student(teacher, recipe.layers, intermediate_size=recipe.intermediate_size, texts=sample)
        torch.save(started.state_dict(), file)
    network = Bert(shape)
    network.load_state_dict(torch.load(file, weights_only=True))
    return network


def _head_configs(data: Path) -> dict[str, tuple[HeadConfig, list[LabelledText]]]:
    """The classification heads and their training rows."""
    parts = {"sentiment": corpus.sentiment(data), "intents": corpus.intents(data), "spam": corpus.spam(data)}
    return {
        name: (
            HeadConfig("classification", "cls", tuple(sorted({row.label for row in rows.train})), MAX_TOKENS),
            rows.train,
        )
        for name, rows in parts.items()
    }


def _split_calibration(rows: list[LabelledText]) -> tuple[list[LabelledText], list[LabelledText]]:
    """(training, calibration): every twentieth row is kept back for the temperature."""
    calibration = rows[::CALIBRATION_EVERY]
    return [row for number, row in enumerate(rows) if number % CALIBRATION_EVERY], calibration


def _tasks(recipe: EncoderRecipe, tokenizer: Tokenizer, data: Path) -> list[Task]:
    tasks = []
    for name, (config, rows) in _head_configs(data).items():
        train, _ = _split_calibration(rows)
        tasks.append(Task(name, config, encode_labelled(tokenizer, train, config)))
    spans = HeadConfig("span", "tokens", ("start", "end"), ANSWER_TOKENS)
    questions = training_questions(data, num_cloze=recipe.num_cloze_questions, seed=recipe.seed)
    pairs: list[Encoded] = encode_questions(tokenizer, questions)
    return [*tasks, Task("answer", spans, pairs)]


def _finish_head(network: Bert, head: Head, tokenizer: Tokenizer, rows: list[LabelledText]) -> float:
    """Refit the head on the finished body; returns its temperature."""
    train, held_back = (encode_labelled(tokenizer, part, head.config) for part in _split_calibration(rows))
    refit_head(network, head, train, held_back)
    logits = head_logits(network, head, [row.ids for row in held_back])
    return best_temperature(logits, torch.tensor([row.target[0] for row in held_back]))


def _export(network: Bert, heads: dict[str, Head], tokenizer: Tokenizer, data: Path, work: Path, output: Path) -> None:
    export_encoder(network, output, max_tokens=MAX_TOKENS)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (output / name).write_bytes((work / name).read_bytes())
    configs = _head_configs(data)
    for name, head in heads.items():
        temperature = 1.0
        if name in configs:
            temperature = _finish_head(network, head, tokenizer, configs[name][1])
        save_head(head, output / "heads" / name, temperature=temperature)


def teacher_sentiment(recipe: EncoderRecipe, data: Path, work: Path, *, device: str) -> dict[str, object]:
    """The teacher fine-tuned on the same sentiment rows: the yardstick of the student's head. Measured once."""
    file = work / "teacher-sentiment.json"
    if file.exists():
        found: dict[str, object] = json.loads(file.read_text())
        return found
    tokenizer, network = load_teacher_tokenizer(), load_teacher().to(device)
    config, rows = _head_configs(data)["sentiment"]
    train, _ = _split_calibration(rows)
    task = Task("sentiment", config, encode_labelled(tokenizer, train, config))
    run = Run(work / "teacher-sentiment")
    heads = finetune(network, [task], None, settings=recipe.teacher_finetune, run=run)
    network.eval()
    report = classification(network, tokenizer, heads["sentiment"], corpus.sentiment(data).test)
    file.write_text(json.dumps(report) + "\n")
    return report


def _sizes(network: Bert) -> dict[str, int]:
    shape = network.shape
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "vocabulary": shape.vocab_size,
        "layers": shape.num_layers,
        "hidden": shape.hidden_size,
        "intermediate": shape.intermediate_size,
        "heads": shape.num_heads,
    }


def _summary(recipe: EncoderRecipe, num_texts: int, distill_run: Run, finetune_run: Run) -> dict[str, object]:
    """What the card says of this run."""
    tokens = recipe.distill.batch_tokens
    steps = finetune_run.last_step
    shares = ", ".join(f"{name} {share:.0%}" for name, share in recipe.finetune.mix.items())
    return {
        "texts": num_texts,
        "summary": (
            f"Distillation took {distill_run.last_step:,} steps of at most {tokens:,} padded tokens, "
            f"fine-tuning {steps:,} ({shares}). AdamW, bfloat16 autocast, on CPU."
        ),
    }


def train_encoder(recipe: EncoderRecipe, data: Path, work: Path, output: Path, *, device: str) -> None:
    """All stages; leaves the checkpoint, its curves and `evaluation.json` in `output`."""
    work.mkdir(parents=True, exist_ok=True)
    texts = _texts(recipe, data, work)
    targets = embed_to_file(texts, work / "teacher.f16", device=device)
    tokenizer, kept = _tokenizer(recipe, texts, work)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    network = _start(recipe, kept, ids, work).to(device)
    distill_run, finetune_run = Run(work / "distill"), Run(work / "finetune")
    distill(network, ids, targets, settings=recipe.distill, run=distill_run)
    tokenizer.enable_truncation(ANSWER_TOKENS)
    tasks = _tasks(recipe, tokenizer, data)
    tokenizer.enable_truncation(MAX_TOKENS)
    heads = finetune(network, tasks, (ids, targets), settings=recipe.finetune, run=finetune_run)
    network.eval().cpu()
    _export(network, {name: head.cpu() for name, head in heads.items()}, tokenizer, data, work, output)
    distill_run.plot(output / "distillation.png", title="distillation")
    finetune_run.plot(output / "fine-tuning.png", title="fine-tuning of body and heads")
    report = {"sizes": _sizes(network), "training": _summary(recipe, len(texts), distill_run, finetune_run)}
    report |= evaluate_encoder(output, data)
    report["sentiment_teacher"] = teacher_sentiment(recipe, data, work, device=device)
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "README.md").write_text(render_card(output))
