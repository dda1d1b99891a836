"""The recipe of the sentence encoder: vocabulary, texts, teacher, start, distill, fine-tune, average, names, evaluate.

Every stage leaves its result in the work folder and is skipped when that is there, so a run can be stopped and resumed.
Knows the order of things and nothing of how each is done. Runs in the training process.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.training import corpus
from model.training.averaging import move_back
from model.training.cards import render_card
from model.training.distill import DistillSettings, Lessons, distill
from model.training.evaluate_encoder import classification, evaluate_encoder
from model.training.export import export_encoder, load_encoder
from model.training.finetune import FinetuneSettings, Task, encode_labelled, encode_questions, finetune
from model.training.heads import Head, HeadConfig, best_temperature, head_logits, save_head
from model.training.name_head import NAME, fit_name_head
from model.training.networks import Bert
from model.training.questions import training_questions
from model.training.refit import hold_back, refit_head
from model.training.run import Run
from model.training.sources import LabelledText, Question
from model.training.tables import TokenTable, tokenize
from model.training.teacher import MAX_TOKENS, embed_to_file, load_teacher, load_teacher_tokenizer, restrict_vocabulary
from model.training.tokenizers import dropped_words, load_tokenizer, prune_word_pieces, save_word_pieces

ANSWER_TOKENS = 384


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe:
    """The encoder's config file."""

    sentences_per_book: int
    copies_per_dropped_word: int
    vocab_size: int
    num_cloze_questions: int
    start_share: float
    refit_heads: bool
    distill: DistillSettings
    finetune: FinetuneSettings
    teacher_finetune: FinetuneSettings
    seed: int = 11


class Preparation:
    """What both stages need, each made once, when first asked for: vocabulary, texts, the teacher's view, the start."""

    def __init__(self, recipe: EncoderRecipe, data: Path, work: Path, *, device: str) -> None:
        self._recipe, self._data, self._work, self._device = recipe, data, work, device

    @cached_property
    def questions(self) -> list[Question]:
        return training_questions(self._data, num_cloze=self._recipe.num_cloze_questions, seed=self._recipe.seed)

    @cached_property
    def _found_texts(self) -> list[str]:
        recipe = self._recipe
        texts = corpus.encoder_texts(self._data, seed=recipe.seed, sentences_per_book=recipe.sentences_per_book)
        return texts + [question.question for question in self.questions]

    @cached_property
    def kept(self) -> list[int]:
        """The teacher's ids that the student keeps; the pruned tokenizer is written on the way."""
        file = self._work / "kept.json"
        if not file.exists():
            teacher_tokenizer = load_teacher_tokenizer()
            kept = prune_word_pieces(teacher_tokenizer, self._found_texts, self._recipe.vocab_size)
            save_word_pieces(teacher_tokenizer, kept, self._work, max_tokens=MAX_TOKENS)
            file.write_text(json.dumps(kept))
        found: list[int] = json.loads(file.read_text())
        return found

    def tokenizer(self, max_tokens: int) -> Tokenizer:
        assert self.kept
        return load_tokenizer(self._work, max_tokens)

    @cached_property
    def texts(self) -> list[str]:
        """What the student sees of the teacher: found texts, and made ones for the words that its vocabulary lost."""
        recipe, words = self._recipe, dropped_words(load_teacher_tokenizer(), self.kept)
        made = corpus.texts_with_words(
            words, self._found_texts, copies=recipe.copies_per_dropped_word, seed=recipe.seed
        )
        return corpus.distinct(self._found_texts + made, seed=recipe.seed)

    @cached_property
    def lessons(self) -> Lessons:
        targets = embed_to_file(self.texts, self._work / "teacher.f16", device=self._device)
        ids = TokenTable(tokenize(self.tokenizer(MAX_TOKENS), self.texts), self._device)
        return Lessons(ids, torch.from_numpy(targets).to(self._device))

    def start(self) -> Bert:
        """The untrained student: the teacher, as far as it knows the kept word pieces."""
        return restrict_vocabulary(load_teacher(), self.kept).to(self._device)


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


def _tasks(preparation: Preparation, data: Path) -> list[Task]:
    tokenizer, tasks = preparation.tokenizer(MAX_TOKENS), []
    for name, (config, rows) in _head_configs(data).items():
        train, _ = hold_back(rows)
        tasks.append(Task(name, config, encode_labelled(tokenizer, train, config)))
    spans = HeadConfig("span", "tokens", ("start", "end"), ANSWER_TOKENS)
    pairs = encode_questions(preparation.tokenizer(ANSWER_TOKENS), preparation.questions)
    return [*tasks, Task("answer", spans, pairs)]


def _finish_head(network: Bert, head: Head, tokenizer: Tokenizer, rows: list[LabelledText], *, refit: bool) -> float:
    """Refit the head on the finished body, where that is asked for; returns its temperature."""
    train, held = hold_back(rows)
    held_back = encode_labelled(tokenizer, held, head.config)
    if refit:
        refit_head(network, head, encode_labelled(tokenizer, train, head.config), held_back)
    logits = head_logits(network, head, [row.ids for row in held_back])
    return best_temperature(logits, torch.tensor([row.target[0] for row in held_back]))


def _export(
    network: Bert,
    heads: dict[str, Head],
    preparation: Preparation,
    data: Path,
    output: Path,
    *,
    work: Path,
    refit: bool,
) -> None:
    tokenizer = preparation.tokenizer(MAX_TOKENS)
    export_encoder(network, output, max_tokens=MAX_TOKENS)
    network.load_state_dict(load_encoder(output).state_dict())  # heads are finished on the weights as stored
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (output / name).write_bytes((work / name).read_bytes())
    configs = _head_configs(data)
    for name, head in heads.items():
        temperature = 1.0
        if name in configs:
            temperature = _finish_head(network, head, tokenizer, configs[name][1], refit=refit)
        save_head(head, output / "heads" / name, temperature=temperature)
    names, temperature = fit_name_head(network, tokenizer, data)
    save_head(names, output / "heads" / NAME, temperature=temperature)


def teacher_sentiment(recipe: EncoderRecipe, data: Path, work: Path, *, device: str) -> dict[str, object]:
    """The teacher fine-tuned on the same sentiment rows: the yardstick of the student's head. Measured once."""
    file = work / "teacher-sentiment.json"
    if file.exists():
        found: dict[str, object] = json.loads(file.read_text())
        return found
    tokenizer, network = load_teacher_tokenizer(), load_teacher().to(device)
    config, rows = _head_configs(data)["sentiment"]
    train, _ = hold_back(rows)
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


def _summary(recipe: EncoderRecipe, work: Path, distill_run: Run, finetune_run: Run) -> dict[str, object]:
    """What the card says of this run."""
    num_texts = int((work / "teacher.done").read_text())
    tokens = recipe.distill.batch_tokens
    steps = finetune_run.last_step
    shares = ", ".join(f"{name} {share:.0%}" for name, share in recipe.finetune.mix.items())
    return {
        "texts": num_texts,
        "summary": (
            f"Distillation took {distill_run.last_step:,} steps of at most {tokens:,} padded tokens, "
            f"fine-tuning {steps:,} ({shares}). AdamW, bfloat16 autocast."
        ),
        "averaging": (
            f"Every weight of the finished body is moved {recipe.start_share:.0%} of the way back to its start "
            f"(WiSE-FT, arXiv:2109.01903)."
        ),
        "heads": (
            "Each classification head is refitted on the finished body: logistic regression pulled towards the trained "
            "weights, its strength chosen on a twentieth of the training rows, held back."
            if recipe.refit_heads
            else "The heads stay as they were trained."
        ),
    }


def train_encoder(
    recipe: EncoderRecipe, data: Path, work: Path, output: Path, *, device: str, train_only: bool = False
) -> None:
    """All stages; leaves the checkpoint, its curves and `evaluation.json` in `output`."""
    work.mkdir(parents=True, exist_ok=True)
    preparation = Preparation(recipe, data, work, device=device)
    network = preparation.start()
    start = {name: weight.clone() for name, weight in network.state_dict().items()}
    distill_run, finetune_run = Run(work / "distill"), Run(work / "finetune")
    distill(network, lambda: preparation.lessons, settings=recipe.distill, run=distill_run)
    heads = finetune(
        network,
        _tasks(preparation, data),
        lambda: preparation.lessons,
        settings=recipe.finetune,
        run=finetune_run,
    )
    if train_only:
        return
    network.eval().cpu()
    move_back(network, start, recipe.start_share)
    heads = {name: head.cpu() for name, head in heads.items()}
    _export(network, heads, preparation, data, output, work=work, refit=recipe.refit_heads)
    distill_run.plot(output / "distillation.png", title="distillation")
    finetune_run.plot(output / "fine-tuning.png", title="fine-tuning of body and heads")
    report = {"sizes": _sizes(network), "training": _summary(recipe, work, distill_run, finetune_run)}
    report |= evaluate_encoder(output, data)
    report["sentiment_teacher"] = teacher_sentiment(recipe, data, work, device=device)
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "README.md").write_text(render_card(output))
