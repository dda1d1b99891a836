"""A lane with a draft, as it is loaded, on the compiled operators: the same to a bit; right as often as it may be."""

import time
from pathlib import Path
from typing import Any

import pytest

from model.batch import SamplingParams
from model.ops import library
from service.engine.assembly import load_directory
from service.engine.generation_lane import GenerationLane
from service.engine.loading import load_lane
from service.engine.protocol import Generate, WorkerConfig
from service.engine.step_costs import StepCosts
from service.settings import Settings
from tests.service.engine.drafted import write_deep, write_shallow

PROMPTS = [list(range(100 + number, 100 + number + length)) for number, length in enumerate((3, 17, 40, 64, 7, 33))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafts")
    return {
        "deep": write_deep(root / "deep", 9),
        "good": write_shallow(root / "good"),
        "bad": write_shallow(root / "bad", 1),
    }


class Lane:
    def __init__(self, folders: dict[str, Path], draft: str | None, numbers: dict[str, Any]) -> None:
        drafts = () if draft is None else (f"{folders[draft]}=lm",)
        settings = Settings(model=(f"{folders['deep']}=lm",), draft=drafts, kv_cache_memory="16MiB", **numbers)
        spec = load_directory(settings)["lm"].spec
        config = WorkerConfig(models=[], num_threads=1, max_batch_tokens=48, deterministic=True)
        lane = load_lane(spec, config, lambda done, total: None, lambda: None)
        assert isinstance(lane, GenerationLane)
        self.lane = lane
        self.num_drafted = self.num_confirmed = 0

    def answers(self) -> dict[int, tuple[list[int], list[float]]]:
        """Ids and log-probabilities of all prompts, which come one by one."""
        found: dict[int, tuple[list[int], list[float]]] = {}
        waiting = list(enumerate(PROMPTS))
        while waiting or self.lane.has_work:
            if waiting:
                number, prompt = waiting.pop(0)
                sampling = SamplingParams(max_tokens=40, temperature=number % 2, seed=number, logprobs=0)
                self.lane.submit(Generate(request_id=number, model="lm@1", prompt_ids=prompt, sampling=sampling), 0.0)
                found[number] = ([], [])
            step = self.lane.step(time.monotonic())
            self.num_drafted += step.stats.num_drafted
            self.num_confirmed += step.stats.num_confirmed
            for output in step.tokens:
                found[output.request_id][0].extend(output.token_ids)
                found[output.request_id][1].extend(entry.logprob for entry in output.logprobs)
        return found


@pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")
@pytest.mark.parametrize(
    "numbers", [{}, {"quantization": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}], ids=str
)
@pytest.mark.parametrize(("draft", "least", "most"), [("good", 0.9, 1.0), ("bad", 0.001, 0.5)])
def test_deterministic_answers_are_the_same_to_a_bit_with_a_draft(
    folders: dict[str, Path],
    draft: str,
    least: float,
    most: float,
    numbers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StepCosts, "least_odds", lambda *_: 0.0)
    monkeypatch.setattr(StepCosts, "share_of", lambda *_: 0.0)
    drafted = Lane(folders, draft, numbers)
    assert drafted.answers() == Lane(folders, None, numbers).answers()
    assert least <= drafted.num_confirmed / drafted.num_drafted <= most
