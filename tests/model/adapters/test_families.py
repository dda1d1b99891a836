"""The modules of every family are found by the names that an adapter has for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.model.adapters.conftest import Store, parameters
from tests.model.adapters.test_merging import merge_by_hand
from tests.model.decoder.conftest import CASES as DECODERS
from tests.model.encoder.conftest import FAMILIES as ENCODERS
from tests.model.encoder_decoder.conftest import FAMILIES as SEQUENCE_TO_SEQUENCE

Make = Callable[[], PreTrainedModel]


def decoder(case: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**DECODERS[case]))


def encoder(family: str, suffix: str) -> PreTrainedModel:
    prefix, sizes = ENCODERS[family]
    return getattr(transformers, f"{prefix}{suffix}")(getattr(transformers, f"{prefix}Config")(**sizes))


FAMILIES: dict[str, Make] = {
    **{case: lambda case=case: decoder(case) for case in DECODERS if "," not in case},
    **{f"{family}, bare": lambda family=family: encoder(family, "Model") for family in ENCODERS},
    **{
        f"{family}, classifier": lambda family=family: encoder(family, "ForSequenceClassification")
        for family in ENCODERS
    },
    **SEQUENCE_TO_SEQUENCE,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_of_a_family_can_be_adapted(store: Store, tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.save_pretrained(tmp_path / "base")
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, linear)}
    tensors = merge_by_hand(model, tuple(names - {"lm_head", "embed_out"}), False, 1.5)
    model.save_pretrained(tmp_path / "merged")
    folder = store(tensors, fan_in_fan_out=family == "gpt2")
    before, expected, found = (parameters(path) for path in (tmp_path / "base", tmp_path / "merged", folder))
    assert found.keys() == expected.keys()
    assert sum(not torch.equal(before[name], expected[name]) for name in expected) > 3
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-6)
