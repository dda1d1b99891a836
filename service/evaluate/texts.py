"""ROUGE, BLEU and chrF, by the packages whose numbers papers report.

Imported only where a task needs them: they come with the `evaluate` extra. Runs in the evaluation's process.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from service.evaluate.metrics import Measure, Numbers, Places

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Numbers]:
    """F-measures of each summary, against the reference that suits it best."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = [
        [max(float(scorer.score(text, summary)[name].fmeasure) for text in accepted) for name in ROUGE]
        for summary, accepted in zip(summaries, references, strict=True)
    ]
    table = np.array(rows, dtype=np.float64)
    return {name: table[:, place] for place, name in enumerate(ROUGE)}


def bleu_and_chrf(
    translations: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: str = "13a"
) -> dict[str, Measure]:
    """Of a corpus, 0 to 100. Each segment is counted once; a draw of segments adds up their counts."""
    most = max(len(accepted) for accepted in references)
    columns: Any = [
        [accepted[place] if place < len(accepted) else None for accepted in references] for place in range(most)
    ]
    measures = {}
    for name, metric in (("bleu", BLEU(tokenize=tokenizer)), ("chrf", CHRF())):
        # What sacrebleu's own bootstrap is made of; there is no public way to a segment's counts.
        counts = np.array(metric._extract_corpus_statistics(list(translations), columns), dtype=np.float64)
        measures[name] = _from_counts(metric, counts)
    return measures


def _from_counts(metric: BLEU | CHRF, counts: Numbers) -> Measure:
    def measure(places: Places) -> float:
        return float(metric._compute_score_from_stats(counts[places].sum(axis=0).tolist()).score)

    return measure
