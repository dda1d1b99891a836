"""What is in the files is what is in the network, whole or sharded and in any dtype."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import load_network

Write = Callable[..., Path]


def test_every_parameter_is_what_was_stored(write: Write, tensors: dict[str, Tensor]) -> None:
    parameters = dict(load_network(write(tensors)).named_parameters())
    layer = "model.layers.1"
    query, key, value = (tensors[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (tensors[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    expected = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
        "layers.1.attention.query_key_value.weight": torch.cat((query, key, value)),
        "layers.1.attention.output.weight": tensors[f"{layer}.self_attn.o_proj.weight"],
        "layers.1.mlp.gate_up.weight": torch.cat((gate, up)),
        "layers.1.mlp.down.weight": tensors[f"{layer}.mlp.down_proj.weight"],
        "layers.1.attention_norm.weight": tensors[f"{layer}.input_layernorm.weight"],
        "layers.1.mlp_norm.weight": tensors[f"{layer}.post_attention_layernorm.weight"],
    }
    assert {name for name in parameters if not name.startswith("layers.0")} == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(parameters[name], tensor), name
        assert not parameters[name].requires_grad


def test_shards_are_one_checkpoint(write: Write, tensors: dict[str, Tensor]) -> None:
    whole = dict(load_network(write(tensors)).named_parameters())
    sharded = dict(load_network(write(tensors, shards=3, folder="sharded")).named_parameters())
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_tensors_are_cast_to_the_dtype_asked_for(
    write: Write, tensors: dict[str, Tensor], stored: torch.dtype, wanted: torch.dtype | None
) -> None:
    folder = write({name: tensor.to(stored) for name, tensor in tensors.items()})
    parameter = load_network(folder, dtype=wanted).get_parameter("output.weight")
    default = torch.bfloat16 if stored.itemsize == 1 else stored  # 8-bit values are all bfloat16 values, too
    dtype = default if wanted is None else wanted
    assert parameter.dtype == dtype
    assert torch.equal(parameter, tensors["lm_head.weight"].to(stored).to(dtype))


def test_without_a_dtype_the_one_of_most_bytes_is_taken(write: Write, tensors: dict[str, Tensor]) -> None:
    mixed = {name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    dtypes = {parameter.dtype for parameter in load_network(write(mixed)).parameters()}
    assert dtypes == {torch.bfloat16}


def test_a_tied_output_is_the_embedding_itself_whether_or_not_it_is_stored(
    write: Write, tensors: dict[str, Tensor]
) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    with_head = load_network(write(tensors, tie_word_embeddings=True))
    del tensors["lm_head.weight"]
    without = load_network(write(tensors, tie_word_embeddings=True, folder="without"))
    for network in (with_head, without):
        assert network.get_parameter("output.weight") is network.get_parameter("embedding.weight")


def test_progress_rises_to_the_bytes_of_all_tensors(write: Write, tensors: dict[str, Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    load_network(write(tensors, shards=2), progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert {entry[1] for entry in seen} == {total}
    done = [entry[0] for entry in seen]
    assert done == sorted(done)
    assert done[-1] == total


def test_known_leftovers_are_passed_over(write: Write, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert load_network(write(tensors)) is not None


def test_loading_holds_no_second_copy_of_the_weights(write: Write, tensors: dict[str, Tensor]) -> None:
    """Peak of what torch allocates while loading in another dtype: the network, and about one stored tensor."""
    folder = write({name: tensor.bfloat16() for name, tensor in tensors.items()}, shards=2)
    alive: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.device.type == "cpu" and out.untyped_storage().nbytes():
                alive.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        load_network(folder, dtype=torch.float32)
    largest = max(4 * parameter.numel() for parameter in load_network(folder).parameters())
    assert max(alive) <= largest


def test_old_dtype_and_position_keys_do_not_matter_to_loading(write: Write, tensors: dict[str, Tensor]) -> None:
    new = write(tensors, dtype="bfloat16", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    old = write(tensors, torch_dtype="bfloat16", rope_theta=5000.0, rope_scaling=None, folder="old")
    assert json.loads((old / "config.json").read_text())["rope_scaling"] is None
    assert load_network(new).config == load_network(old).config
