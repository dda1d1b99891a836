"""Every architecture that can be served, by the name that `config.json` gives in `architectures`.

Pure data; both processes.
"""

from collections.abc import Mapping
from typing import Any

from model.architectures import llama
from model.architectures.mapping import Architecture

ARCHITECTURES: Mapping[str, Architecture[Any]] = {
    "LlamaForCausalLM": llama.LLAMA,
    "MistralForCausalLM": llama.MISTRAL,
    "Qwen2ForCausalLM": llama.QWEN2,
    "Qwen3ForCausalLM": llama.QWEN3,
}
