"""The `config.json` of an adapter and its base together: the base's, with what training has changed.

PEFT does not write it: the class follows from the adapter's task, the number of labels and of tokens from the shapes of
what was saved whole. Where the adapter's folder has a `config.json`, that holds in place of the base's. No torch; both
processes.
"""

import re
from collections.abc import Mapping
from typing import Any

from model.adapters.config import ADAPTER_CONFIG, AdapterConfig
from model.architectures.mapping import Head
from model.architectures.raw import RawConfig
from model.architectures.table import ARCHITECTURES, usual_classes
from model.errors import UnsupportedArchitectureError

Shapes = Mapping[str, tuple[int, ...]]
"""Of the parameters that the adapter has whole, by name."""

HEADS: Mapping[str, tuple[Head, tuple[str, ...]]] = {
    "CAUSAL_LM": ("language_model", ("ForCausalLM", "LMHeadModel")),
    "SEQ_2_SEQ_LM": ("language_model", ("ForConditionalGeneration", "MTModel")),
    "SEQ_CLS": ("sequence_classification", ("ForSequenceClassification",)),
    "TOKEN_CLS": ("token_classification", ("ForTokenClassification",)),
    "QUESTION_ANS": ("question_answering", ("ForQuestionAnswering",)),
    "FEATURE_EXTRACTION": ("embedding", ("Model",)),
}
"""By PEFT's `task_type`: what is read off the network, and how its class is called behind the family's name."""
CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
LABELLED = ("SEQ_CLS", "TOKEN_CLS")
FAMILY = re.compile(r"(.+?)(?:For[A-Z]\w*|LMHeadModel|MTModel|Model)")
EMBEDDINGS = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight")
OUTPUTS = re.compile(r"(?:.*\.)?(?:classifier|score|(?:classifier|classification_head)\.out_proj)\.weight")
"""The last matrix of a classifier's head, its rows the labels."""
QUANTIZATIONS = ("quantization_config", "compression_config")


def derived_config(
    base: Mapping[str, Any], own: Mapping[str, Any] | None, adapter: AdapterConfig, shapes: Shapes
) -> dict[str, Any]:
    """Raises: UnsupportedArchitectureError where the base's family has no class for the adapter's task."""
    values = dict(base if own is None else own)
    for key in QUANTIZATIONS:  # says how the base's weights are stored, which is for its own folder to know
        values.pop(key, None)
        values |= {key: base[key]} if key in base else {}
    values |= _class(RawConfig(values), adapter.task)
    embeddings = [shape[0] for name, shape in shapes.items() if len(shape) == 2 and EMBEDDINGS.fullmatch(name)]
    if embeddings:
        values["vocab_size"] = embeddings[0]
    outputs = [shape[0] for name, shape in shapes.items() if len(shape) == 2 and OUTPUTS.fullmatch(name)]
    if outputs and adapter.task in LABELLED:
        values |= _labels(RawConfig(values), outputs[0])
    return values


def _class(raw: RawConfig, task: str | None) -> dict[str, Any]:
    named = raw.texts("architectures") if "architectures" in raw else usual_classes(raw.text("model_type", ""))
    name = next((name for name in named if name in ARCHITECTURES), None)
    if task is None or task not in HEADS or name is None:
        return {}
    head, endings = HEADS[task]
    if ARCHITECTURES[name].head == head:
        return {}
    family = FAMILY.fullmatch(name)
    wanted = [f"{family[1]}{ending}" for ending in endings] if family is not None else []
    for candidate in wanted:
        if candidate in ARCHITECTURES and ARCHITECTURES[candidate].head == head:
            return {"architectures": [candidate]}
    raise UnsupportedArchitectureError(
        f"{ADAPTER_CONFIG}: its task is {task}, and its base, a {name}, has no class for that here",
        file=ADAPTER_CONFIG,
    )


def _labels(raw: RawConfig, num_labels: int) -> dict[str, Any]:
    """The base's own names where they are as many (BERT's are the usual two), else numbers."""
    names = raw.section("id2label").values if "id2label" in raw else {}
    if len(names) == num_labels:
        return {}
    numbered = {str(index): f"LABEL_{index}" for index in range(num_labels)}
    return {"num_labels": num_labels, "id2label": numbered, "label2id": None}
