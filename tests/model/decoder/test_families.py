"""What holds for every decoder of the table: over the paged cache, on the compiled operators, by other class names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from model.architectures.raw import RawConfig
from model.architectures.table import DECODERS
from model.attention.attend import CachedAttend, PackedAttend
from model.attention.cpu import CpuAttention
from model.attention.interface import PackedLayout, PagedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.compiled_decoder import join_layers
from model.compiled_layers import Quantization, compile_layers
from model.decoder import Decoder
from model.encode_network import load_encode_network
from model.errors import CheckpointError
from model.generation_defaults import DECODER_ENDS
from model.kv_cache import KVCache
from model.ops import library
from model.packed_linear import pack
from model.pooling import Span

Saved = tuple[Path, PreTrainedModel]
Run = Callable[..., list[Tensor]]
BLOCK_SIZE = 16
CHUNKS = (9, 7, *[1] * 15)
"""Of the third text of the fixture, a prompt in two chunks and single tokens."""


def load(folder: Path, dtype: torch.dtype | None = None) -> Decoder:
    network = load_network(folder, dtype=dtype)
    assert isinstance(network, Decoder)
    return network


def paged_logits(network: Decoder, text: list[int], chunks: tuple[int, ...]) -> Tensor:
    """[length, V], computed chunk by chunk over blocks that do not lie in order."""
    assert sum(chunks) == len(text)
    config, dtype = network.config, network.embedding.weight.dtype
    table = torch.tensor([[5, 2]], dtype=torch.int32)
    cache = KVCache(
        config.num_layers, 6, block_size=BLOCK_SIZE, num_kv_heads=config.num_kv_heads, head_size=config.head_size,
        dtype=dtype, device="cpu",
    )  # fmt: skip
    found, start = [], 0
    for size in chunks:
        positions = torch.arange(start, start + size)
        layout = PagedLayout(
            query_starts=torch.tensor([0, size], dtype=torch.int32),
            context_lens=torch.tensor([start + size], dtype=torch.int32),
            block_tables=table,
            slots=table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            max_query_len=size,
            max_context_len=start + size,
        )
        ids = torch.tensor(text[start : start + size])
        found.append(network.logits(network(ids, positions, CachedAttend(cache, layout, CpuAttention()))))
        start += size
    return torch.cat(found)


def test_paged_logits_of_chunks_and_single_tokens_are_those_of_transformers(
    saved: Saved, texts: list[list[int]]
) -> None:
    folder, reference = saved
    theirs = reference(torch.tensor([texts[2]])).logits[0]
    torch.testing.assert_close(paged_logits(load(folder), texts[2], CHUNKS), theirs, rtol=1e-4, atol=1e-4)


def test_packed_projections_give_the_same_logits(saved: Saved, run_packed: Run, texts: list[list[int]]) -> None:
    plain, packed = load(saved[0]), load(saved[0])
    pack(packed)
    for found, expected in zip(run_packed(packed, texts), run_packed(plain, texts), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not library.LOADED, reason="the operators are not compiled here")
@pytest.mark.parametrize(("quantization", "most"), [("none", 1.5), ("int8", 4.0), ("int4", 35.0)])
def test_compiled_layers_stay_near_the_plain_ones(
    saved: Saved, texts: list[list[int]], quantization: Quantization, most: float
) -> None:
    """Whatever of a family has operators and whatever has none: `most` times the error that bfloat16 has anyway, and
    more where the other one of two experts that are nearly tied may be chosen."""
    exact = paged_logits(load(saved[0]), texts[2], CHUNKS)
    plain = paged_logits(load(saved[0], torch.bfloat16), texts[2], CHUNKS)
    compiled = load(saved[0], torch.bfloat16)
    compile_layers(compiled, quantization, wide=compiled.output)
    join_layers(compiled)
    found = paged_logits(compiled, texts[2], CHUNKS)
    most *= 1 if compiled.config.experts is None else 3
    assert (found - exact).square().mean().sqrt() < most * (plain - exact).square().mean().sqrt()


def values_of(saved: Saved) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((saved[0] / "config.json").read_text())
    return {key: value for key, value in values.items() if key not in ("architectures", "transformers_version")}


def test_a_classifier_gives_the_scores_of_transformers(
    saved: Saved, save_reference: Callable[..., Saved], texts: list[list[int]]
) -> None:
    values = values_of(saved)
    if values["model_type"] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        pytest.skip("transformers has no classifier of this kind")
    folder, reference = save_reference(AutoModelForSequenceClassification, **values | {"num_labels": 3})
    network = load_encode_network(folder)
    for text in texts:
        hidden = network(*single(text))
        theirs = reference(torch.tensor([text])).logits
        torch.testing.assert_close(network.per_text(hidden, [Span(0, len(text))]), theirs, rtol=1e-4, atol=1e-4)


def test_the_bare_network_gives_the_states_of_transformers(
    saved: Saved, save_reference: Callable[..., Saved], texts: list[list[int]]
) -> None:
    """Its tensors are stored without the prefix that they have beside a head."""
    folder, reference = save_reference(AutoModel, **values_of(saved))
    theirs = reference(torch.tensor([texts[2]])).last_hidden_state[0]
    torch.testing.assert_close(load_encode_network(folder)(*single(texts[2])), theirs, rtol=1e-4, atol=1e-4)


def single(text: list[int]) -> tuple[Tensor, Tensor, Tensor, PackedAttend]:
    """What an `EncodeNetwork` takes of one text."""
    positions = torch.arange(len(text))
    layout = PackedLayout(starts=torch.tensor([0, len(text)], dtype=torch.int32), max_len=len(text))
    return torch.tensor(text), torch.zeros_like(positions), positions, PackedAttend(layout, ReferenceAttention())


BESIDE_VISION = {"gemma3"}
KINDS = {
    kind: name
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if name in DECODERS and kind not in BESIDE_VISION
}
NAMED_OTHERWISE = {"internlm3": "InternLM3ForCausalLM", "iquestcoder": "IQuestCoderForCausalLM"}
"""Which transformers reads as Llama."""
WITHOUT_DEFAULTS = {"dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3}}
SIZES = {
    "vocab_size", "hidden_size", "d_model", "n_embd", "intermediate_size", "num_hidden_layers", "num_layers", "n_layer",
    "n_layers", "num_attention_heads", "num_heads", "n_head", "n_heads",
}  # fmt: skip


def counts_key_heads(kind: str) -> bool:
    return isinstance(AutoConfig.for_model(kind).to_dict().get("num_key_value_heads"), int)


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*item, id=item[0]) for item in (KINDS | NAMED_OTHERWISE).items()]
)
def test_each_key_that_a_config_leaves_out_has_the_value_of_its_class(kind: str, name: str) -> None:
    """But for sizes, which every config has: those are asked for."""
    whole = json.loads(json.dumps(AutoConfig.for_model(kind, **WITHOUT_DEFAULTS.get(kind, {})).to_dict()))
    configured = DECODERS[name].configure(RawConfig(whole), None)
    for key in whole:
        rest = RawConfig({other: value for other, value in whole.items() if other != key})
        try:
            found = DECODERS[name].configure(rest, None)
        except CheckpointError:
            assert key in SIZES or key in WITHOUT_DEFAULTS.get(kind, {})
        else:
            assert found == configured, key


@pytest.mark.parametrize("kind", [kind for kind in KINDS if counts_key_heads(kind)])
def test_key_heads_that_a_config_leaves_out_are_as_many_as_its_class_has(kind: str) -> None:
    """Of twice the query heads: a class may count its key heads by them, or not."""
    num_heads = 2 * AutoConfig.for_model(kind).num_attention_heads
    given = {"num_attention_heads": num_heads} | WITHOUT_DEFAULTS.get(kind, {})
    whole = AutoConfig.for_model(kind, **given).to_dict()
    configure = DECODERS[(KINDS | NAMED_OTHERWISE)[kind]].configure
    rest = {key: value for key, value in whole.items() if key != "num_key_value_heads"}
    assert configure(RawConfig(rest), None).num_kv_heads == configure(RawConfig(whole), None).num_kv_heads


@pytest.mark.parametrize("kind", [*KINDS, *NAMED_OTHERWISE])
def test_the_end_of_a_text_that_a_config_leaves_out_is_that_of_its_class(kind: str) -> None:
    end = AutoConfig.for_model(kind).eos_token_id
    ends = () if end is None else tuple(end) if isinstance(end, list) else (end,)
    assert DECODER_ENDS.get(AutoConfig.for_model(kind).model_type, ()) == ends


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("smollm3", {"no_rope_layers": [0, 1]}),
        ("smollm3", {"no_rope_layers": [0, 1, 2] * 12}),
        ("granite", {"logits_scaling": 0}),
        ("apertus", {"hidden_act": "tanh"}),
        ("exaone4", {"sliding_window_pattern": "LLLG", "layer_types": None}),
        ("iquestcoder", {"clip_qkv": 8.0}),
        ("iquestcoder", {"use_sliding_window": True}),
        ("falcon", {"parallel_attn": False, "new_decoder_architecture": True}),
        ("falcon", {"num_ln_in_parallel_attn": 2}),
        ("falcon", {"num_ln_in_parallel_attn": 3, "new_decoder_architecture": True}),
        ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
        ("falcon", {"apply_residual_connection_post_layernorm": True}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("gptj", {"rotary_dim": 7}),
        ("gptj", {"rotary_dim": 512}),
        ("codegen", {"n_head": 2}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt_bigcode", {"add_cross_attention": True}),
        ("gpt_bigcode", {"activation_function": "swiglu"}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}),
        ("gpt_neo", {"attention_types": [[["global", "strided"], 12]]}),
        ("gpt_neo", {"attention_types": ["global"]}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("opt", {"word_embed_proj_dim": 512}),
        ("mpt", {"no_bias": False}),
        ("mpt", {"norm_type": "rmsnorm"}),
        ("mpt", {"logit_scale": "inv_sqrt_d_model"}),
        ("mpt", {"final_logit_softcapping": 30.0}),
        ("mpt", {"block_overrides": {"order": []}}),
        ("mpt", {"ffn_config": {"ffn_type": "mptglu"}}),
        *(
            ("mpt", {"attn_config": {key: value}})
            for key, value in {
                "attn_type": "multiquery_attention",
                "prefix_lm": True,
                "qk_ln": True,
                "attn_uses_sequence_id": True,
                "alibi": False,
                "alibi_bias_max": 16,
                "qk_gn": True,
                "rope": True,
                "sliding_window_size": 512,
                "attn_logit_softcapping": 50.0,
            }.items()
        ),
    ],
)
def test_what_is_not_computed_is_refused_with_its_key(kind: str, values: dict[str, Any]) -> None:
    """transformers computes some of it, refuses some, and passes over the rest without a word."""
    whole = AutoConfig.for_model(kind).to_dict() | values
    row = DECODERS[(KINDS | NAMED_OTHERWISE)[kind]]
    key = next(iter(values))
    key = next(iter(values[key])) if key in ("attn_config", "ffn_config") else key
    with pytest.raises(CheckpointError, match=rf"config\.json: '{key}' is "):
        row.configure(RawConfig(whole), None)
