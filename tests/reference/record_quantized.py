"""Records tiny Llama checkpoints as the packages that define the formats quantize them, with the logits that those or
`transformers` compute of the dequantized weights, into `quantized/` beside it: one safetensors file for each case, its
tensors and `logits` together, `config.json` in its metadata.

None of these packages is needed by the tests. To record again:

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
        compressed-tensors==0.20.0 bitsandbytes==0.50.2 datasets zstandard && \
    /tmp/venv/bin/pip install --no-deps autoawq==0.2.9 auto-gptq==0.7.1 && \
    /tmp/venv/bin/python tests/reference/record_quantized.py
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config

OUTPUT = Path(__file__).with_name("quantized")
IDS = [3, 17, 5, 44, 60, 12, 9, 31, 2, 58, 40, 7]
HIDDEN, INNER, GROUP = 32, 64, 16

Model = LlamaForCausalLM


def tiny(dtype: torch.dtype) -> Model:
    """Weights so large that each shows in the logits."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=1.2 * parameter.shape[1] ** -0.5)
    return model.to(dtype)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "proj" in name}


def logits(model: Model) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].contiguous()


def with_weights(model: Model, weights: dict[str, Tensor]) -> Model:
    """The same model in float32 (its rotary frequencies never rounded), with these weights in its projections."""
    wide = tiny(torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    for name, weight in weights.items():
        wide.get_submodule(name).weight.data = weight.float()
    return wide


def write(name: str, tensors: dict[str, Tensor], expected: Tensor, config: dict[str, Any]) -> None:
    OUTPUT.mkdir(exist_ok=True)
    plain = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(plain | {"logits": expected}, OUTPUT / f"{name}.safetensors", {"config.json": json.dumps(config)})


def record_saved(name: str, folder: Path, expected: Tensor) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(name, load_file(folder / "model.safetensors"), expected, config)


def compressed(name: str, form: str, **weights: Any) -> None:
    """Quantized by compressed-tensors, read again by transformers."""
    model = tiny(torch.float32)
    inputs = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights}
    if form in ("int-quantized", "float-quantized"):
        group["input_activations"] = inputs
    config = QuantizationConfig(
        config_groups={"group_0": group},
        ignore=["lm_head", "re:.*o_proj"],
        format=form,
        quantization_status="frozen",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        arguments = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if arguments is not None:
            fill_scales(module, arguments)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as root:
        model.save_pretrained(root)
        compressor.update_config(root)
        reading = CompressedTensorsConfig(run_compressed=False, dequantize=True)
        read = AutoModelForCausalLM.from_pretrained(root, quantization_config=reading, dtype=torch.float32)
        record_saved(name, Path(root), logits(read))


def fill_scales(module: nn.Module, arguments: Any) -> None:
    """Scales and zero points of the extreme values of each block."""
    weight = module.weight.data
    rows, columns = weight.shape
    if arguments.strategy == "tensor":
        blocks = weight.reshape(1, 1, -1)
    elif arguments.strategy == "channel":
        blocks = weight.reshape(rows, 1, -1)
    elif arguments.strategy == "group":
        blocks = weight.reshape(rows, -1, arguments.group_size)
    else:
        high, wide = arguments.block_structure
        blocks = weight.reshape(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(2)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)


def fp8_blocks(name: str) -> None:
    """As DeepSeek-V3 and Qwen3-FP8 are stored, in smaller blocks; read again by transformers."""
    model, block = tiny(torch.bfloat16), GROUP
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    for module in projections(model):
        weight = tensors[f"{module}.weight"].float()
        rows, columns = weight.shape[0] // block, weight.shape[1] // block
        blocks = weight.reshape(rows, block, columns, block)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[f"{module}.weight"] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale_inv"] = scale
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [block, block],
        },
    }
    config["dtype"] = "bfloat16"
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(root) / "model.safetensors", {"format": "pt"})
        reading = FineGrainedFP8Config(weight_block_size=(block, block), dequantize=True)
        read = AutoModelForCausalLM.from_pretrained(root, quantization_config=reading, dtype=torch.float32)
        record_saved(name, Path(root), logits(read))


def bits_and_bytes(name: str, **settings: Any) -> None:
    """Quantized, and made plain again, by bitsandbytes."""
    with tempfile.TemporaryDirectory() as root:
        tiny(torch.bfloat16).save_pretrained(Path(root) / "plain")
        config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **settings)
        model = AutoModelForCausalLM.from_pretrained(
            Path(root) / "plain", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(Path(root) / "quantized")
        weights = {module: bits_and_bytes_weight(projection) for module, projection in projections(model).items()}
        record_saved(name, Path(root) / "quantized", logits(with_weights(tiny(torch.bfloat16), weights)))


def bits_and_bytes_weight(module: nn.Module) -> Tensor:
    """In float32; by its plain torch operator, as the one for CPUs wants rows of whole blocks."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return F.int8_vectorwise_dequant(weight.data, weight.SCB)
    absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return _dequantize_4bit_compute(
        weight.data.flatten(), absmax, state.code, state.blocksize, state.shape, torch.float32
    )


def quantize_groups(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, G] of the extreme values of each group of inputs; scales are float16 values."""
    parts = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
    scales = ((high - low) / (2**bits - 1)).half().float()
    return scales, (-low / scales).round().clamp(1, 2**bits - 1)


def gptq(name: str, bits: int, *, desc_act: bool) -> None:
    """Packed, and multiplied again, by AutoGPTQ's module."""
    model = tiny(torch.float16)
    layers = {module: pack_gptq(projection, bits, desc_act) for module, projection in projections(model).items()}
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    weights = {}
    for module, layer in layers.items():
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{key}": value for key, value in layer.state_dict().items()}
        tensors[f"{module}.scales"] = tensors[f"{module}.scales"].half()
        weights[module] = layer.float()(torch.eye(layer.infeatures)).T
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": desc_act, "sym": False}
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    write(name, tensors, logits(with_weights(model, weights)), config | {"dtype": "float16"})


def pack_gptq(linear: nn.Linear, bits: int, desc_act: bool) -> nn.Module:
    groups = torch.arange(linear.in_features) // GROUP
    if desc_act:
        groups = groups[torch.randperm(len(groups))]
    wide = deepcopy(linear).float()
    layer = gptq_module().QuantLinear(bits, GROUP, linear.in_features, linear.out_features, False, 0)
    layer.autogptq_cuda_available = False
    scales, zeros = quantize_groups(wide.weight.data, bits, groups)
    quantized = ((wide.weight.data / scales[:, groups]).round() + zeros[:, groups]).clamp(0, 2**bits - 1)
    wide.weight.data = (quantized - zeros[:, groups]) * scales[:, groups]
    layer.pack(wide, scales, zeros, groups.int())
    return layer


def gptq_module() -> Any:
    """The one file that is needed; the package asks for an older transformers."""
    package = importlib.util.find_spec("auto_gptq")
    path = Path(package.origin).parent / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def awq(name: str) -> None:
    """Packed, and made plain again, by AutoAWQ."""
    model = tiny(torch.float16)
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    weights = {}
    for module, linear in projections(model).items():
        groups = torch.arange(linear.in_features) // GROUP
        scales, zeros = quantize_groups(linear.weight.data.float(), 4, groups)
        quantized = ((linear.weight.data / scales[:, groups]).round() + zeros[:, groups]).clamp(0, 15)
        linear.weight.data = ((quantized - zeros[:, groups]) * scales[:, groups]).half()
        layer = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.half(), zeros=zeros.T.int())
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{key}": value for key, value in layer.state_dict().items()}
        weights[module] = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    write(name, tensors, logits(with_weights(model, weights)), config | {"dtype": "float16"})


CASES: dict[str, Callable[[str], None]] = {
    "fp8-blocks": fp8_blocks,
    "compressed-fp8-tensor": lambda name: compressed(
        name, "float-quantized", num_bits=8, type="float", strategy="tensor"
    ),
    "compressed-fp8-channel": lambda name: compressed(
        name, "float-quantized", num_bits=8, type="float", strategy="channel"
    ),
    "compressed-fp8-block": lambda name: compressed(
        name, "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[8, 32]
    ),
    "compressed-int8-channel": lambda name: compressed(
        name, "int-quantized", num_bits=8, type="int", strategy="channel"
    ),
    "compressed-int8-tensor-zeros": lambda name: compressed(
        name, "naive-quantized", num_bits=8, type="int", strategy="tensor", symmetric=False
    ),
    "compressed-packed4-group": lambda name: compressed(
        name, "pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP
    ),
    "compressed-packed4-group-zeros": lambda name: compressed(
        name, "pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False
    ),
    "compressed-packed8-channel-zeros": lambda name: compressed(
        name, "pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "gptq-4": lambda name: gptq(name, 4, desc_act=False),
    "gptq-4-desc-act": lambda name: gptq(name, 4, desc_act=True),
    "gptq-8": lambda name: gptq(name, 8, desc_act=False),
    "gptq-2": lambda name: gptq(name, 2, desc_act=False),
    "awq": awq,
    "bitsandbytes-int8": lambda name: bits_and_bytes(name, load_in_8bit=True),
    "bitsandbytes-nf4": lambda name: bits_and_bytes(name, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-fp4": lambda name: bits_and_bytes(name, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes-nf4-nested": lambda name: bits_and_bytes(
        name, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}


if __name__ == "__main__":
    for case, record in CASES.items():
        record(case)
