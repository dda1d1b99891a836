"""The same network from the different forms in which its checkpoints are found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.description import describe
from model.encode_network import load_encode_network
from model.errors import CheckpointError, UnsupportedArchitectureError
from tests.model.decoder.conftest import CASES

DATA = Path(__file__).parents[3].parent / "shared" / "data"
Save = Callable[..., tuple[Path, PreTrainedModel]]
Run = Callable[..., list[Tensor]]
TEXT = [5, 80, 41, 7, 60, 22, 9, 33, 2, 15, 71]
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
}


def rewrite(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any
) -> Path:
    """A copy of a checkpoint with its tensors changed, and keys of its config replaced."""
    target.mkdir(exist_ok=True)
    raw = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(raw))
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


def test_gpt2_without_prefix_and_with_its_masks_is_the_same_network(
    save_reference: Save, run_packed: Run, tmp_path: Path
) -> None:
    """The checkpoints of OpenAI's GPT-2 have no prefix and hold causal masks; Cerebras-GPT's config says GPT2Model."""
    folder, reference = save_reference(**GPT2)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for layer in range(2)}
        masked = {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
        return bare | masks | masked

    bare = rewrite(folder, tmp_path, change, architectures=["GPT2Model"])
    ours = run_packed(load_network(bare), [TEXT])[0]
    torch.testing.assert_close(ours, reference(torch.tensor([TEXT])).logits[0], rtol=1e-4, atol=1e-4)


def test_gpt_neox_of_before_transformers_5_is_the_same_network(
    save_reference: Save, run_packed: Run, tmp_path: Path
) -> None:
    folder, reference = save_reference(
        model_type="gpt_neox",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        rotary_pct=0.5,
    )

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = tensors.pop("lm_head.weight", None)
        tensors["embed_out.weight"] = tensors.pop("embed_out.weight") if head is None else head
        tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        tensors["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(4)
        return tensors

    old = {"rope_parameters": None, "rotary_emb_base": 10000, "rotary_pct": 0.5}
    found = run_packed(load_network(rewrite(folder, tmp_path, change, **old)), [TEXT])[0]
    torch.testing.assert_close(found, reference(torch.tensor([TEXT])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("glm4_moe", ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.3.up_proj.weight")),
        ("ernie4_5_moe", ("model.mtp_block.0.self_attn.q_proj.weight", "model.mtp_emb_norm.0.weight")),
    ],
)
def test_layers_that_guess_ahead_are_left_aside(
    save_reference: Save, run_packed: Run, tmp_path: Path, case: str, extra: tuple[str, ...]
) -> None:
    """GLM-4.5 and ERNIE 4.5 store one more behind the last, for speculation."""
    folder, reference = save_reference(**CASES[case])
    more = {name: torch.ones(3, 3) for name in extra}
    ours = run_packed(load_network(rewrite(folder, tmp_path, lambda tensors: tensors | more)), [TEXT])[0]
    torch.testing.assert_close(ours, reference(torch.tensor([TEXT])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda experts: experts[:4],
            r"input_linear.weight' has shape \[4, 96, 48\]; config.json asks for \[5, 96, 48\]",
        ),
        (lambda experts: experts[:, :90], r"has shape \[5, 90, 48\]; config.json asks for \[5, 96, 48\]"),
        (lambda experts: experts[0], r"has shape \[96, 48\]; config.json asks for \[5, 96, 48\]"),
    ],
    ids=["too few", "too narrow", "one"],
)
def test_experts_in_one_tensor_must_be_as_many_and_as_wide_as_config_says(
    save_reference: Save, tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    folder, _ = save_reference(**CASES["granitemoe"])
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    with pytest.raises(CheckpointError, match=message):
        load_network(rewrite(folder, tmp_path, lambda tensors: tensors | {name: change(tensors[name]).contiguous()}))


def test_all_that_is_read_is_told_once(save_reference: Save) -> None:
    """Where many parameters are of one tensor, too."""
    folder, _ = save_reference(**CASES["granitemoe"])
    told: list[tuple[int, int]] = []
    load_network(folder, progress=lambda done, total: told.append((done, total)))
    assert (
        told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    )


def test_a_bias_that_chooses_experts_stays_in_float32(save_reference: Save) -> None:
    """In bfloat16 others would be chosen, or all alike."""
    folder, _ = save_reference(**CASES["dots1"])
    network = load_network(folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(network.get_parameter("layers.1.mlp.selection_bias"), stored)
    assert network.get_parameter("layers.1.mlp.router.weight").dtype == torch.bfloat16


def test_stories260k_writes_what_it_is_published_to_write(run_packed: Run) -> None:
    """Greedy ids of real weights, 20 of each case, by full recompute."""
    outputs = DATA / "reference-outputs" / "greedy_transformers_cpu_fp32.json"
    if not outputs.is_file():
        pytest.skip(f"{outputs} is not here")
    network = load_network(DATA / "stories260K-hf")
    for case in json.loads(outputs.read_text())["models"]["stories260K-hf"]["cases"]:
        ids = list(case["prompt_ids"])
        for _ in range(20):
            ids.append(int(run_packed(network, [ids])[0][-1].argmax()))
        assert ids[len(case["prompt_ids"]) :] == case["new_ids"][:20]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("form", ["differing", "equal", "head alone"])
def test_a_head_of_its_own_is_used_whatever_the_config_says_of_ties(
    save_reference: Save, run_packed: Run, tmp_path: Path, kind: str, form: str
) -> None:
    """A head that was trained apart from the embedding was dropped for it, without a word."""
    heads = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    sizes = GPT2 if kind == "gpt2" else {"model_type": kind, "vocab_size": 97, **heads}
    folder, _ = save_reference(**sizes, tie_word_embeddings=True)
    embedding = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}[kind]

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = tensors[f"{embedding}.weight"]
        head = stored.flip(0).contiguous() if form == "differing" else stored.clone()
        kept = {name: value for name, value in tensors.items() if form != "head alone" or value is not stored}
        return kept | {"lm_head.weight": head}

    changed = rewrite(folder, tmp_path, change)
    reference = AutoModelForCausalLM.from_pretrained(changed)
    network = load_network(changed)
    ours = run_packed(network, [TEXT])[0]
    torch.testing.assert_close(ours, reference(torch.tensor([TEXT])).logits[0], rtol=1e-4, atol=1e-4)
    shared = network.get_parameter("output.weight") is network.get_parameter("embedding.weight")
    assert shared == (form != "differing")


TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the files of before transformers 5 name the parts of a model with a vision tower."""
    head = "language_model.model."
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    bare = {f"language_model.{name}" if name.startswith("lm_head") else name: value for name, value in bare.items()}
    return {
        head + name.removeprefix("language_model.").removeprefix("model.")
        if name.startswith("language_model.") and "lm_head" not in name
        else name: tensor
        for name, tensor in bare.items()
    }


def prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As those of transformers 5 do."""
    found = {
        "model.language_model." + name.removeprefix("language_model.model.")
        if name.startswith("language_model.model.")
        else f"model.{name}": tensor
        for name, tensor in renamed(tensors).items()
    }
    return {name.replace("model.language_model.lm_head", "lm_head"): tensor for name, tensor in found.items()}


def gemma_3() -> PreTrainedModel:
    text = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        pad_token_id=0,
    )
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def mistral_3(kind: str, *, tied: bool) -> PreTrainedModel:
    text = AutoConfig.for_model(kind, **TINY, sliding_window=None).to_dict()
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Mistral3Config(text_config=text, vision_config=vision.to_dict(), tie_word_embeddings=tied)
    return Mistral3ForConditionalGeneration(config)


BESIDE_VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma 3": gemma_3,
    "mistral small": lambda: mistral_3("mistral", tied=False),
    "ministral 3": lambda: mistral_3("ministral3", tied=True),
}


@pytest.mark.parametrize("names", [prefixed, renamed], ids=["transformers 5", "before"])
@pytest.mark.parametrize("kind", BESIDE_VISION)
def test_what_is_beside_a_vision_tower_is_its_text_model(
    run_packed: Run, tmp_path: Path, kind: str, names: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    torch.manual_seed(0)
    reference = BESIDE_VISION[kind]().eval()
    reference.save_pretrained(tmp_path)
    folder = rewrite(tmp_path, tmp_path / "copy", names)
    ours = run_packed(load_network(folder), [TEXT])[0]
    theirs = reference(torch.tensor([TEXT])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma3Text", {"sliding_window": 6, "use_bidirectional_attention": True}),
        ("Qwen2", {"is_causal": False}),
        ("Qwen3", {"is_causal": False}),
        ("Mistral", {"is_causal": False, "sliding_window": 4}),
    ],
)
def test_a_decoder_that_sees_the_whole_text_is_an_embedder(
    run_packed: Run, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """EmbeddingGemma, gte-Qwen2: windows look both ways; as a language model it is refused."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **changes)
    reference = getattr(transformers, f"{kind}Model")(config).eval()
    reference.save_pretrained(tmp_path)
    network = load_encode_network(tmp_path)
    positions = torch.arange(len(TEXT))
    layout = PackedLayout(starts=torch.tensor([0, len(TEXT)], dtype=torch.int32), max_len=len(TEXT))
    attend = PackedAttend(layout, ReferenceAttention())
    ours = network(torch.tensor(TEXT), torch.zeros_like(positions), positions, attend)
    theirs = reference(torch.tensor([TEXT])).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    raw = json.loads((tmp_path / "config.json").read_text())
    name = f"{kind.removesuffix('Text')}ForCausalLM"
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": [name]}))
    with pytest.raises(UnsupportedArchitectureError, match="without causal attention"):
        describe(tmp_path)
    modules = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in ("Transformer", "Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert describe(tmp_path).head == "embedding"


def with_masks(layer: str, *names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What files of before transformers 4.30 hold beside the weights."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = {name: torch.ones(1, 1, 64, 64, dtype=torch.uint8) for name in names}
        return tensors | {f"transformer.h.0.{layer}.{name}": mask for name, mask in masks.items()}

    return change


SMALL: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
FALCON: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
REFINED_WEB: dict[str, Any] = {
    "architectures": ["RWForCausalLM"], "num_attention_heads": None, "n_head": 4, "num_hidden_layers": None,
    "n_layer": 2, "num_kv_heads": None, "multi_query": None, "parallel_attn": None, "new_decoder_architecture": None,
}  # fmt: skip
OLD_FORMS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "gptj": ({**SMALL, "rotary_dim": 4}, with_masks("attn", "bias", "masked_bias"), {}),
    "codegen": ({**SMALL, "rotary_dim": 4}, with_masks("attn", "causal_mask"), {}),
    "gpt_bigcode": (SMALL, with_masks("attn", "bias"), {}),
    "gpt_neo": (
        {"vocab_size": 97, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global"], 2]]},
        with_masks("attn.attention", "bias", "masked_bias"),
        {},
    ),
    "bloom": (
        {"vocab_size": 97, "hidden_size": 32, "n_head": 4, "n_layer": 2},
        dict,
        {"hidden_size": None, "n_embed": 32, "n_head": None, "num_attention_heads": 4},
    ),
    "bloom, n_embed first": (
        {"vocab_size": 97, "hidden_size": 32, "n_head": 4, "n_layer": 2},
        dict,
        {"hidden_size": 64, "n_embed": 32},
    ),
    "falcon": (FALCON, dict, {"hidden_size": None, "n_embed": 32}),
    "falcon, 7B of RefinedWeb": (FALCON, dict, REFINED_WEB | {"multi_query": True, "parallel_attn": True}),
    "falcon, 40B of RefinedWeb": (
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        dict,
        REFINED_WEB | {"parallel_attn": True, "n_head_kv": 2},
    ),
    "falcon, 1B of RefinedWeb": (
        FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        dict,
        REFINED_WEB,
    ),
    "stablelm": (
        {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "layer_norm_eps": 1e-3, "partial_rotary_factor": 0.5, "use_qkv_bias": True},
        dict,
        {"architectures": ["StableLMEpochForCausalLM"], "layer_norm_eps": None, "norm_eps": 1e-3, "rope_pct": 0.5}
        | {"partial_rotary_factor": None, "rope_parameters": None},
    ),
    "internlm3": (
        {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        | {"num_attention_heads": 4, "qkv_bias": True, "bias": True},
        dict,
        {"architectures": ["InternLM3ForCausalLM"], "attention_bias": None, "mlp_bias": None}
        | {"qkv_bias": True, "bias": True},
    ),
}


@pytest.mark.parametrize("kind", OLD_FORMS)
def test_older_files_and_configs_are_the_same_network(
    save_reference: Save, run_packed: Run, tmp_path: Path, kind: str
) -> None:
    """Masks among the weights; sizes and biases by the names that a class had before, or has beside others."""
    values, change, config = OLD_FORMS[kind]
    folder, reference = save_reference(model_type=kind.partition(",")[0], **values)
    ours = run_packed(load_network(rewrite(folder, tmp_path, change, **config)), [TEXT])[0]
    torch.testing.assert_close(ours, reference(torch.tensor([TEXT])).logits[0], rtol=1e-4, atol=1e-4)
