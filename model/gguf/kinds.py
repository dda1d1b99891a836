"""The types in which GGUF files store tensors: their numbers, their names, and how many bytes hold how many values.

Source: github.com/ggml-org/ggml, `enum ggml_type` in include/ggml.h and the blocks of src/ggml-common.h.
No torch; both processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of values is stored in blocks of `num_values`, each in `num_bytes`; both 0 where a type is not read."""

    name: str
    num_values: int = 0
    num_bytes: int = 0

    @property
    def is_read(self) -> bool:
        return self.num_values > 0

    @property
    def is_plain(self) -> bool:
        return self.num_values == 1


KINDS: Mapping[int, Kind] = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    9: Kind("Q8_1"),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    15: Kind("Q8_K"),
    16: Kind("IQ2_XXS"),
    17: Kind("IQ2_XS"),
    18: Kind("IQ3_XXS"),
    19: Kind("IQ1_S"),
    20: Kind("IQ4_NL", 32, 18),
    21: Kind("IQ3_S"),
    22: Kind("IQ2_S"),
    23: Kind("IQ4_XS", 256, 136),
    24: Kind("I8"),
    25: Kind("I16"),
    26: Kind("I32"),
    27: Kind("I64"),
    28: Kind("F64"),
    29: Kind("IQ1_M"),
    30: Kind("BF16", 1, 2),
    34: Kind("TQ1_0"),
    35: Kind("TQ2_0"),
    39: Kind("MXFP4"),
    40: Kind("NVFP4"),
}
READ = tuple(kind.name for kind in KINDS.values() if kind.is_read)


def kind_of(number: int) -> Kind:
    """That of a number in a file; one that nobody here has heard of is named by it."""
    return KINDS.get(number, Kind(f"type {number}"))
