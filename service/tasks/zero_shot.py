"""Labels that a checkpoint never saw: by entailment (an NLI checkpoint), or by similarity (an embedding checkpoint).

Entailment follows transformers' zero-shot pipeline: each label becomes a hypothesis about the text; where one label
excludes the others the entailment logits are compared across labels, else each label's entailment with its
contradiction. Similarity compares the text's vector with each hypothesis's. All pairs of a request go to the engine in
one call. Knows neither HTTP nor torch. Runs in the API process.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.engine.models import LoadedModel
from service.errors import InvalidRequest
from service.tasks.confidence import Activation, Numbers, Scored
from service.tasks.embeddings import prompt_of
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions, run_texts, tokenize

PLACE = "{}"
DEFAULT_TEMPLATE = "This example is {}."
CONTENT_FREE = "N/A"
"""A text, or a label, that says nothing: what comes of it is the checkpoint's bias (arXiv:2102.09690)."""
COSINE_SCALE = 20.0
"""What sentence-transformers multiplies cosines by before the softmax of its ranking losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSet:
    """The caller's labels and how they are to be read."""

    labels: tuple[str, ...]
    template: str = DEFAULT_TEMPLATE
    multi_label: bool = False

    @property
    def digest(self) -> str:
        """The same for the same labels in another order; what was fitted on one set says nothing of another."""
        text = json.dumps([sorted(self.labels), self.template, self.multi_label])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def hypotheses(self) -> list[str]:
        return [self.template.replace(PLACE, label) for label in self.labels]

    @property
    def independent(self) -> bool:
        """Whether each label is a question of its own; a single one always is."""
        return self.multi_label or len(self.labels) == 1

    @property
    def activation(self) -> Activation:
        return "sigmoid" if self.independent else "softmax"


def entailment_id(labels: Sequence[str]) -> int | None:
    """Which output of an NLI checkpoint says that the hypothesis follows; None for any other classifier."""
    return next((id for id, label in enumerate(labels) if label.lower().startswith("entail")), None)


async def by_entailment(
    engine: EncodeEngine, model: LoadedModel, texts: Sequence[str], labels: LabelSet, options: EncodeOptions
) -> list[Scored]:
    """Logits whose softmax (sigmoid, where labels are independent) is the pipeline's score.

    Only the text is cut where that is asked for, never the hypothesis.
    """
    pairs = [(text, hypothesis) for text in texts for hypothesis in labels.hypotheses]
    encoded = await tokenize(model, pairs, room=options.room(side="first"))
    await run_texts(engine, model, encoded, "logits", options)
    entails = entailment_id(model.description.labels)
    assert entails is not None
    contradicts = -1 if entails == 0 else 0
    width = len(labels.labels)
    found = []
    for start in range(0, len(encoded), width):
        scored, rows = scored_together(encoded[start : start + width])
        if rows is not None:
            logits = rows[:, entails]
            scored.logits = logits - rows[:, contradicts] if labels.independent else logits
        found.append(scored)
    return found


def scored_together(parts: Sequence[EncodedText]) -> tuple[Scored, Numbers | None]:
    """One text's passes taken together, and their values as rows; its first fault is the text's."""
    scored = Scored(
        num_tokens=sum(part.num_tokens for part in parts),
        num_truncated=max(part.num_truncated for part in parts),
        kept_tokens=min(part.num_tokens for part in parts),
        error=next((part.error for part in parts if part.error is not None), None),
    )
    if scored.error is not None:
        return scored, None
    values = [part.values for part in parts if part.values is not None]
    return scored, np.stack(values).astype(np.float64)


async def by_similarity(
    engine: EncodeEngine, model: LoadedModel, texts: Sequence[str], labels: LabelSet, options: EncodeOptions
) -> list[Scored]:
    """Logits are the cosines of text and hypothesis times 20; softmax over the labels.

    Independent labels have no others to be compared with: each one's cosine is taken less that of a hypothesis that
    says nothing (`N/A` for the label), so that a score above one half means nearer than nothing in particular.

    Raises: InvalidRequest that names the label whose hypothesis cannot be read.
    """
    neutral = [labels.template.replace(PLACE, CONTENT_FREE)] if labels.independent else []
    prompt = prompt_of(model, prompt_name=None, input_type=None)
    hypotheses = await tokenize(model, [*labels.hypotheses, *neutral], prompt=prompt)
    encoded = await tokenize(model, texts, room=options.room(), prompt=prompt)
    _raise_of_labels(hypotheses)
    await run_texts(engine, model, [*hypotheses, *encoded], "embedding", options)
    _raise_of_labels(hypotheses)
    anchors = _units(np.stack([entry.values for entry in hypotheses if entry.values is not None]))
    found = []
    for text in encoded:
        scored, rows = scored_together([text])
        if rows is not None:
            cosines = anchors @ _units(rows)[0]
            scored.logits = COSINE_SCALE * (cosines[:-1] - cosines[-1] if labels.independent else cosines)
        found.append(scored)
    if found:
        found[0].num_tokens += sum(entry.num_tokens for entry in hypotheses)
    return found


def _raise_of_labels(hypotheses: Sequence[EncodedText]) -> None:
    for index, entry in enumerate(hypotheses):
        if entry.error is not None:
            raise InvalidRequest(f"the hypothesis of a label: {entry.error.message}", param=f"labels.{index}")


def _units(rows: np.ndarray) -> Numbers:
    wide = rows.astype(np.float64)
    units: Numbers = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return units
