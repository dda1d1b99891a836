"""Real weights: greedy tokens and log-probabilities of stories260K against those that transformers gave."""

import json
from pathlib import Path

import pytest

from model.batch import SamplingParams

DATA = Path(__file__).parents[4] / "shared" / "data"
REFERENCE = DATA / "reference-outputs" / "greedy_transformers_cpu_fp32.json"

pytestmark = pytest.mark.skipif(not REFERENCE.exists(), reason=f"needs {REFERENCE.name} in ../shared/data")


def cases() -> list[dict]:
    return json.loads(REFERENCE.read_text())["models"]["stories260K-hf"]["cases"]


@pytest.fixture
def runner(run_folder):
    return run_folder(DATA / "stories260K-hf")


@pytest.mark.parametrize("chunk", [1000, 7])
def test_greedy_tokens_and_logprobs_are_those_of_transformers(runner, run_all, work, chunk):
    expected = cases()
    works = [work(case["prompt_ids"], SamplingParams(max_tokens=len(case["new_ids"]), logprobs=1)) for case in expected]
    for case, done in zip(expected, run_all(works, runner=runner, chunk=chunk), strict=True):
        assert done.output_ids == case["new_ids"]
        found = [entry.logprob for entry in done.logprobs]
        assert found[:5] == pytest.approx(case["first5_logprobs"], abs=1e-3)
        assert sum(found) == pytest.approx(case["sum_logprob"], abs=1e-3 * len(found))
        assert all(entry.top_ids == (entry.token_id,) for entry in done.logprobs)
