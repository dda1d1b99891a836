"""Runs llama.cpp's own converter on a checkpoint whose tokenizer it does not know: a word per id, no merges.

Run in the environment of llama.cpp, with its source tree on the path: convert_gguf.py FOLDER --outfile F --outtype T.
T may be q4_0, too, which that converter does not write: matrices of the layers in Q4_0, the vocabulary's in Q8_0.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import conversion.base as base
import gguf


def _set_words(model: base.TextModel) -> None:
    """The vocabulary as byte-level tokens, which is what text comes back from; one merge, since none is refused."""
    words = sorted(json.loads((Path(sys.argv[1]) / "tokenizer.json").read_text())["model"]["vocab"].items(), key=_id)
    writer = model.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word.replace(" ", "Ġ") for word, _ in words])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _quantize_layers(_model: base.ModelBase, _name: str, new_name: str, _layer: int | None, n_dims: int) -> Any:
    is_matrix = new_name.startswith("blk.") and new_name.endswith(".weight") and n_dims == 2
    return gguf.GGMLQuantizationType.Q4_0 if is_matrix else False


def _id(entry: tuple[str, int]) -> int:
    return entry[1]


def main() -> None:
    if json.loads((Path(sys.argv[1]) / "tokenizer.json").read_text())["model"]["type"] == "WordLevel":
        from conversion.llama import LlamaModel
        from conversion.qwen import Qwen2Model

        LlamaModel.set_vocab = Qwen2Model.set_vocab = _set_words
    if sys.argv[-1] == "q4_0":
        base.ModelBase.tensor_force_quant = _quantize_layers
        sys.argv[-1] = "q8_0"
    script = next(str(Path(entry) / "convert_hf_to_gguf.py") for entry in sys.path if _has_script(entry))
    runpy.run_path(script, run_name="__main__")


def _has_script(entry: str) -> bool:
    return (Path(entry) / "convert_hf_to_gguf.py").exists()


main()
