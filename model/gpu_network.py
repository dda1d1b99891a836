"""Puts the layers with fused kernels into a network that has been filled, if it is on a GPU and Triton is there.

The network computes the same afterwards. What has no kernel stays as it is. Runs in the worker process.
"""

from functools import partial

import torch
from torch import nn

from model.decoder import Decoder, DecoderAttention
from model.experts import SparseMLP
from model.gpu_experts import GroupedMLP, groups
from model.gpu_layers import ACTIVATION_NAMES, FusedGatedMLP, FusedHeads, FusedLayerNorm, FusedRMSNorm, triton_layers
from model.layers import GatedMLP, LayerNorm, RMSNorm
from model.one_row_layers import add_short_cuts


def fuse_layers(network: nn.Module) -> None:
    """Replaces what has a kernel; a network on another device, or without Triton, stays as it is."""
    if triton_layers is None or next(network.parameters()).device.type != "cuda":
        return
    convert(network)


def convert(network: nn.Module) -> None:
    """The replacing itself, on any device."""
    attentions = [module for module in network.modules() if isinstance(module, DecoderAttention)]
    if attentions:
        device = next(network.parameters()).device
        # One for all: layers run one after the other.
        arrived = torch.zeros(attentions[0].num_kv_heads, dtype=torch.int32, device=device)
        for attention in attentions:
            if _fuses(attention):
                attention.attend_heads = FusedHeads(attention, arrived)
    _group_experts(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                module.add_module(name, FusedRMSNorm(child))
            elif type(child) is LayerNorm:
                module.add_module(name, FusedLayerNorm(child))
            elif isinstance(child, GatedMLP) and child.activation in ACTIVATION_NAMES:
                module.add_module(name, FusedGatedMLP(child, ACTIVATION_NAMES[child.activation]))
    for module in network.modules():
        if isinstance(module, Decoder):
            add_short_cuts(module)


def _group_experts(network: nn.Module) -> None:
    """First of all, for what is done to MLPs is done to experts, too."""
    assert triton_layers is not None
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SparseMLP) and child.activation in ACTIVATION_NAMES and groups(child):
                gate = partial(triton_layers.gated, activation=ACTIVATION_NAMES[child.activation])
                module.add_module(name, GroupedMLP(child, gate))


def _fuses(attention: DecoderAttention) -> bool:
    """Whether the kernels do what this attention wants: norms of each head for itself, or none."""
    if attention.query_norm is None:
        return True
    plain = attention.per_head_norm and not attention.turned_norm
    return plain and isinstance(attention.query_norm, RMSNorm)
