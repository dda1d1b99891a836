"""Exports a causal LM to OpenVINO: convert_openvino.py FOLDER TARGET PRECISION, in OpenVINO's environment.

bf16: 16-bit weights (the CPU plugin computes in bf16 where the CPU has it). int8: 8-bit weights, a scale per channel;
the plugin quantizes activations as it runs.
"""

import sys
from pathlib import Path

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def main(source: str, target: str, precision: str) -> None:
    quantization = OVWeightQuantizationConfig(bits=8) if precision == "int8" else None
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, load_in_8bit=False, quantization_config=quantization
    )
    if precision != "int8":
        model.half()
    model.save_pretrained(target)
    (Path(target) / "tokenizer.json").write_text((Path(source) / "tokenizer.json").read_text())


main(*sys.argv[1:])
