"""Keys and values in 8 bits: more of them for the same memory, nearly the same answers, and who does not get them."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from model.errors import CheckpointError
from model.ops import library
from service.engine.loading import load_lane
from service.engine.protocol import Loaded, ModelSpec, WorkerConfig
from tests.service.engine import lanes

SHIPPED = Path(__file__).parents[3] / "checkpoints" / "slimpajama-tiny-lm"
PROMPT = list(range(40, 120))
BYTES = 8 << 20
SIZES: dict[str, Any] = {"hidden_size": 64, "vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 2}

needs_operators = pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")


def loaded(folder: Path, *, block_size: int = 16, **wanted: Any) -> Loaded:
    spec = ModelSpec(key="m@1", folder=str(folder), kv_cache_bytes=BYTES, **wanted)
    config = WorkerConfig(models=[spec], block_size=block_size)
    return load_lane(spec, config, lambda done, total: None, lambda: None).loaded


@needs_operators
def test_the_same_memory_holds_nearly_twice_as_many_tokens() -> None:
    plain, narrow = (loaded(SHIPPED, dtype="bfloat16", kv_cache_dtype=dtype) for dtype in ("auto", "int8"))
    assert (plain.kv_cache_dtype, narrow.kv_cache_dtype) == ("bfloat16", "int8")
    assert 1.7 < narrow.num_blocks / plain.num_blocks < 2
    assert narrow.kv_cache_bytes <= BYTES


@needs_operators
def test_what_is_generated_begins_the_same_and_is_the_same_each_time() -> None:
    plain, narrow, again = (
        lanes.generate(PROMPT, folder=str(SHIPPED), dtype="bfloat16", kv_cache_dtype=dtype)
        for dtype in ("auto", "int8", "int8")
    )
    assert narrow[:8] == plain[:8]
    assert narrow == again


def saved(folder: Path, model: transformers.PreTrainedModel) -> Path:
    """With the shipped language model's tokenizer: what its words mean does not matter here."""
    model.bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text((SHIPPED / "tokenizer.json").read_text())
    return folder


@needs_operators
@pytest.mark.parametrize(
    "model",
    [
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=32, num_key_value_heads=1)),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, head_dim=24)),
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=64, d_kv=32, vocab_size=101, num_heads=2, decoder_start_token_id=0)
        ),
    ],
    ids=["softcaps", "heads of no vector's size", "biases of the scores"],
)
def test_networks_whose_attention_does_not_read_8_bits_keep_16(
    model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    assert loaded(saved(tmp_path, model), kv_cache_dtype="int8").kv_cache_dtype == "bfloat16"


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 16), ("float16", 16), ("bfloat16", 8)])
def test_8_bits_that_nobody_reads_are_refused(dtype: str, block_size: int) -> None:
    with pytest.raises(CheckpointError, match="kv_cache_dtype int8 is not to be had here: it needs a CPU, dtype bf"):
        loaded(SHIPPED, dtype=dtype, kv_cache_dtype="int8", block_size=block_size)
