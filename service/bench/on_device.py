"""Networks of well-known shapes made on the device, at random, and lanes of the engine around them without a service.

For benchmarks of the device alone: no files, no second process, no HTTP. Needs torch; run as a tool only.
"""

from typing import Any

import torch
from torch import nn

from model.architectures.raw import RawConfig
from model.architectures.table import ARCHITECTURES
from model.attention.backend import backend_for
from model.block_manager import BlockManager
from model.compiled_decoder import join_layers
from model.compiled_layers import Quantization, compile_layers
from model.config import DecoderConfig, EncoderConfig
from model.decoder import Decoder
from model.embedding_config import EmbeddingConfig, Normalize, Pooling
from model.encode_network import EncodeNetwork
from model.encoder import Encoder
from model.encoder_runner import EncoderRunner
from model.gpu_network import fuse_layers
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache
from model.runner import Runner
from model.sentence_transformer import SentenceModules
from service.engine.generation_lane import GenerationLane
from service.engine.protocol import Loaded
from service.engine.scheduler import Scheduler, SchedulerLimits

DECODERS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "max_position_embeddings": 4096, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": True,
    },
    "toy-llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 512,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "toy-qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,
        "vocab_size": 512, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": True,
    },
}  # fmt: skip

ENCODERS: dict[str, dict[str, Any]] = {
    "bert-base": {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512,
    },
    "toy-bert": {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 64,
    },
}  # fmt: skip


def fill_at_random(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Every parameter drawn there: matrices small, norms near one, so that nothing overflows."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(network.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        if parameter.dim() == 1 and "norm" in name:
            values += 1.0
        owner = network.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(values, requires_grad=False))


def make_decoder(shape: str, device: torch.device, dtype: torch.dtype, quantization: Quantization = "none") -> Decoder:
    raw = RawConfig(DECODERS[shape])
    architecture = ARCHITECTURES[raw.texts("architectures")[0]]
    config = architecture.configure(raw, None)
    assert isinstance(config, DecoderConfig)
    network = Decoder(config, device)
    fill_at_random(network, device, dtype)
    if config.tied_embeddings:
        network.output.weight = network.embedding.weight
    compile_layers(network, quantization, wide=network.output)
    join_layers(network)
    fuse_layers(network)
    return network


def make_lane(
    network: Decoder, device: torch.device, dtype: torch.dtype, *, num_blocks: int, block_size: int, **limits: int
) -> GenerationLane:
    config = network.config
    cache = KVCache(
        config.num_layers, num_blocks, block_size=block_size, num_kv_heads=config.num_kv_heads,
        head_size=config.head_size, dtype=dtype, device=device,
    )  # fmt: skip
    grammars = GrammarCompiler("{}", config.vocab_size, [])  # nobody asks it for one
    runner = Runner(network, config, cache, backend_for(device), grammars=grammars)
    bounds = SchedulerLimits(
        max_batch_tokens=limits["max_batch_tokens"],
        max_sequences=limits["max_sequences"],
        max_model_len=config.context_length,
    )
    scheduler = Scheduler(BlockManager(num_blocks, block_size), bounds)
    loaded = Loaded(model="bench@1", dtype=str(dtype), device=str(device), weight_bytes=0)
    return GenerationLane(loaded, scheduler, runner, grammars, look_ahead=device.type == "cuda")


def make_embedder(shape: str, device: torch.device, dtype: torch.dtype) -> EncoderRunner:
    raw = RawConfig(ENCODERS[shape])
    config = ARCHITECTURES[raw.texts("architectures")[0]].configure(raw, None)
    assert isinstance(config, EncoderConfig)
    network = Encoder(config, device)
    fill_at_random(network, device, dtype)
    modules = SentenceModules(EmbeddingConfig(steps=(Pooling(modes=("mean",)), Normalize())), device)
    encode_network = EncodeNetwork(network, reading=modules)
    fuse_layers(encode_network)
    return EncoderRunner(encode_network, backend_for(device), device)
