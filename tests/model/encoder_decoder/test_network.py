"""The encoder-decoder network agrees with `transformers`, packed, cached and uncached, for every family."""

import json
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, T5ForConditionalGeneration

from model.attention.attend import CachedAttend, CrossAttendPaged, PackedAttend
from model.attention.interface import AttentionRules, CrossAttend, PackedLayout, PagedLayout
from model.attention.reference import ReferenceAttention, attend_one
from model.checkpoint import load_network
from model.compiled_layers import CompiledLinear, Int4Linear, Int8Linear, Quantization, compile_layers
from model.encoder_decoder import EncoderDecoder
from model.errors import CheckpointError
from model.kv_cache import KVCache
from model.layers import Linear
from model.ops import library

SOURCE_LENGTHS = [5, 17, 1, 40]
TARGET_LENGTHS = [3, 1, 30, 7]
BLOCK_SIZE = 4
SaveSeq2Seq = Callable[..., tuple[Path, PreTrainedModel]]


def load(folder: Path) -> EncoderDecoder:
    network = load_network(folder)
    assert isinstance(network, EncoderDecoder)
    return network


def ids(lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # From 3 on, and below the smallest vocabulary: neither padding nor an id that a family treats apart.
    return [torch.randint(3, 79, (length,), generator=generator) for length in lengths]


def bounds(lengths: list[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def packed(lengths: list[int]) -> PackedAttend:
    starts = torch.tensor(bounds(lengths), dtype=torch.int32)
    return PackedAttend(PackedLayout(starts=starts, max_len=max(lengths)), ReferenceAttention())


def positions(lengths: list[int], start: int = 0) -> Tensor:
    return torch.cat([torch.arange(start, start + length) for length in lengths])


def uncached_cross(cross: list[tuple[Tensor, Tensor]], source: list[int], target: list[int]) -> CrossAttend:
    def attend(layer: int, query: Tensor, rules: AttentionRules) -> Tensor:
        keys, values = cross[layer]
        spans = zip(pairwise(bounds(target)), pairwise(bounds(source)), strict=True)
        return torch.cat(
            [attend_one(query[a:b], keys[c:d], values[c:d], rules, first_position=0) for (a, b), (c, d) in spans]
        )

    return attend


def forward(network: EncoderDecoder, sources: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Encoder states and logits of all sequences, packed in order, without a cache."""
    source, target = [len(ids) for ids in sources], [len(ids) for ids in targets]
    encoded = network.encode(torch.cat(sources), positions(source), packed(source))
    cross = uncached_cross(network.cross_keys_values(encoded), source, target)
    return encoded, network.logits(network.decode(torch.cat(targets), positions(target), packed(target), cross))


def test_packed_forward_equals_transformers_sequence_by_sequence(save_seq2seq: SaveSeq2Seq, family: str) -> None:
    folder, reference = save_seq2seq(family)
    sources, targets = ids(SOURCE_LENGTHS, seed=1), ids(TARGET_LENGTHS, seed=2)
    encoded, logits = forward(load(folder), sources, targets)
    with torch.no_grad():
        expected = [
            reference(input_ids=source[None], decoder_input_ids=target[None])
            for source, target in zip(sources, targets, strict=True)
        ]
    torch.testing.assert_close(
        encoded, torch.cat([out.encoder_last_hidden_state[0] for out in expected]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(logits, torch.cat([out.logits[0] for out in expected]), atol=1e-4, rtol=0)
    assert logits.dtype == torch.float32


@pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")
@pytest.mark.parametrize(("quantization", "linear", "most"), [("int8", Int8Linear, 0.05), ("int4", Int4Linear, 0.3)])
def test_quantized_networks_are_near_the_plain_one(
    save_seq2seq: SaveSeq2Seq, family: str, quantization: Quantization, linear: type[CompiledLinear], most: float
) -> None:
    """Whose inputs are not all multiples of 32, and whose weights are smaller than these seeds' here: T5's attention,
    which is not scaled, would make much of little."""
    folder, _ = save_seq2seq(family)
    network, plain = load_network(folder, dtype=torch.bfloat16), load(folder)
    assert isinstance(network, EncoderDecoder)
    for module in (*network.modules(), *plain.modules()):
        if isinstance(module, Linear):
            module.weight.data.mul_(0.25)
    compile_layers(network, quantization, wide=network.output)
    kinds = {type(module) for module in network.modules() if isinstance(module, CompiledLinear | Linear)}
    assert kinds == {linear, Int8Linear}
    sources, targets = ids(SOURCE_LENGTHS, seed=1), ids(TARGET_LENGTHS, seed=2)
    encoded, _ = forward(network, sources, targets)
    expected, _ = forward(plain, sources, targets)
    assert float((encoded - expected).norm() / expected.norm()) < most


def test_steps_over_paged_caches_equal_the_cacheless_forward(save_seq2seq: SaveSeq2Seq, family: str) -> None:
    """Cross-attention blocks are filled once and the target goes through its cache in pieces of 1 to 3 tokens."""
    network = load(save_seq2seq(family)[0])
    config, backend = network.config, ReferenceAttention()
    sources, targets = ids([5, 17], seed=3), ids([9, 9], seed=4)
    _, expected = forward(network, sources, targets)
    cache = KVCache(
        num_layers=config.num_layers,
        num_blocks=16,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=torch.float32,
        device="cpu",
    )
    cross_tables, self_tables = [[9, 2, 0, 0, 0], [5, 1, 12, 3, 8]], [[7, 0, 4], [11, 15, 6]]
    lengths = [len(source) for source in sources]
    encoded = network.encode(torch.cat(sources), positions(lengths), packed(lengths))
    slots = torch.cat([slots_of(table, 0, length) for table, length in zip(cross_tables, lengths, strict=True)])
    for layer, (keys, values) in enumerate(network.cross_keys_values(encoded)):
        backend.write(keys, values, cache.keys[layer], cache.values[layer], slots, network.cross_rules)
    pieces = []
    for start, end in pairwise([0, 3, 4, 5, 7, 8, 9]):
        step = [end - start] * 2
        layout = paged(step, self_tables, context=[end, end])
        cross_layout = paged(step, cross_tables, context=lengths)
        hidden = network.decode(
            torch.cat([target[start:end] for target in targets]),
            positions(step, start),
            CachedAttend(cache, layout, backend),
            CrossAttendPaged(cache, cross_layout, backend),
        )
        pieces.append(network.logits(hidden).view(2, end - start, -1))
    torch.testing.assert_close(torch.cat(pieces, dim=1).flatten(0, 1), expected, atol=1e-4, rtol=0)


def paged(step: list[int], tables: list[list[int]], context: list[int]) -> PagedLayout:
    slots = [slots_of(table, end - count, end) for table, count, end in zip(tables, step, context, strict=True)]
    return PagedLayout(
        query_starts=torch.tensor(bounds(step), dtype=torch.int32),
        context_lens=torch.tensor(context, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slots=torch.cat(slots),
        max_query_len=max(step),
        max_context_len=max(context),
    )


def slots_of(table: list[int], start: int, end: int) -> Tensor:
    return torch.tensor([table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(start, end)])


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("t5", "encoder.embed_tokens.weight"),
        ("t5", "lm_head.weight"),
        ("bart", "model.decoder.embed_tokens.weight"),
        ("bart", "lm_head.weight"),
        ("m2m100", "model.encoder.embed_tokens.weight"),
    ],
)
def test_tied_embeddings_may_be_stored_under_any_one_of_their_names(
    save_seq2seq: SaveSeq2Seq, family: str, kept: str
) -> None:
    folder, _ = save_seq2seq(family)
    sources, targets = ids([5], seed=5), ids([6], seed=6)
    before = forward(load(folder), sources, targets)[1]
    tensors = load_file(folder / "model.safetensors")
    (shared,) = [name for name in tensors if name.endswith("shared.weight")]
    tensors[kept] = tensors.pop(shared)
    save_file(tensors, folder / "model.safetensors")
    network = load(folder)
    assert torch.equal(forward(network, sources, targets)[1], before)
    matrices = {
        network.encoder.embedding.tokens.weight.data_ptr(),
        network.decoder.embedding.tokens.weight.data_ptr(),
        network.output.weight.data_ptr(),
    }
    assert len(matrices) == 1, "the tied matrix takes memory more than once"


def test_an_output_matrix_that_is_stored_is_used(save_seq2seq: SaveSeq2Seq) -> None:
    """FLAN-T5 stores an `lm_head` of its own beside the shared embedding."""
    folder, _ = save_seq2seq("flan-t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sources, targets = ids([5], seed=5), ids([6], seed=6)
    reference = T5ForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(input_ids=sources[0][None], decoder_input_ids=targets[0][None]).logits[0]
    torch.testing.assert_close(forward(load(folder), sources, targets)[1], expected, atol=1e-4, rtol=0)


def test_a_missing_bias_of_the_logits_is_zero(save_seq2seq: SaveSeq2Seq) -> None:
    folder, _ = save_seq2seq("bart")
    tensors = load_file(folder / "model.safetensors")
    bias = tensors.pop("final_logits_bias")
    before = forward(load(folder), ids([5], seed=5), ids([6], seed=6))[1]
    save_file(tensors, folder / "model.safetensors")
    after = forward(load(folder), ids([5], seed=5), ids([6], seed=6))[1]
    torch.testing.assert_close(before - after, bias.expand(6, -1), atol=1e-5, rtol=0)


def test_a_checkpoint_without_any_embedding_is_refused_by_name(save_seq2seq: SaveSeq2Seq) -> None:
    folder, _ = save_seq2seq("bart")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.shared.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(folder)


def test_sinusoids_reach_past_the_trained_length_and_learned_positions_do_not(save_seq2seq: SaveSeq2Seq) -> None:
    folder, _ = save_seq2seq("marian")
    network = load_network(folder, max_model_len=100)
    assert isinstance(network, EncoderDecoder)
    assert network.config.context_length == 100
    source = torch.randint(3, 79, (100,))
    assert network.encode(source, torch.arange(100), packed([100])).isfinite().all()
    assert load_network(save_seq2seq("bart")[0], max_model_len=100).config.context_length == 64


def test_logits_of_umt5_are_not_scaled_where_nothing_is_tied(save_seq2seq: SaveSeq2Seq) -> None:
    folder, _ = save_seq2seq("umt5")
    sources, targets = ids([5], seed=5), ids([6], seed=6)
    scaled = forward(load(folder), sources, targets)[1]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    torch.testing.assert_close(forward(load(folder), sources, targets)[1], scaled * 32**0.5, atol=1e-4, rtol=1e-4)


def test_prompts_of_mvp_are_refused(save_seq2seq: SaveSeq2Seq) -> None:
    folder, _ = save_seq2seq("mvp")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_prompt": True}))
    with pytest.raises(CheckpointError, match="use_prompt True"):
        load(folder)


def test_an_unknown_feed_forward_is_refused_with_the_choices(save_seq2seq: SaveSeq2Seq) -> None:
    folder, _ = save_seq2seq("t5")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feed_forward_proj": "gated-mish"}))
    with pytest.raises(CheckpointError, match=r"feed_forward_proj.*gelu"):
        load(folder)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_residuals_past_the_range_of_float16_stay_finite(save_seq2seq: SaveSeq2Seq, family: str) -> None:
    """T5's large checkpoints overflow in float16; infinite residuals would make every later norm a NaN."""
    folder, _ = save_seq2seq(family)
    network = load_network(folder, dtype=torch.float16)
    assert isinstance(network, EncoderDecoder)
    for layer in [*network.encoder.layers, *network.decoder.layers]:
        layer.mlp.down.weight.mul_(20000).clamp_(-60000, 60000)
    sources, targets = ids([5, 17], seed=5), ids([6, 2], seed=6)
    encoded, logits = forward(network, sources, targets)
    assert encoded.isfinite().all()
    assert logits.isfinite().all()
