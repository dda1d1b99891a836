"""Class names without a head: embedders (`Qwen3Model`) and classifiers of decoders, encoder-decoders (`BartModel`).

A decoder's config and network are the causal language model's; `model.encode_network` leaves out its output projection.
Pure data; both processes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.mapping import Architecture

SUFFIXES = ("ForCausalLM", "LMHeadModel")


def headless(decoders: Mapping[str, Architecture[Any]]) -> dict[str, Architecture[Any]]:
    """The rows for the decoders' other class names; names that are in `decoders` already keep their meaning."""
    rows: dict[str, Architecture[Any]] = {}
    for name, row in decoders.items():
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        prefix = name.removesuffix(suffix)
        rows[f"{prefix}Model"] = replace(row, head="embedding")
        rows[f"{prefix}ForSequenceClassification"] = replace(row, head="sequence_classification")
    return {name: row for name, row in rows.items() if name not in decoders}


def bare(encoder_decoders: Mapping[str, Architecture[Any]]) -> dict[str, Architecture[Any]]:
    """The rows of encoder-decoders by their bare names, which mean the same: the head is the embedding (bart-base)."""
    suffix = "ForConditionalGeneration"
    rows = {name: row for name, row in encoder_decoders.items() if name.endswith(suffix)}
    return {f"{name.removesuffix(suffix)}Model": row for name, row in rows.items()}
