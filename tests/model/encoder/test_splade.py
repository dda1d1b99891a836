"""Sparse encoders give the vectors of sentence-transformers' SparseEncoder, entry by entry."""

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedModel

from model import splade
from model.description import describe
from model.encode_network import load_encode_network
from model.encoder_runner import EncodeItem, EncoderRunner
from model.errors import CheckpointError, UnsupportedArchitectureError
from model.packed_linear import PackedLinear

SENTENCES = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill", "q", "not a dog"]
READ = [
    "bert",
    "camembert",
    "data2vec-text",
    "distilbert",
    "ernie",
    "eurobert",
    "gte",
    "jina-embeddings-v3",
    "megatron-bert",
    "modernbert",
    "mpnet",
    "nomic-bert",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
]
TIED: dict[str, dict[str, object]] = {"eurobert, tied": {"tie_word_embeddings": True, "mlp_bias": True}}
TOLERANCE = 1e-4

MakeModel = Callable[..., tuple[Path, PreTrainedModel]]
MakeRunner = Callable[[Path], EncoderRunner]
MakeFolder = Callable[..., Path]
Run = Callable[..., list[NDArray[np.float32]]]


@pytest.fixture
def make_folder(make_model: MakeModel, tokenizer: BertTokenizerFast, tmp_path: Path) -> MakeFolder:
    """make_folder(pooling settings): what SparseEncoder saves of a random masked language model."""

    def make(layout: str = "new", settings: dict[str, Any] | None = None, **pooling: Any) -> Path:
        base, _ = make_model("bert", "ForMaskedLM")
        tokenizer.save_pretrained(base)
        modules = [Transformer(str(base), transformer_task="fill-mask"), SpladePooling(**pooling)]
        saved = tmp_path / "saved"
        SparseEncoder(modules=modules, device="cpu", **(settings or {})).save(str(saved), create_model_card=False)
        if layout == "old":
            rewrite_as_before_5_4(saved)
        return saved

    return make


def rewrite_as_before_5_4(folder: Path) -> None:
    """The same folder as sentence-transformers 5.0 to 5.3 wrote it."""
    modules = json.loads((folder / "modules.json").read_text())
    for module, name in zip(modules, ["MLMTransformer", "SpladePooling"], strict=True):
        module["type"] = f"sentence_transformers.sparse_encoder.models.{name}"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    path = folder / modules[1]["path"] / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({"word_embedding_dimension": values.pop("embedding_dimension", None), **values}))


def encode(runner: EncoderRunner, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Vectors as long as the vocabulary; what an entry is must be told once, and in order."""
    results = runner.run([EncodeItem(ids=ids, output="sparse_embedding") for ids in texts])
    dense = np.zeros((len(texts), runner.network.config.vocab_size), np.float32)
    for row, found in zip(dense, results, strict=True):
        assert not isinstance(found, str)
        ids, weights = found[0].astype(int), found[1]
        assert (np.diff(ids) > 0).all()
        assert (weights > 0).all()
        row[ids] = weights
    return dense


def reference(folder: Path, texts: list[str] = SENTENCES) -> NDArray[np.float32]:
    vectors = SparseEncoder(str(folder), device="cpu").encode(texts)
    assert isinstance(vectors, Tensor)
    dense: NDArray[np.float32] = vectors.to_dense().numpy()
    return dense


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_every_pooling_gives_the_vectors_of_sparse_encoder(
    strategy: str, activation: str, layout: str,
    make_folder: MakeFolder, make_runner: MakeRunner, tokenizer: BertTokenizerFast,
) -> None:  # fmt: skip
    folder = make_folder(layout, pooling_strategy=strategy, activation_function=activation)
    found = describe(folder)
    assert (found.head, found.tasks, found.architecture) == ("sparse_embedding", ("embed_sparse",), "BertForMaskedLM")
    assert found.context_length == (48 if layout == "old" else 64)
    theirs = reference(folder)
    assert 0.2 < (theirs > 0).mean() < 0.98
    assert_allclose(encode(make_runner(folder), tokenizer(SENTENCES)["input_ids"]), theirs, atol=TOLERANCE)


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("read", [*READ, *TIED])
def test_the_heads_of_all_families_give_the_logits_of_transformers(
    read: str, strategy: str, make_model: MakeModel, make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    """The texts padded to the longest, as SparseEncoder has them, and here end to end."""
    folder, model = make_model(read.removesuffix(", tied"), "ForMaskedLM", **TIED.get(read, {}))
    runner = make_runner(folder)
    assert runner.network.splade is not None
    object.__setattr__(runner.network.splade.config, "strategy", strategy)
    pad, longest = model.config.pad_token_id, max(map(len, texts))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in texts])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in texts])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    features = {"token_embeddings": logits, "attention_mask": mask}
    theirs = SpladePooling(pooling_strategy=strategy).eval()(features)["sentence_embedding"].numpy()  # type: ignore[arg-type]
    assert_allclose(encode(runner, texts), theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_bare_masked_language_model_is_what_both_references_make_of_it(
    make_model: MakeModel, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    """SentenceTransformer pools its states by their mean, SparseEncoder its logits by their largest."""
    folder, _ = make_model("bert", "ForMaskedLM")
    tokenizer.save_pretrained(folder)
    found = describe(folder)
    assert found.head == "embedding"
    assert {"embed", "rerank", "embed_sparse"} <= set(found.tasks)
    runner, ids = make_runner(folder), tokenizer(SENTENCES)["input_ids"]
    assert_allclose(encode(runner, ids), reference(folder), atol=TOLERANCE)
    mixed = runner.run([EncodeItem(ids=row, output=kind) for row in ids for kind in ("sparse_embedding", "embedding")])
    theirs = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    assert_allclose(np.stack([vector for vector in mixed[1::2] if not isinstance(vector, str)]), theirs, atol=1e-5)
    assert_allclose(np.concatenate(mixed[::2], axis=1)[1].sum(), reference(folder).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "dropped"),
    [("bert", "cls."), ("bert", "cls.predictions.transform.LayerNorm.bias"), ("eurobert", "lm_head.")],
)
def test_without_its_whole_head_a_masked_language_model_is_an_embedder_alone(
    family: str, dropped: str, make_model: MakeModel, make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    folder, _ = make_model(family, "ForMaskedLM")
    drop(folder, dropped)
    assert "embed_sparse" not in describe(folder).tasks
    assert "embed" in describe(folder).tasks
    (fault,) = make_runner(folder).run([EncodeItem(ids=texts[0], output="sparse_embedding")])
    assert fault == "this checkpoint gives embedding, token_embeddings, not sparse_embedding"


def test_what_is_called_safetensors_and_is_no_file_is_passed_by(make_model: MakeModel) -> None:
    """A folder of that name was a traceback, and a pipe was waited for for ever."""
    folder, _ = make_model("bert", "ForMaskedLM")
    (folder / "a.safetensors").mkdir()
    os.mkfifo(folder / "b.safetensors")
    (folder / "c.safetensors").symlink_to(folder / "nowhere")
    found: list[tuple[str, ...]] = []
    reader = threading.Thread(target=lambda: found.append(describe(folder).tasks), daemon=True)
    reader.start()
    reader.join(10)
    assert ["embed_sparse" in tasks for tasks in found] == [True]
    (folder / "d.safetensors").symlink_to("/proc/self/mem")  # a file that gives an error when it is read
    with pytest.raises(CheckpointError, match=r"d\.safetensors cannot be read"):
        describe(folder)


def test_a_sparse_encoder_without_its_head_is_refused_by_the_tensors_name(make_folder: MakeFolder) -> None:
    folder = make_folder()
    drop(folder, "cls.")
    with pytest.raises(CheckpointError, match=r"'cls\.predictions\.decoder\.bias' and 4 more is missing"):
        load_encode_network(folder)


@pytest.mark.parametrize("layout", ["bare", "old"])
def test_names_of_older_savers_are_read(
    layout: str, make_model: MakeModel, make_folder: MakeFolder, make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    """Norms as TensorFlow calls them, the output's bias by its own name alone, and the matrix a second time."""
    folder = make_model("bert", "ForMaskedLM")[0] if layout == "bare" else make_folder(layout)
    expected = encode(make_runner(folder), texts)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bias = tensors.pop("cls.predictions.bias")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    matrix = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(renamed | {"cls.predictions.decoder.bias": bias, "cls.predictions.decoder.weight": matrix}, path)
    assert "embed_sparse" in describe(folder).tasks
    assert_allclose(encode(make_runner(folder), texts), expected, atol=1e-6)


def drop(folder: Path, prefix: str) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith(prefix)}, path)


def test_a_stored_output_matrix_that_is_not_the_embedding_is_used(
    make_model: MakeModel, make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    folder, model = make_model("bert", "ForMaskedLM", tie_word_embeddings=False)
    with torch.no_grad():
        theirs = [model(torch.tensor([ids])).logits[0].relu().log1p().amax(0).numpy() for ids in texts]
    assert "cls.predictions.decoder.weight" in load_file(folder / "model.safetensors")
    assert_allclose(encode(make_runner(folder), texts), theirs, atol=TOLERANCE)


def test_the_tied_matrix_is_in_memory_once_where_the_checkpoint_is_an_embedder_first(
    make_model: MakeModel, make_folder: MakeFolder
) -> None:
    """XLM-RoBERTa's takes a GiB; packed for the output it would be there twice."""
    bare = load_encode_network(make_model("bert", "ForMaskedLM")[0])
    assert bare.splade is not None
    assert bare.splade.head.output.weight.data_ptr() == bare.network.embedding.tokens.weight.data_ptr()  # type: ignore[union-attr]
    sparse = load_encode_network(make_folder())
    assert sparse.splade is not None
    assert isinstance(sparse.splade.head.output, PackedLinear)


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_logits_are_made_for_a_few_tokens_at_a_time_and_the_vectors_stay_the_same(
    strategy: str, make_folder: MakeFolder, make_runner: MakeRunner, texts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A long text of a large vocabulary would take gigabytes: it goes in pieces, and short texts go together."""
    folder = make_folder(pooling_strategy=strategy)
    whole = encode(make_runner(folder), texts)
    monkeypatch.setattr(splade, "MAX_LOGITS", 25 * 90 - 1)
    runner, rows = make_runner(folder), []
    assert runner.network.splade is not None
    runner.network.splade.head.register_forward_hook(lambda _head, _inputs, logits: rows.append(len(logits)))
    assert_allclose(encode(runner, texts), whole, atol=1e-5, rtol=1e-5)
    assert [len(ids) for ids in texts] == [5, 61, 1, 17, 2, 40, 17]
    assert rows == [5, 24, 24, 13, 20, 24, 16, 17]
    alone = np.concatenate([encode(runner, [ids]) for ids in texts])
    assert_allclose(alone, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_a_text_whose_logits_are_not_finite_fails_alone(
    strategy: str, make_folder: MakeFolder, make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    """NaN is not above zero: taken for an entry that is, or is not, it would be lost."""
    folder = make_folder(pooling_strategy=strategy)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    matrix = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = matrix.clone()
    matrix[5] = torch.nan
    save_file(tensors, path)
    runner = make_runner(folder)
    good, bad = EncodeItem(ids=texts[0], output="sparse_embedding"), EncodeItem(ids=[7, 5], output="sparse_embedding")
    first, failed, last = runner.run([good, bad, good])
    assert failed == "the checkpoint's output for this input is not finite"
    assert_allclose(first, runner.run([good])[0], atol=1e-5)
    assert_allclose(first, last, atol=1e-5)


def test_no_more_entries_than_the_folder_says_and_those_the_largest(
    make_folder: MakeFolder, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    folder = make_folder(settings={"max_active_dims": 7})
    theirs = reference(folder)
    assert ((theirs > 0).sum(1) == 7).all()
    assert_allclose(encode(make_runner(folder), tokenizer(SENTENCES)["input_ids"]), theirs, atol=TOLERANCE)


TRANSFORMER = {"type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""}
POOLING = {
    "type": "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling",
    "path": "1_SpladePooling",
}
DENSE_POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
MLM = {"type": "sentence_transformers.sparse_encoder.models.MLMTransformer", "path": ""}
AUTO_ENCODER = {"type": "sentence_transformers.sparse_encoder.models.SparseAutoEncoder", "path": "2_SparseAutoEncoder"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "logits that nothing pools": ({"modules.json": [MLM]}, "SpladePooling, which is not there"),
    "logits that are pooled as states": ({"modules.json": [MLM, DENSE_POOLING]}, "SpladePooling, which is not there"),
    "states that are pooled as logits": (
        {"modules.json": [TRANSFORMER, POOLING], "sentence_bert_config.json": {}},
        'whose transformer_task is "fill-mask"',
    ),
    "more behind it": ({"modules.json": [TRANSFORMER, POOLING, AUTO_ENCODER]}, "SparseAutoEncoder beside"),
    "two of them": ({"modules.json": [TRANSFORMER, POOLING, POOLING]}, "a second one beside"),
    "a strategy": ({"1_SpladePooling/config.json": {"pooling_strategy": "mean"}}, "'pooling_strategy' is 'mean'"),
    "an activation": ({"1_SpladePooling/config.json": {"activation_function": "gelu"}}, "one of log1p_relu, relu"),
    "no entries": ({"config_sentence_transformers.json": {"max_active_dims": 0}}, "'max_active_dims' is 0"),
    "a folder elsewhere": ({"modules.json": [TRANSFORMER, POOLING | {"path": "../elsewhere"}]}, "a folder beside it"),
    "a network whose head is not read": (
        {"config.json": {"architectures": ["AlbertForMaskedLM"]}},
        "AlbertForMaskedLM are",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_followed_is_refused_by_name(case: str, make_folder: MakeFolder) -> None:
    folder = make_folder()
    files, message = REFUSED[case]
    for name, content in files.items():
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(old | content if content and isinstance(content, dict) else content))
    with pytest.raises(CheckpointError, match=message):
        describe(folder)


def test_the_class_may_be_that_of_the_same_network_with_more_heads(make_folder: MakeFolder) -> None:
    """Saved after pre-training, with the head that tells sentences that follow each other."""
    folder = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForPreTraining"]}))
    assert describe(folder).tasks == ("embed_sparse",)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["DebertaV2Model"]}))
    with pytest.raises(UnsupportedArchitectureError, match="DebertaV2Model are not supported"):
        describe(folder)
