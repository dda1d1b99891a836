"""What the tensors of an adapter's file are, by the names that PEFT gives them.

    base_model.model.<module>.lora_A.weight      [r, in]     base_model.model.<module>.lora_B.weight      [out, r]
    base_model.model.<module>.lora_embedding_A   [r, V]      base_model.model.<module>.lora_embedding_B   [E, r]
    base_model.model.<module>.lora_magnitude_vector  [out]   base_model.model.<module>.lora_B.bias        [out]
    base_model.model.<module>.weight, .bias: saved whole (`modules_to_save`, embeddings, trained biases)

Names that other releases wrote (the adapter's own name, `modules_to_save`, `base_layer` in them) mean the same. No
torch; both processes. Source: `get_peft_model_state_dict` (`utils/save_and_load.py`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "base_model.model."
ADDED = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<attribute>weight|bias))?"
)
COPY = ".modules_to_save."
ORIGINAL = ".original_module."
WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """`parameter` is what it changes, by its name in the base's network; `part` is None for one saved whole."""

    module: str
    parameter: str
    part: str | None = None


def adapter_tensors(names: Iterable[str]) -> dict[str, AdapterTensor]:
    """What each of a file's tensors is.

    Where PEFT also writes what a saved module was before (`original_module`), or its new weights twice, one of them
    counts.
    """
    found = {name: _adapter_tensor(name) for name in names if ORIGINAL not in name}
    plain = {tensor.parameter for name, tensor in found.items() if tensor.part is None and COPY not in name}
    return {name: tensor for name, tensor in found.items() if COPY not in name or tensor.parameter not in plain}


def _adapter_tensor(name: str) -> AdapterTensor:
    name = name.removeprefix(PREFIX)
    if added := ADDED.fullmatch(name):
        attribute = added["attribute"] or "weight"
        return AdapterTensor(added["module"], f"{added['module']}.{attribute}", added["part"])
    name = WRAPPED.sub("", name)
    return AdapterTensor(name.rpartition(".")[0], name)
