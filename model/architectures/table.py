"""Every architecture that can be served, by the name that `config.json` gives in `architectures`.

Pure data; both processes.
"""

from collections.abc import Mapping
from typing import Any

from model.architectures import (
    albert,
    bart,
    bert,
    deberta_v2,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    m2m100,
    marian,
    mbart,
    modernbert,
    mpnet,
    olmo2,
    pegasus,
    phi3,
    t5,
)
from model.architectures.headless import headless
from model.architectures.mapping import Architecture

DECODERS: Mapping[str, Architecture[Any]] = {
    **llama.ARCHITECTURES,
    **gemma.ARCHITECTURES,
    **phi3.ARCHITECTURES,
    **olmo2.ARCHITECTURES,
    **gpt2.ARCHITECTURES,
    **gpt_neox.ARCHITECTURES,
}

ARCHITECTURES: Mapping[str, Architecture[Any]] = {
    **DECODERS,
    **headless(DECODERS),
    **bert.ARCHITECTURES,
    **distilbert.ARCHITECTURES,
    **mpnet.ARCHITECTURES,
    **albert.ARCHITECTURES,
    **modernbert.ARCHITECTURES,
    **deberta_v2.ARCHITECTURES,
    **t5.ARCHITECTURES,
    **bart.ARCHITECTURES,
    **mbart.ARCHITECTURES,
    **marian.ARCHITECTURES,
    **m2m100.ARCHITECTURES,
    **pegasus.ARCHITECTURES,
}
