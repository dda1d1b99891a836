"""The GPU's benchmark runs anywhere at toy sizes, and its workload is the published one."""

import pytest

from service.bench import gpu
from service.bench.gpu import REAL, TOY, crowd_requests


def test_the_crowd_is_the_published_workload() -> None:
    requests = crowd_requests(REAL, 151936)
    assert len(requests) == 256
    assert sum(request.sampling.max_tokens for request in requests) == 133_966
    assert all(100 <= len(request.prompt_ids) <= 1024 for request in requests)


@pytest.mark.parametrize("arguments", [[], ["--block-size", "256"]], ids=["small-blocks", "large-blocks"])
def test_the_benchmark_makes_its_table_at_toy_sizes(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert gpu.main(["--toy", "--device", "cpu", "--dtype", "float32", *arguments]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("`make bench-gpu`: CPU")
    assert len(lines) == 4 + 2 * len(TOY.decoders) + 2
    assert all(line.count("|") == 6 for line in lines[2:])
    assert "nan" not in "".join(lines)
