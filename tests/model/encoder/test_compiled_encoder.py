"""The compiled encoder gives transformers' states on every set of instructions; a text does not see its company."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from torch.testing import assert_close
from transformers import PreTrainedModel

from model.attention.cpu import CpuAttention
from model.compiled_encoder import CompiledEncoder, compiled_encoder
from model.compiled_layers import Quantization
from model.encode_network import EncodeNetwork, load_encode_network
from model.encoder import Encoder
from model.encoder_runner import EncodeItem, EncoderRunner
from model.ops import library
from tests.model.encoder.conftest import FAMILIES

MakeModel = Callable[..., tuple[Path, PreTrainedModel]]
States = list[NDArray[np.float32]]

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
NAMED_OTHERWISE = {"distilbert": {"dim": 64, "hidden_dim": 96, "n_heads": 2}}
ROTARY = ("gte", "jina-embeddings-v3", "nomic-bert")
NORMS_FIRST = ("modernbert", "roberta-prelayernorm")
COMPILED = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "data2vec-text",
    "distilbert",
    "ernie",
    *ROTARY,
    *NORMS_FIRST,
)
ERRORS = {"float32": 1e-5, "halves": 4e-5, "bfloat16": 3e-2}
"""By what is multiplied: float32, its halves, or bfloat16."""
WIDE_ERRORS = {"float32": 1e-5, "halves": 2e-4, "bfloat16": 0.1}
"""Of networks whose random weights magnify errors."""

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")


@pytest.fixture(params=ERRORS)
def numbers(request: pytest.FixtureRequest, instructions: str) -> str:
    if request.param == "halves" and instructions == "lanes":
        pytest.skip("halves are multiplied on AVX-512 and AMX alone")
    return str(request.param)


def compiled_runner(folder: Path, numbers: str, quantization: Quantization = "none") -> EncoderRunner:
    halves = numbers == "halves"
    dtype = torch.bfloat16 if numbers == "bfloat16" else torch.float32
    network = load_encode_network(folder, dtype=dtype, packed=False)
    assert isinstance(network.network, Encoder)
    return EncoderRunner(EncodeNetwork(CompiledEncoder(network.network, quantization, halves=halves)), CpuAttention())


def encode(runner: EncoderRunner, texts: list[list[int]]) -> States:
    results = runner.run([EncodeItem(ids=ids, output="token_embeddings") for ids in texts])
    return [result for result in results if isinstance(result, np.ndarray)]


def relative_error(found: States, model: PreTrainedModel, texts: list[list[int]]) -> float:
    with torch.no_grad():
        expected = [model.double()(torch.tensor([ids])).last_hidden_state[0] for ids in texts]
    states = torch.cat([torch.from_numpy(states) for states in found]).double()
    return float((states - torch.cat(expected)).norm() / torch.cat(expected).norm())


@pytest.mark.parametrize("family", COMPILED)
def test_compiled_states_are_those_of_transformers(
    family: str, numbers: str, make_model: MakeModel, texts: list[list[int]]
) -> None:
    folder, model = make_model(family, **NAMED_OTHERWISE.get(family, SIZES))
    assert relative_error(encode(compiled_runner(folder, numbers), texts), model, texts) < ERRORS[numbers]


@pytest.mark.parametrize("family", ["bert", *ROTARY, *NORMS_FIRST])
def test_states_in_8_bits_are_near(
    family: str, make_model: MakeModel, texts: list[list[int]], instructions: str
) -> None:
    folder, model = make_model(family, **SIZES)
    found = encode(compiled_runner(folder, "bfloat16", "int8"), texts)
    assert relative_error(found, model, texts) < 0.1


@pytest.mark.parametrize("family", ["bert", "gte"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_every_activation_agrees(
    activation: str, family: str, make_model: MakeModel, texts: list[list[int]], instructions: str
) -> None:
    folder, model = make_model(family, **SIZES, hidden_act=activation)
    assert relative_error(encode(compiled_runner(folder, "float32"), texts), model, texts) < 1e-5


@pytest.mark.parametrize(
    ("family", "hidden_size"), [("bert", 288), ("nomic-bert", 96), ("gte", 96), ("modernbert", 96)]
)
def test_sizes_that_fill_no_panel_agree(
    family: str, hidden_size: int, numbers: str, make_model: MakeModel, texts: list[list[int]]
) -> None:
    sizes = {"hidden_size": hidden_size, "num_attention_heads": 3, "intermediate_size": 160}
    folder, model = make_model(family, **sizes)
    assert relative_error(encode(compiled_runner(folder, numbers), texts), model, texts) < WIDE_ERRORS[numbers]


@pytest.mark.parametrize("head_size", [64, 128])
def test_heads_and_lengths_about_what_tiles_hold_agree(head_size: int, numbers: str, make_model: MakeModel) -> None:
    sizes = {"hidden_size": 2 * head_size, "num_attention_heads": 2, "intermediate_size": 96}
    folder, model = make_model("bert", **sizes, max_position_embeddings=256)
    texts = [[5 + i * (7 + length) % 80 for i in range(length)] for length in (1, 15, 16, 17, 31, 32, 33, 200)]
    found = encode(compiled_runner(folder, numbers), texts)
    for states, ids in zip(found, texts, strict=True):
        assert relative_error([states], model, [ids]) < WIDE_ERRORS[numbers]


@pytest.mark.parametrize("inner", [384, 2208])
def test_wide_layers_agree_in_any_company(inner: int, numbers: str, make_model: MakeModel) -> None:
    """Rows of such a width don't fit the first cache, and in halves the inner ones are multiplied in parts."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": inner}
    folder, model = make_model("bert", **sizes, max_position_embeddings=256)
    runner = compiled_runner(folder, numbers)
    texts = [[5 + i * 7 % 80 for i in range(length)] for length in (150, 33, 1, 8, 9, 24, 25)]
    found = encode(runner, texts)
    assert relative_error(found, model, texts) < 3 * WIDE_ERRORS[numbers]  # the wider, the more
    for states, ids in zip(found, texts, strict=True):
        assert_array_equal(states, encode(runner, [ids])[0])


@pytest.mark.parametrize("reach", [2, 20, 62, 64, 130])
@pytest.mark.parametrize("biases", [False, True])
def test_windows_of_any_size_agree(reach: int, biases: bool, numbers: str, make_model: MakeModel) -> None:
    changes = {"norm_bias": biases, "attention_bias": biases, "mlp_bias": biases, "local_attention": reach}
    folder, model = make_model("modernbert", **SIZES, **changes, max_position_embeddings=256)
    texts = [[5 + i * (7 + length) % 80 for i in range(length)] for length in (1, 15, 17, 31, 33, 49, 64, 200)]
    found = encode(compiled_runner(folder, numbers), texts)
    for states, ids in zip(found, texts, strict=True):
        assert relative_error([states], model, [ids]) < 2 * ERRORS[numbers]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, for the length of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["bert", "nomic-bert", "modernbert"])
def test_a_text_depends_on_neither_its_company_nor_the_threads(
    family: str, numbers: str, make_model: MakeModel, set_threads: Callable[[int], None]
) -> None:
    """Alone it is a team's work, among many it lies in a thread's own chunk."""
    folder, _ = make_model(family, **SIZES)
    runner = compiled_runner(folder, numbers)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 70, (40,), generator=generator).tolist()
    texts = [torch.randint(6, 90, (length,), generator=generator).tolist() for length in lengths]
    set_threads(1)
    alone = [encode(runner, [ids])[0] for ids in texts]
    for threads in (1, 2, 5):
        set_threads(threads)
        for first, last in ((0, 40), (3, 7), (0, 2), (11, 12)):
            for states, expected in zip(encode(runner, texts[first:last]), alone[first:last], strict=True):
                assert_array_equal(states, expected)


def test_states_that_are_not_finite_stay_in_their_text(numbers: str, make_model: MakeModel) -> None:
    folder, _ = make_model("bert", **SIZES)
    runner = compiled_runner(folder, numbers)
    texts = [[7, 8, 9], [10, 11, 12, 13], [14, 15]]
    sound = encode(runner, texts)
    network = runner.network.network
    assert isinstance(network, CompiledEncoder)
    network.embedding.tokens.weight[11] = float("nan")
    first, second, third = runner.run([EncodeItem(ids=ids, output="token_embeddings") for ids in texts])
    assert isinstance(second, str)
    assert_array_equal(first, sound[0])
    assert_array_equal(third, sound[2])


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*COMPILED}))
def test_encoders_with_other_parts_are_not_compiled(family: str, make_model: MakeModel) -> None:
    folder, _ = make_model(family, **SIZES)
    network = load_encode_network(folder, packed=False).network
    assert isinstance(network, Encoder)
    assert compiled_encoder(network) is None


@pytest.mark.parametrize("changes", [{"num_attention_heads": 4}, {"intermediate_size": 100}])
def test_sizes_that_the_operators_do_not_take_are_not_compiled(changes: dict[str, Any], make_model: MakeModel) -> None:
    folder, _ = make_model("bert", **{**SIZES, **changes})
    network = load_encode_network(folder, packed=False).network
    assert isinstance(network, Encoder)
    assert compiled_encoder(network) is None


@pytest.mark.skipif(not library.LOADED, reason="the operators are not compiled here")
def test_a_compiled_encoder_is_what_a_checkpoint_is_loaded_as(make_model: MakeModel) -> None:
    folder, _ = make_model("bert", "ForSequenceClassification", **SIZES)
    for dtype in (torch.float32, torch.bfloat16):
        assert isinstance(load_encode_network(folder, dtype=dtype).network, CompiledEncoder)
    assert isinstance(load_encode_network(folder, dtype=torch.float16).network, Encoder)


def test_float32_is_halved_only_where_that_is_faster_and_may_be(
    make_model: MakeModel, texts: list[list[int]], instructions: str
) -> None:
    folder, _ = make_model("bert", **SIZES)
    exact, free = (
        encode(EncoderRunner(load_encode_network(folder, exact=exact), CpuAttention()), texts)
        for exact in (True, False)
    )
    same = all(np.array_equal(one, other) for one, other in zip(exact, free, strict=True))
    assert same == (instructions != "amx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_texts_are_torchs(dtype: torch.dtype) -> None:
    hidden = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    begins, ends = torch.tensor([0, 3, 9, 7]), torch.tensor([3, 9, 9, 20])
    expected = torch.stack([hidden[b:e].double().sum(0) for b, e in zip(begins, ends, strict=True)])
    assert_close(torch.ops.slimpajama.sum_texts(hidden, begins, ends).double(), expected, atol=1e-5, rtol=1e-5)


def test_sums_of_rows_that_there_are_not_are_refused() -> None:
    with pytest.raises(IndexError, match="beyond the 4"):
        torch.ops.slimpajama.sum_texts(torch.zeros(4, 32), torch.tensor([0]), torch.tensor([5]))
