"""Exports a causal LM to OpenVINO: convert_openvino.py FOLDER TARGET PRECISION, in OpenVINO's environment.

bf16: 16-bit weights (the CPU plugin computes in bf16 where the CPU has it). int8: 8-bit weights, a scale per channel;
the plugin quantizes activations as it runs. int4: the layers' weights in 4 bits, symmetric in groups of 32.
"""

import sys
from pathlib import Path

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

QUANTIZATIONS = {
    "int8": OVWeightQuantizationConfig(bits=8),
    "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0),
}


def main(source: str, target: str, precision: str) -> None:
    quantization = QUANTIZATIONS.get(precision)
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, load_in_8bit=False, quantization_config=quantization
    )
    if quantization is None:
        model.half()
    model.save_pretrained(target)
    (Path(target) / "tokenizer.json").write_text((Path(source) / "tokenizer.json").read_text())


main(*sys.argv[1:])
