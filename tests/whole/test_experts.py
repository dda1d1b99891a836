"""A mixture of experts served as its users have it: the tokens of transformers, and the same alone and in a crowd."""

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.whole.conftest import ROOT, MakeService, Service

VOCABULARY = ROOT / "checkpoints/slimpajama-tiny-lm"
PROMPTS = [[17, 900, 45, 3000, 8], [5, 4000], list(range(100, 140)), [77, 1234, 2345]]
LENGTH = 12


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A tiny checkpoint with weights so large that its tokens are no ties."""
    torch.manual_seed(6)
    config = Qwen3MoeConfig(
        vocab_size=6144, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
        norm_topk_prob=True, mlp_only_layers=[1], max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=0, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).bfloat16().float().eval()
    folder = tmp_path / "moe"
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(VOCABULARY / name, folder)
    return folder, model.float()


async def tokens(service: Service, prompt: list[int]) -> list[int]:
    body = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = await service.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: list[int] = response.json()["choices"][0]["token_ids"]
    return found


@pytest.mark.slow
async def test_its_tokens_are_those_of_transformers(
    make_service: MakeService, saved: tuple[Path, PreTrainedModel]
) -> None:
    folder, reference = saved
    service = await make_service("--dtype", "float32", "--speculative-tokens", "4", models=(str(folder),))
    found = await asyncio.gather(*(tokens(service, prompt) for prompt in PROMPTS))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        ones = torch.ones(1, len(prompt))
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([prompt]), attention_mask=ones, do_sample=False, max_new_tokens=LENGTH, eos_token_id=None
            )
        assert ids == expected[0, len(prompt) :].tolist()


@pytest.mark.slow
async def test_a_crowd_changes_no_token(make_service: MakeService, saved: tuple[Path, PreTrainedModel]) -> None:
    service = await make_service("--deterministic", "--quantization", "int8", models=(str(saved[0]),))
    alone = [await tokens(service, prompt) for prompt in PROMPTS]
    crowd = await asyncio.gather(*(tokens(service, prompt) for prompt in PROMPTS * 4))
    assert crowd == alone * 4
    assert len({tuple(ids) for ids in alone}) == len(PROMPTS)
