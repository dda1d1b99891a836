"""Adapters beside the base that they share compute what they compute merged into it, and PEFT before anything is."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from model.adapters.folder import joined
from model.adapters.low_rank import AdapterWeights, StepAdapters, runs_of
from model.adapters.pairs import load_adapter_weights
from model.adapters.places import MAX_RANK
from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.compiled_layers import compile_layers
from model.decoder import Decoder
from model.errors import CheckpointError, UnsupportedArchitectureError
from model.gguf.folder import unpack
from model.ops import library
from model.packed_linear import pack
from tests.model.adapters.conftest import IDS, RECORDED, SETTINGS, Store, logits, pair, read_recording
from tests.model.adapters.test_families import FAMILIES
from tests.model.adapters.test_merging import merge_by_hand
from tests.model.decoder.conftest import CASES as DECODERS

REFERENCE = Path(__file__).parents[2] / "reference"
CPU = torch.device("cpu")
QUERY = "model.layers.0.self_attn.q_proj"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
"""All that can be computed beside experts."""
NAMED = f"base_model.model.{QUERY}"


def weights_of(folder: Path, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    return load_adapter_weights(folder, folder.parent / "base", dtype, CPU)


def network_of(folder: Path, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> Decoder:
    network = load_network(folder, CPU, dtype)
    assert isinstance(network, Decoder)
    if packed:
        compile_layers(network, wide=network.output)
        pack(network)
    return network


@torch.inference_mode()
def hidden_of(network: Decoder, texts: list[list[int]], adapters: list[AdapterWeights | None]) -> Tensor:
    """States [T, E] of texts side by side, each with its adapter or none."""
    starts = [0]
    for ids in texts:
        starts.append(starts[-1] + len(ids))
    layout = PackedLayout(starts=torch.tensor(starts, dtype=torch.int32), max_len=max(map(len, texts)))
    positions = torch.cat([torch.arange(len(ids)) for ids in texts])
    ids = torch.tensor([number for text in texts for number in text])
    attend = PackedAttend(layout, ReferenceAttention())
    return network(ids, positions, attend, StepAdapters(runs_of(adapters, starts)))


def shared_logits(folder: Path, *, packed: bool = False) -> Tensor:
    network = network_of(folder.parent / "base", packed=packed)
    with torch.inference_mode():
        return network.logits(hidden_of(network, [IDS], [weights_of(folder)]))


@pytest.mark.parametrize("packed", [False, True])
def test_a_recorded_adapter_gives_the_logits_of_peft(store: Store, packed: bool) -> None:
    (path,) = (path for path in RECORDED if path.stem == "llama")
    recording = read_recording(path)
    folder = store(recording.tensors, base=recording.base, config=recording.config)
    found = shared_logits(folder, packed=packed)
    torch.testing.assert_close(found[-len(recording.logits) :], recording.logits, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", [case for case in DECODERS if "," not in case])
@pytest.mark.parametrize("packed", [False, True])
def test_every_projection_of_a_family_is_computed_as_if_it_were_merged(
    store: Store, tmp_path: Path, family: str, packed: bool
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.save_pretrained(tmp_path / "base")
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, linear)}
    targets = ATTENTION if hasattr(model.config, "num_experts_per_tok") else names - {"lm_head", "embed_out"}
    tensors = merge_by_hand(model, tuple(targets), False, 1.5)
    folder = store(tensors, fan_in_fan_out=family == "gpt2")
    expected = logits(folder)
    assert (logits(tmp_path / "base") - expected).abs().max() > 1e-2
    torch.testing.assert_close(shared_logits(folder, packed=packed), expected, rtol=1e-4, atol=1e-4)


def test_scales_are_those_of_each_module(store: Store) -> None:
    """Among them rank-stabilized ones, and modules of one fused projection with ranks of their own."""
    tensors = pair(QUERY, 8, 8, rank=3) | pair("model.layers.0.self_attn.v_proj", 4, 8, rank=5)
    settings = {"use_rslora": True, "rank_pattern": {"q_proj": 3, "v_proj": 5}, "alpha_pattern": {"v_proj": 0.5}}
    folder = store(tensors, **settings)
    torch.testing.assert_close(shared_logits(folder), logits(folder), rtol=1e-4, atol=1e-5)


def adapted(store: Store, name: str, seed: int) -> Path:
    sizes = {"self_attn.q_proj": (8, 8), "self_attn.o_proj": (8, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for module, size in sizes.items():
            tensors |= pair(f"model.layers.{layer}.{module}", *size, seed=seed)
    return store(tensors, folder=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_mixed_step_are_what_they_are_alone(store: Store, dtype: torch.dtype) -> None:
    """In bfloat16, where the operators are there, to a bit."""
    one, other = (weights_of(adapted(store, name, seed), dtype) for name, seed in (("one", 1), ("other", 2)))
    network = network_of(adapted(store, "third", 3).parent / "base", dtype, packed=True)
    texts = [IDS[:5], IDS, IDS[3:], IDS[:7], IDS[1:4]]
    adapters = [one, None, other, one, None]
    mixed = hidden_of(network, texts, adapters)
    start = 0
    exact = dtype == torch.bfloat16 and library.LOADED
    for ids, adapter in zip(texts, adapters, strict=True):
        alone = hidden_of(network, [ids], [adapter])
        found = mixed[start : start + len(ids)]
        assert torch.equal(found, alone) if exact else torch.allclose(found.float(), alone.float(), atol=2e-2)
        if adapter is not None:
            assert not torch.allclose(found.float(), hidden_of(network, [ids], [None]).float(), atol=5e-2)
        start += len(ids)


def test_rows_without_an_adapter_are_what_they_are_without_any_in_the_step(store: Store) -> None:
    weights = weights_of(adapted(store, "one", 1))
    network = network_of(adapted(store, "other", 2).parent / "base")
    beside = hidden_of(network, [IDS, IDS], [None, weights])[: len(IDS)]
    layout = PackedLayout(starts=torch.tensor([0, len(IDS)], dtype=torch.int32), max_len=len(IDS))
    with torch.inference_mode():
        plain = network(torch.tensor(IDS), torch.arange(len(IDS)), PackedAttend(layout, ReferenceAttention()))
    torch.testing.assert_close(beside, plain, rtol=1e-5, atol=1e-6)


def test_neighbours_with_one_adapter_are_one_run(store: Store) -> None:
    one, other = (weights_of(adapted(store, name, 1)) for name in ("one", "other"))
    runs = runs_of([None, one, one, other, None, other], [0, 3, 4, 6, 7, 8, 9])
    assert [(run.begin, run.end, run.weights) for run in runs] == [(3, 6, one), (6, 7, other), (8, 9, other)]


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"use_dora": True}, "adapter_config.json: DoRA.*serve it merged, with --model"),
        ({}, {"task_type": "SEQ_CLS"}, "SEQ_CLS.*serve it merged"),
        ({"base_model.model.lm_head.weight": torch.ones(64, 8)}, {}, "lm_head.weight' is saved whole.*merged"),
        ({"base_model.model.model.norm.weight": torch.ones(8)}, {}, "norm.weight' is saved whole"),
        ({f"{NAMED}.lora_B.bias": torch.ones(8)}, {}, "lora_B.bias' is a trained bias"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 8)}, {}, "no projection of a layer.*merged"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 64)}, {}, "no projection of a layer"),
        ({}, {"r": MAX_RANK + 1}, "rank 513; at most 512"),
        ({}, {"peft_type": "IA3"}, "kind IA3"),
    ],
)
def test_what_can_only_be_merged_is_refused_with_that_advice(
    store: Store, change: dict[str, Tensor], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        weights_of(store(pair(QUERY, 8, 8) | change, **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 8)}, "layers.7.*no place"),
        ({f"{NAMED}.lora_B.weight": None}, "lora_A.weight' lacks its lora_B"),
        ({f"{NAMED}.lora_A.weight": None}, "lora_B.weight' lacks its lora_A"),
        ({f"{NAMED}.lora_A.weight": torch.ones(3, 8)}, r"lora_A.*shape \[3, 8\]; rank and base ask for \[2, 8\]"),
        ({f"{NAMED}.lora_B.weight": torch.ones(24, 2)}, r"lora_B.*shape \[24, 2\]; rank and base ask for \[8, 2\]"),
        ({f"{NAMED}.lora_A.weight": torch.ones(2, 8, 1, 1)}, r"lora_A.*shape \[2, 8, 1, 1\]"),
        ({f"{NAMED}.lora_A.weight": torch.ones(2, 8).int()}, "lora_A.*not stored as"),
        ({f"{NAMED}.lora_A.weight": torch.full((2, 8), torch.nan)}, "lora_A.*no finite numbers"),
        ({f"{NAMED}.lora_A.default.weight": torch.ones(2, 8)}, "mean the same"),
        ({f"{NAMED}.lora_magnitude_vector": torch.ones(8)}, "use_dora"),
    ],
)
def test_tensors_that_do_not_fit_are_named(store: Store, change: dict[str, Any], message: str) -> None:
    tensors = {name: tensor for name, tensor in (pair(QUERY, 8, 8) | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message) as caught:
        weights_of(store(tensors))
    assert caught.value.file == "adapter_model.safetensors"
    assert caught.value.tensor is not None


def test_a_base_that_does_not_generate_from_a_decoder_is_refused(store: Store) -> None:
    folder = store(
        {"base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": torch.ones(2, 32)}, base="t5"
    )
    with pytest.raises(UnsupportedArchitectureError, match="no decoder that generates"):
        weights_of(folder)


def test_a_gguf_file_can_be_the_base(tmp_path: Path) -> None:
    """Its queries and keys are stored in another order than the modules of the adapter have them."""
    file = tmp_path / "story.gguf"
    file.write_bytes(gzip.decompress((REFERENCE / "gguf/bpe-smollm.gguf.gz").read_bytes()))
    unpacked = unpack(file)
    assert unpacked is not None
    base = unpacked.folder
    raw = json.loads((base / "config.json").read_text())
    hidden, head_size = raw["hidden_size"], raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    tensors = pair(QUERY, raw["num_attention_heads"] * head_size, hidden)
    tensors |= pair(QUERY.replace("q_proj", "k_proj"), raw["num_key_value_heads"] * head_size, hidden)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(SETTINGS))
    with joined(tmp_path / "adapter", base) as whole:
        merged = network_of(whole)
    weights = load_adapter_weights(tmp_path / "adapter", base, torch.float32, CPU)
    found = hidden_of(network_of(base), [IDS], [weights])
    torch.testing.assert_close(found, hidden_of(merged, [IDS], [None]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, hidden_of(network_of(base), [IDS], [None]), atol=1e-2)
