"""Every Triton kernel compiles for a Hopper GPU, without one being there: what the interpreter lets pass may not."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.attention.interface import AttentionRules, PagedLayout

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from model import triton_early, triton_layers, triton_one_row
from model.attention import triton_one_row as one_row_attention
from model.attention.triton_paged import triton_paged
from model.fp8_linear import DTYPE, LARGEST, LEAST_SCALE
from model.triton_search import triton_search

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches compile instead; the names of the kernels that did."""
    names: list[str] = []

    def launch(
        self: Any,
        *arguments: Any,
        grid: Any,
        warmup: bool,
        num_warps: int = 4,
        num_stages: int = 3,
        maxnreg: int | None = None,
        launch_pdl: bool = False,
        **named: Any,
    ) -> None:
        given = dict(zip(self.arg_names, arguments, strict=False)) | named
        fixed = {name for name, parameter in zip(self.arg_names, self.params, strict=True) if parameter.is_constexpr}
        fixed |= {name for name, value in given.items() if value is None}
        signature = {name: "constexpr" if name in fixed else type_of(given[name]) for name in self.arg_names}
        constants = {name: given[name] for name in fixed}
        source = ASTSource(fn=self, signature=signature, constexprs=constants)
        options = {
            "num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "launch_pdl": launch_pdl,
        }  # fmt: skip
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= 227 * 1024
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(triton_early, "is_hopper", lambda device: True)
    return names


@pytest.fixture(params=[False, True], ids=["in turn", "early start"])
def early(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether kernels begin before the one before them has ended."""
    found: bool = request.param
    for module in (triton_one_row, one_row_attention):
        monkeypatch.setattr(module, "early_start", lambda device: {"launch_pdl": True} if found else {})
    return found


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


KERNELS: dict[str, Callable[[], object]] = {
    "add and norm": lambda: triton_layers.add_rms_norm(bfloat16(2, 4096), bfloat16(2, 4096), bfloat16(4096), 1e-5, 0.0),
    "norm": lambda: triton_layers.add_rms_norm(bfloat16(2, 1024), None, bfloat16(1024), 1e-5, 1.0),
    "silu": lambda: triton_layers.gated(bfloat16(2, 2 * 14336), "silu"),
    "gelu": lambda: triton_layers.gated(bfloat16(2, 2 * 1000), "gelu"),
    "gelu_tanh": lambda: triton_layers.gated(bfloat16(2, 2 * 1000), "gelu_tanh"),
    "turn": lambda: triton_layers.turn_heads(bfloat16(2, 40, 128), (bfloat16(2, 1, 128),) * 2, None, 32),
    "turn in part": lambda: triton_layers.turn_heads(bfloat16(2, 12, 80), (bfloat16(2, 1, 32),) * 2, None, 8),
    "norm and turn": lambda: triton_layers.turn_heads(
        bfloat16(2, 24, 128), (bfloat16(2, 1, 128),) * 2, (bfloat16(128), bfloat16(128), 1e-6, 0.0), 16
    ),
    "norm alone": lambda: triton_layers.turn_heads(
        bfloat16(2, 24, 128), None, (bfloat16(128), bfloat16(128), 1e-6, 0.0), 16
    ),
    "norm, turn and store": lambda: triton_layers.turn_and_store(
        bfloat16(2, 32, 128),
        (bfloat16(2, 1, 128),) * 2,
        (bfloat16(128), bfloat16(128), 1e-6, 0.0),
        16,
        bfloat16(9, 16, 8, 128),
        bfloat16(9, 16, 8, 128),
        torch.zeros(2).long(),
    ),
    "store": lambda: triton_layers.store(
        bfloat16(2, 8, 128),
        bfloat16(2, 8, 128),
        bfloat16(9, 16, 8, 128),
        bfloat16(9, 16, 8, 128),
        torch.zeros(2).long(),
    ),
    "quantize": lambda: triton_layers.quantize_rows(bfloat16(2, 14336), DTYPE, LARGEST, LEAST_SCALE),
    "search": lambda: triton_search(
        torch.zeros(2, 151936),
        torch.zeros(2).double(),
        (torch.zeros(2).long(), torch.zeros(2).double(), torch.zeros(2).double()),
        torch.zeros(2).long(),
        torch.zeros(2).bool(),
    ),
}


def layout(queries: int) -> PagedLayout:
    return PagedLayout(
        query_starts=torch.tensor([0, queries], dtype=torch.int32),
        context_lens=torch.tensor([2000], dtype=torch.int32),
        block_tables=torch.zeros((1, 125), dtype=torch.int32),
        slots=torch.zeros(queries, dtype=torch.int64),
        max_query_len=queries,
        max_context_len=2000,
    )


ONE_ROW: dict[str, Callable[[], object]] = {
    "norm and project": lambda: triton_one_row.norm_project(
        bfloat16(1, 4096), bfloat16(1, 4096), (bfloat16(4096), 1e-5, 0.0), bfloat16(6144, 4096), None
    ),
    "norm, project and gate": lambda: triton_one_row.norm_project(
        bfloat16(1, 1024), bfloat16(1, 1024), (bfloat16(1024), 1e-5, 0.0), bfloat16(6144, 1024), bfloat16(6144), "silu"
    ),
    "project": lambda: triton_one_row.project(bfloat16(1, 14336), bfloat16(4096, 14336), bfloat16(4096)),
    "attention": lambda: attend_one_row(128, bfloat16(128), AttentionRules(scale=0.1)),
    "attention of wide heads": lambda: attend_one_row(256, bfloat16(256), AttentionRules(scale=0.1)),
    "attention in a window": lambda: attend_one_row(80, None, AttentionRules(scale=0.1, window=512, softcap=30.0)),
}


def attend_one_row(size: int, gain: torch.Tensor | None, rules: AttentionRules) -> None:
    cache = bfloat16(9, 16, 8, size)
    norm = None if gain is None else (gain, gain, 1e-6, 0.0)
    rotation = bfloat16(1, 1, size), bfloat16(1, 1, size)
    arrived = torch.zeros(8, dtype=torch.int32)
    one_row_attention.attend_one_row(bfloat16(1, 32, size), rotation, norm, cache, cache, layout(1), rules, arrived)


@pytest.mark.parametrize("kernel", ONE_ROW.values(), ids=ONE_ROW.keys())
@pytest.mark.usefixtures("early")
def test_a_kernel_of_one_row_compiles_for_hopper(kernel: Callable[[], object], compiled: list[str]) -> None:
    kernel()
    assert len(compiled) == 1


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_a_kernel_compiles_for_hopper(kernel: Callable[[], object], compiled: list[str]) -> None:
    kernel()
    assert len(compiled) == 1


RULES = {
    "plain": AttentionRules(scale=0.1),
    "whole": AttentionRules(scale=0.1, causal=False),
    "window and softcap": AttentionRules(scale=0.1, window=512, softcap=30.0),
    "alibi": AttentionRules(scale=0.1, alibi_slopes=torch.ones(32)),
    "relative": AttentionRules(scale=0.1, relative_bias=torch.ones(32, 257)),
}


@pytest.mark.parametrize("queries", [1, 100], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_size", [64, 128, 80, 192, 256])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_attention_compiles_for_hopper(
    rules: AttentionRules, head_size: int, queries: int, compiled: list[str]
) -> None:
    cache = bfloat16(3, 16, 8, head_size)
    triton_paged(bfloat16(queries, 32, head_size), cache, cache, layout(queries), rules)
    assert compiled == (["_kernel", "_combine"] if queries == 1 else ["_kernel"])
