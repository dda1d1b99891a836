"""The encoder network gives the states that transformers gives, for every family, with texts of all lengths packed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from transformers import PreTrainedModel

from model.encoder_runner import positions

Run = Callable[..., list[NDArray[np.float32]]]
MakeModel = Callable[..., tuple[Path, PreTrainedModel]]


def states(model: PreTrainedModel, ids: list[int], **inputs: Any) -> NDArray[np.float32]:
    """What transformers makes of a text alone."""
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([ids]), **inputs).last_hidden_state[0].numpy()
    return found


def test_packed_states_are_those_of_transformers_text_by_text(
    family: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model(family)
    for ids, found in zip(texts, run(folder, texts), strict=True):
        assert_allclose(found, states(model, ids), atol=1e-4)


@pytest.mark.parametrize(
    "family", ["bert", "albert", "electra", "ernie", "gte", "megatron-bert", "nomic-bert", "rembert", "roformer"]
)
def test_token_types_reach_the_states(family: str, make_model: MakeModel, run: Run, texts: list[list[int]]) -> None:
    folder, model = make_model(family)
    types = [[int(place * 2 >= len(ids)) for place in range(len(ids))] for ids in texts]
    for ids, kinds, found in zip(texts, types, run(folder, texts, type_ids=types), strict=True):
        assert_allclose(found, states(model, ids, token_type_ids=torch.tensor([kinds])), atol=1e-4)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie without tasks": ("ernie", {"use_task_id": False}),
    "electra with wide embeddings": ("electra", {"embedding_size": 32}),
    "eurobert with biases": ("eurobert", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    "roformer with wide embeddings": ("roformer", {"embedding_size": None}),
    "deberta, content to position alone": ("deberta", {"pos_att_type": ["c2p"]}),
    "deberta, position to content alone": ("deberta", {"pos_att_type": "p2c"}),
    "deberta, distances clamped": ("deberta", {"max_relative_positions": 7}),
    "deberta, positions in the input too": ("deberta", {"position_biased_input": True, "type_vocab_size": 2}),
    "deberta without relative attention": ("deberta", {"relative_attention": False, "pos_att_type": []}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_a_family_agrees(variant: str, make_model: MakeModel, run: Run, texts: list[list[int]]) -> None:
    family, changes = VARIANTS[variant]
    folder, model = make_model(family, **changes)
    for ids, found in zip(texts, run(folder, texts), strict=True):
        assert_allclose(found, states(model, ids), atol=1e-4)


DEBERTA_VARIANTS: dict[str, dict[str, Any]] = {
    "own projections": {"share_att_key": False},
    "content to position alone": {"pos_att_type": ["c2p"], "share_att_key": False},
    "position to content alone": {"pos_att_type": ["p2c"]},
    "every distance its own": {"position_buckets": -1},
    "distances clamped": {"position_buckets": -1, "max_relative_positions": 7},
    "table not normalised": {"norm_rel_ebd": "none"},
    "positions in the input too": {"position_biased_input": True, "type_vocab_size": 2},
    "narrow embeddings": {"embedding_size": 16},
    "no relative attention": {"relative_attention": False, "pos_att_type": []},
    "convolution": {"conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 2},
}


@pytest.mark.parametrize("variant", DEBERTA_VARIANTS)
def test_every_kind_of_deberta_agrees(variant: str, make_model: MakeModel, run: Run, texts: list[list[int]]) -> None:
    folder, model = make_model("deberta-v2", **DEBERTA_VARIANTS[variant])
    for ids, found in zip(texts, run(folder, texts), strict=True):
        assert_allclose(found, states(model, ids), atol=1e-4)


MODERNBERT_VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "layer types": {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    "thetas": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        }
    },
}


@pytest.mark.parametrize("variant", MODERNBERT_VARIANTS)
def test_every_kind_of_modernbert_agrees(variant: str, make_model: MakeModel, run: Run, texts: list[list[int]]) -> None:
    folder, model = make_model("modernbert", **MODERNBERT_VARIANTS[variant])
    for ids, found in zip(texts, run(folder, texts), strict=True):
        assert_allclose(found, states(model, ids), atol=1e-4)


def test_mpnet_bias_covers_distances_past_its_last_bucket(make_model: MakeModel, run: Run) -> None:
    folder, model = make_model("mpnet")
    ids = torch.randint(6, 90, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_allclose(run(folder, [ids])[0], states(model, ids), atol=1e-4)


@pytest.mark.parametrize("family", ["roberta", "mpnet", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl"])
def test_padding_id_inside_a_text_takes_up_no_position(family: str, make_model: MakeModel, run: Run) -> None:
    folder, model = make_model(family)
    texts = [[7, 8, 9], [10, 1, 11, 1, 12, 13]]
    mask = torch.ones(1, 6, dtype=torch.long)
    assert_allclose(run(folder, texts)[1], states(model, texts[1], attention_mask=mask), atol=1e-4)


def test_positions_start_anew_in_each_text_and_skip_padding_ids() -> None:
    ids, starts = np.array([5, 1, 6, 1, 7]), np.array([0, 3, 5])
    assert positions(ids, starts, None).tolist() == [0, 1, 2, 0, 1]
    assert positions(ids, starts, 1).tolist() == [0, -1, 1, -1, 0]
