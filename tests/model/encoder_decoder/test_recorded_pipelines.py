"""Summaries and translations of the recorded pipelines of `transformers` 4.57.6, id by id and as text."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import make

from model.description import describe
from model.generation_defaults import Choices
from model.languages import Direction, read_languages
from model.tokenizer import Tokenizer

RECORDED = Path(__file__).parents[2] / "reference" / "pipelines.json"
CASES = [
    case
    for case in json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]
    if case["task"].startswith(("summarization", "translation"))
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda name: root / name if (root / name).is_dir() else make(name, root / name)


def choices(parameters: dict[str, Any]) -> Choices:
    """The pipelines' names in ours; their lengths count the start token, except `max_new_tokens`."""
    values = {key: value for key, value in parameters.items() if key not in ("src_lang", "tgt_lang")}
    if "min_length" in values:
        values["min_tokens"] = values.pop("min_length") - 1
    if "max_length" in values:
        values["max_tokens"] = values.pop("max_length") - 1
    if "max_new_tokens" in values:
        values["max_tokens"] = values.pop("max_new_tokens")
    return Choices(**values)


@pytest.mark.parametrize("case", CASES, ids=[f"{case['checkpoint']}-{index}" for index, case in enumerate(CASES)])
def test_generated_ids_and_text_are_the_recorded_ones(
    case: dict[str, Any], checkpoint: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    folder = checkpoint(case["checkpoint"])
    found, tokenizer = describe(folder), Tokenizer.load(folder)
    defaults = found.sequence_to_sequence
    assert defaults is not None
    parameters, direction = case["parameters"], Direction()
    if "src_lang" in parameters:
        languages = read_languages(folder, found.raw, tokenizer.backend.get_vocab(), found.eos_ids[0])
        assert languages is not None
        direction = languages.direction(parameters["src_lang"], parameters["tgt_lang"])
    text = defaults.prefix_for(case["task"]) + direction.text_prefix + case["inputs"][0]
    source = tokenizer.encode(text, add_special_tokens=direction.before is None)
    source = [*(direction.before or ()), *source, *(direction.after or ())]
    asked = replace(choices(parameters), forced_bos_id=direction.forced_bos_id)
    (ids,) = make_engine(folder, num_blocks=600).generate([source], asked, case["task"])
    assert [defaults.decoder_start_id, *ids] == case["ids"][0]
    (recorded,) = case["output"][0].values()
    assert tokenizer.decode(ids) == recorded
