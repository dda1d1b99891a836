"""The formats in which weights are stored quantized: which stored names make up a weight, and how they become it.

Each method has a class; `format_of` picks it. Which modules are quantized, the stored names say, not `config.json`.
Knows no architecture. Runs in the worker process.

Legend: N outputs, K inputs of a weight [N, K].
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from model.quantized.bitsandbytes import BitsAndBytesFormat
from model.quantized.compressed_tensors import CompressedTensorsFormat
from model.quantized.config import Awq, BitsAndBytes, CompressedTensors, Fp8, Gptq, Quantization
from model.quantized.fp8 import Fp8Format
from model.quantized.grids import Shape
from model.quantized.integer_words import AwqFormat, GptqFormat
from model.quantized.parts import Parts

UNUSED = (
    *(f"{kind}_{what}" for kind in ("input", "output") for what in ("scale", "zero_point", "global_scale")),
    *(f"{kind}_{what}" for kind in "qkv" for what in ("scale", "zero_point")),
    *("activation_scale", "kv_scale", "weight_format"),
)
"""Names after a module's that have no use here: what inputs, queries, keys and values would be quantized by, which are
not; and the layout of LLM.int8() in memory."""


class Format(Protocol):
    """How one method stores a weight. The parts' names follow the module's, after a dot."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    def shape(self, parts: Parts) -> Shape:
        """[N, K], once all parts have been seen to be there and to have the types and shapes that belong to it.

        Raises: CheckpointError, naming the file and the tensor.
        """

    def weight(self, parts: Parts) -> Tensor:
        """The weight itself, in float32; its parts are read for it."""


FORMATS: Mapping[type, Callable[[Any], Format]] = {
    Awq: AwqFormat,
    BitsAndBytes: lambda _: BitsAndBytesFormat(),
    CompressedTensors: CompressedTensorsFormat,
    Fp8: Fp8Format,
    Gptq: GptqFormat,
}


def format_of(quantization: Quantization) -> Format:
    return FORMATS[type(quantization)](quantization)
