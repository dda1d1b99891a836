"""How good the encoder is, on what training never saw: heads, embeddings against the teacher's, retrieval, summaries.

Takes a checkpoint folder and the data folder, returns plain numbers for `evaluation.json`. Float32.
Runs in the training process.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.training import corpus, metrics, sources
from model.training.export import load_encoder
from model.training.finetune import Encoded, ExampleTable
from model.training.heads import Head, head_logits, load_head
from model.training.name_head import judge_names
from model.training.networks import Bert
from model.training.sources import LabelledText
from model.training.splits import held_out, pair_texts
from model.training.teacher import MAX_TOKENS, embed, load_teacher, load_teacher_tokenizer
from model.training.tokenizers import load_tokenizer

Report = dict[str, object]
MAX_ANSWER_TOKENS = 30


def classification(network: Bert, tokenizer: Tokenizer, head: Head, rows: Sequence[LabelledText]) -> Report:
    """Accuracy, macro-F1 and calibration of one head."""
    labels = head.config.labels
    wanted = [labels.index(row.label) for row in rows]
    ids = [encoding.ids for encoding in tokenizer.encode_batch([row.text for row in rows])]
    logits = head_logits(network, head, ids)
    predicted = logits.argmax(1).tolist()
    probabilities = (logits / head.config.temperature).softmax(1).numpy()
    return {
        "count": len(rows),
        "accuracy": metrics.accuracy(predicted, wanted),
        "majority": max(wanted.count(label) for label in set(wanted)) / len(wanted),
        "macro_f1": metrics.macro_f1(predicted, wanted),
        "calibration_error": metrics.calibration_error(probabilities, wanted),
    }


def few_shot_intents(network: Bert, tokenizer: Tokenizer, data: Path, *, shots: int, seed: int = 0) -> Report:
    """banking77 test by the nearest mean embedding of `shots` training sentences per intent; no training."""
    parts = corpus.intents(data)
    rng = random.Random(seed)
    labels = sorted({row.label for row in parts.train})
    chosen = {label: rng.sample([row.text for row in parts.train if row.label == label], shots) for label in labels}
    means = torch.stack([embed(network, tokenizer, chosen[label]).mean(0) for label in labels])
    found = embed(network, tokenizer, [row.text for row in parts.test]) @ torch.nn.functional.normalize(means, dim=-1).T
    wanted = [labels.index(row.label) for row in parts.test]
    return {"shots": shots, "accuracy": metrics.accuracy(found.argmax(1).tolist(), wanted)}


def agreement(network: Bert, tokenizer: Tokenizer, data: Path) -> Report:
    """Spearman between the student's and the teacher's cosine similarities on the held-out sentence pairs."""
    pools = pair_texts(data)
    pairs = held_out("sentence_pairs")
    texts = [(pools[first][i], pools[second][j]) for first, i, second, j in pairs]
    ours = _similarities(network, tokenizer, texts)
    theirs = _similarities(load_teacher(), load_teacher_tokenizer(), texts)
    within = {
        pool: metrics.spearman(ours[rows].tolist(), theirs[rows].tolist())
        for pool in ("banking77", "clinc150", "sentiment")
        if (rows := [n for n, pair in enumerate(pairs) if pair[0] == pair[2] == pool])
    }
    return {"pairs": len(pairs), "spearman": metrics.spearman(ours.tolist(), theirs.tolist()), "within": within}


def _similarities(network: Bert, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Tensor:
    first = embed(network, tokenizer, [pair[0] for pair in pairs])
    return (first * embed(network, tokenizer, [pair[1] for pair in pairs])).sum(-1)


def retrieval(network: Bert, tokenizer: Tokenizer, data: Path) -> Report:
    """Held-out XQuAD questions against all paragraphs, and against the held-out ones: is the right one first?"""
    train, test = corpus.questions(data)
    contexts = list(dict.fromkeys(row.context for row in test + train))
    num_held_out = len({row.context for row in test})
    scores = embed(network, tokenizer, [row.question for row in test]) @ embed(network, tokenizer, contexts).T
    wanted = [contexts.index(row.context) for row in test]
    return {
        "questions": len(test),
        "paragraphs": len(contexts),
        "recall_at_1": metrics.accuracy(scores.argmax(1).tolist(), wanted),
        "recall_at_1_among_held_out_paragraphs": metrics.accuracy(scores[:, :num_held_out].argmax(1).tolist(), wanted),
        "held_out_paragraphs": num_held_out,
    }


@torch.inference_mode()
def question_answering(network: Bert, tokenizer: Tokenizer, head: Head, data: Path) -> Report:
    """Exact match and F1 of the span head on held-out XQuAD."""
    _, test = corpus.questions(data)
    exact, f1 = 0.0, 0.0
    for row in test:
        encoding = tokenizer.encode(row.question, row.context)
        example = Encoded(encoding.ids, encoding.type_ids.index(1), (0, 0))
        ids, mask, types, _ = ExampleTable([example], "cpu").batch([0])
        logits = head(network(ids, mask, types), mask)[0]  # [L, 2]
        start, end = best_span(logits, example.first_length, len(example.ids) - 1)
        text = row.context[encoding.offsets[start][0] : encoding.offsets[end][1]]
        scores = metrics.answer_scores(text, [answer for _, answer in row.answers])
        exact, f1 = exact + scores[0], f1 + scores[1]
    return {"questions": len(test), "exact_match": exact / len(test), "f1": f1 / len(test)}


def best_span(logits: Tensor, first: int, last: int) -> tuple[int, int]:
    """The (start, end) with the highest sum of scores, first <= start <= end < last, at most 30 tokens long."""
    starts, ends = logits[first:last, 0], logits[first:last, 1]
    allowed = torch.ones(len(starts), len(starts), dtype=torch.bool).triu().tril(MAX_ANSWER_TOKENS - 1)
    scores = (starts[:, None] + ends[None, :]).masked_fill(~allowed, -torch.inf)
    best = int(scores.argmax())
    return first + best // len(starts), first + best % len(starts)


def summaries(network: Bert, tokenizer: Tokenizer, data: Path) -> Report:
    """ROUGE on SciTLDR test: the sentence(s) nearest to the mean of the abstract, against the leading one(s)."""
    rows = sources.scitldr(data, "test")
    parts = [sources.split_sentences(row.document) for row in rows]
    flat = embed(network, tokenizer, [sentence for sentences in parts for sentence in sentences])
    references = [row.summaries for row in rows]
    report: Report = {"count": len(rows)}
    for count in (1, 3):
        chosen, offset = [], 0
        for sentences in parts:
            vectors = flat[offset : offset + len(sentences)]
            offset += len(sentences)
            nearest = (vectors @ vectors.mean(0)).topk(min(count, len(sentences))).indices.tolist()
            chosen.append(" ".join(sentences[index] for index in sorted(nearest)))
        report[f"central_{count}"] = metrics.rouge(chosen, references)
        report[f"lead_{count}"] = metrics.rouge([" ".join(sentences[:count]) for sentences in parts], references)
    return report


def evaluate_encoder(folder: Path, data: Path) -> Report:
    """Every number of the encoder's card, the teacher's beside it where it has one."""
    network, tokenizer = load_encoder(folder), load_tokenizer(folder, MAX_TOKENS)
    heads = {path.name: load_head(path) for path in sorted((folder / "heads").iterdir())}
    teacher, teacher_tokenizer = load_teacher(), load_teacher_tokenizer()
    sentiment = corpus.sentiment(data).test
    return {
        "sentiment": classification(network, tokenizer, heads["sentiment"], sentiment),
        "sentiment_sentence_polarity": classification(network, tokenizer, heads["sentiment"], sentiment[:500]),
        "sentiment_uci": classification(network, tokenizer, heads["sentiment"], sentiment[500:]),
        "intents": classification(network, tokenizer, heads["intents"], corpus.intents(data).test),
        "intents_few_shot": few_shot_intents(network, tokenizer, data, shots=10),
        "intents_few_shot_teacher": few_shot_intents(teacher, teacher_tokenizer, data, shots=10),
        "spam": classification(network, tokenizer, heads["spam"], corpus.spam(data).test),
        "names": judge_names(network, tokenizer, heads["names"], data),
        "agreement_with_teacher": agreement(network, tokenizer, data),
        "retrieval": retrieval(network, tokenizer, data),
        "retrieval_teacher": retrieval(teacher, teacher_tokenizer, data),
        "question_answering": question_answering(
            network, load_tokenizer(folder, heads["answer"].config.max_length), heads["answer"], data
        ),
        "summaries": summaries(network, tokenizer, data),
    }
