"""The text part of models that see images, too: their vision towers are left out, and images refused.

Says how the tensors of such a file are called, old names and new; the part itself is a family's own. Knows no tensors.
"""

from dataclasses import replace

from model.architectures.llama import weights
from model.architectures.mapping import WeightMap
from model.config import DecoderConfig


def weights_beside_vision(config: DecoderConfig) -> WeightMap:
    plain = weights(config)
    return replace(
        plain,
        # Both the names of transformers 5 and those before it.
        renamed=(("model.language_model.", "model."), ("language_model.", "")),
        ignored=(*plain.ignored, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    )
