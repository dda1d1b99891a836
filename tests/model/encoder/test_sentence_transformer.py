"""Folders in the layout before and since sentence-transformers 5.4 give the vectors of `SentenceTransformer.encode`."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models
from transformers import BertTokenizerFast, PreTrainedModel, Qwen3Config, Qwen3Model

from model.description import describe
from model.embedding_config import OLD_POOLING_KEYS, read_embedding_config
from model.encoder_runner import EncodeItem, EncoderRunner
from model.errors import CheckpointError

MODES = list(OLD_POOLING_KEYS.values())
SENTENCES = [
    "the cat sat on the mat",
    "good",
    "very bad film and the dog ran to the far hill",
    "the dog was not good",
    "q",
]

MakeModel = Callable[..., tuple[Path, PreTrainedModel]]
MakeRunner = Callable[[Path], EncoderRunner]
MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(make_model: MakeModel, tokenizer: BertTokenizerFast, tmp_path: Path) -> MakeFolder:
    """make_folder(modules after the transformer): what sentence-transformers saves of them."""

    def make(*modules: torch.nn.Module, layout: str = "new", family: str = "bert", **settings: Any) -> Path:
        folder, _ = make_model(family)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        model = SentenceTransformer(modules=[models.Transformer(str(folder)), *modules], device="cpu", **settings)
        model.save(str(tmp_path / "saved"), create_model_card=False)
        if layout == "old":
            rewrite_as_before_5_4(tmp_path / "saved")
        return tmp_path / "saved"

    return make


def rewrite_as_before_5_4(folder: Path) -> None:
    """The same folder as sentence-transformers 2.x to 5.3 wrote it."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        name = module["type"].rpartition(".")[2]
        module["type"] = f"sentence_transformers.models.{name}"
        config_path = folder / module["path"] / "config.json"
        if name == "Pooling":
            new = json.loads(config_path.read_text())
            chosen = [new["pooling_mode"]] if isinstance(new["pooling_mode"], str) else new["pooling_mode"]
            old = {key: mode in chosen for key, mode in OLD_POOLING_KEYS.items()}
            old |= {"word_embedding_dimension": new["embedding_dimension"], "include_prompt": new["include_prompt"]}
            config_path.write_text(json.dumps(old))
        elif name == "Normalize":
            config_path.unlink(missing_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))


def encode(
    make_runner: MakeRunner, tokenizer: BertTokenizerFast, folder: Path, texts: Sequence[str], skipped: int = 0
) -> NDArray[np.float32]:
    items = [EncodeItem(ids=tokenizer(text)["input_ids"], output="embedding", skip_pooling=skipped) for text in texts]
    vectors = make_runner(folder).run(items)
    assert all(isinstance(vector, np.ndarray) for vector in vectors)
    return np.stack([vector for vector in vectors if isinstance(vector, np.ndarray)])


def assert_same(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() >= 0.99999
    assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize(
    "modes", [*((mode,) for mode in MODES), ("cls", "mean"), ("lasttoken", "max", "cls"), tuple(MODES)]
)
def test_every_pooling_gives_the_vectors_of_sentence_transformers(
    modes: tuple[str, ...], layout: str, make_folder: MakeFolder, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    folder = make_folder(models.Pooling(32, pooling_mode=modes), layout=layout)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    assert_same(encode(make_runner, tokenizer, folder, SENTENCES), theirs)
    assert describe(folder).embedding_size == theirs.shape[1]


CHAINS: dict[str, list[Callable[[], torch.nn.Module]]] = {
    "normalize": [models.Normalize],
    "dense": [lambda: models.Dense(32, 12)],
    "dense, identity, no bias": [lambda: models.Dense(32, 12, bias=False, activation_function=torch.nn.Identity())],
    "dense, residual": [lambda: models.Dense(32, 32, activation_function=torch.nn.GELU(), use_residual=True)],
    "dense, projected residual": [lambda: models.Dense(32, 12, use_residual=True)],
    "two dense and normalize": [lambda: models.Dense(32, 40), lambda: models.Dense(40, 8), models.Normalize],
    "layer norm": [lambda: models.LayerNorm(32)],
    "dropout": [lambda: models.Dropout(0.5), models.Normalize],
}


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("chain", CHAINS)
def test_modules_after_pooling_are_applied_in_order(
    chain: str, layout: str, make_folder: MakeFolder, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    folder = make_folder(models.Pooling(32), *(make() for make in CHAINS[chain]), layout=layout)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    assert_same(encode(make_runner, tokenizer, folder, SENTENCES), theirs)
    assert describe(folder).embedding_size == theirs.shape[1]


@pytest.mark.parametrize("modes", [("mean",), ("cls", "max", "weightedmean", "lasttoken")])
def test_prompt_is_left_out_of_pooling_where_the_folder_says_so(
    modes: tuple[str, ...], make_folder: MakeFolder, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    prompt = "represent this : "
    pooling = models.Pooling(32, pooling_mode=modes, include_prompt=False)
    folder = make_folder(pooling, prompts={"query": prompt})
    theirs = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES, prompt_name="query")
    config = read_embedding_config(folder)
    assert not config.include_prompt
    skipped = len(tokenizer(config.prompts["query"])["input_ids"]) - 1
    texts = [prompt + sentence for sentence in SENTENCES]
    assert_same(encode(make_runner, tokenizer, folder, texts, skipped), theirs)


@pytest.mark.parametrize("family", ["nomic-bert", "gte", "jina-embeddings-v3", "eurobert", "electra"])
def test_leading_numbers_of_normed_vectors_behind_a_prompt_in_other_families(
    family: str, make_folder: MakeFolder, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    """As nomic-embed-text-v1.5 makes them: "search_query: ", a LayerNorm, and what is left of the length of 1."""
    prompt = "query : "
    chain = (models.Pooling(32), models.LayerNorm(32), models.Normalize())
    folder = make_folder(*chain, family=family, prompts={"query": prompt}, truncate_dim=12)
    model = SentenceTransformer(str(folder), device="cpu")
    theirs = model.encode(SENTENCES, prompt_name="query", normalize_embeddings=True)
    texts = [prompt + sentence for sentence in SENTENCES]
    assert_same(encode(make_runner, tokenizer, folder, texts), theirs)
    assert describe(folder).embedding_size == 12


def test_prompts_limits_and_similarity_are_read(make_folder: MakeFolder) -> None:
    folder = make_folder(
        models.Pooling(32), prompts={"query": "query: "}, default_prompt_name="query", similarity_fn_name="dot"
    )
    config = describe(folder).embedding
    assert config is not None
    assert config.prompts["query"] == "query: "
    assert (config.default_prompt_name, config.similarity) == ("query", "dot")
    assert describe(folder).context_length == 64  # model_max_length of the tokenizer
    rewrite_as_before_5_4(folder)
    assert describe(folder).context_length == 48  # max_seq_length


def test_folder_without_modules_has_mean_pooling(
    make_model: MakeModel, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    folder, _ = make_model("bert")
    tokenizer.save_pretrained(folder)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    assert_same(encode(make_runner, tokenizer, folder, SENTENCES), theirs)


def test_truncated_size_gives_unit_vectors_of_the_leading_numbers(
    make_folder: MakeFolder, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    folder = make_folder(models.Pooling(32), models.Normalize(), truncate_dim=8)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES, normalize_embeddings=True)
    ours = encode(make_runner, tokenizer, folder, SENTENCES)
    assert ours.shape[1] == describe(folder).embedding_size == 8
    assert_same(ours, theirs)


def test_decoder_embedder_pools_its_last_token(
    save_model: Callable[[PreTrainedModel], Path], make_runner: MakeRunner, tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    base = save_model(Qwen3Model(Qwen3Config(**sizes, **heads)))
    tokenizer.save_pretrained(base)
    modules = [models.Transformer(str(base)), models.Pooling(32, pooling_mode="lasttoken"), models.Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(tmp_path / "saved"), create_model_card=False)
    assert_same(encode(make_runner, tokenizer, tmp_path / "saved", SENTENCES), model.encode(SENTENCES))


@pytest.mark.parametrize("suffix", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_a_classifier_whose_states_are_pooled_is_an_embedder(
    suffix: str, make_model: MakeModel, make_runner: MakeRunner, tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    """sentence-transformers loads the bare network, whatever head config.json names."""
    base, _ = make_model("bert", suffix)
    tokenizer.save_pretrained(base)
    model = SentenceTransformer(modules=[models.Transformer(str(base)), models.Pooling(32)], device="cpu")
    model.save(str(tmp_path / "saved"), create_model_card=False)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, tmp_path / "saved" / name)
    assert_same(encode(make_runner, tokenizer, tmp_path / "saved", SENTENCES), model.encode(SENTENCES))
    assert describe(tmp_path / "saved").head == "embedding"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}),
        ("2_Dense/config.json", {"activation_function": "os.system"}),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Unheard"}),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}),
        ("2_Dense/config.json", {"in_features": 31}),
    ],
)
def test_module_that_cannot_be_honoured_is_refused(
    file: str, change: dict[str, Any], make_folder: MakeFolder, make_runner: MakeRunner
) -> None:
    folder = make_folder(models.Pooling(32), models.Dense(32, 12))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError):
        make_runner(folder)


@pytest.mark.parametrize("place", ["../outside", "/etc", "a/b"])
def test_modules_file_cannot_point_out_of_its_folder(place: str, make_folder: MakeFolder) -> None:
    folder = make_folder(models.Pooling(32), models.Dense(32, 12))
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["path"] = place
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="folder beside it"):
        read_embedding_config(folder)


@pytest.mark.parametrize("kind", ["Router", "WordEmbeddings", "CNN"])
def test_unknown_module_is_refused_by_name(kind: str, make_folder: MakeFolder) -> None:
    folder = make_folder(models.Pooling(32))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "", "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=kind):
        read_embedding_config(folder)
