"""Every architecture that can be served, by the name that `config.json` gives in `architectures`.

Pure data; both processes.
"""

from collections.abc import Mapping
from typing import Any

from model.architectures import (
    albert,
    bart,
    bert,
    blenderbot,
    bloom,
    cohere,
    deberta,
    deberta_v2,
    distilbert,
    electra,
    ernie_moe,
    eurobert,
    exaone4,
    falcon,
    gemma,
    glm,
    glm_moe,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gptj,
    granite,
    granite_moe,
    gte,
    hunyuan,
    jina_embeddings_v3,
    llama,
    llama_kin,
    m2m100,
    marian,
    mbart,
    megatron_bert,
    mistral3,
    mixtral,
    modernbert,
    mpnet,
    mpt,
    nemotron,
    nomic_bert,
    olmo,
    olmoe,
    opt,
    pegasus,
    persimmon,
    phi,
    phi3,
    qwen_moe,
    rembert,
    roberta_prelayernorm,
    smollm3,
    stablelm,
    starcoder2,
    t5,
)
from model.architectures.headless import bare, headless
from model.architectures.mapping import Architecture

DECODERS: Mapping[str, Architecture[Any]] = {
    **llama.ARCHITECTURES,
    **llama_kin.ARCHITECTURES,
    **mistral3.ARCHITECTURES,
    **gemma.ARCHITECTURES,
    **phi.ARCHITECTURES,
    **phi3.ARCHITECTURES,
    **olmo.ARCHITECTURES,
    **smollm3.ARCHITECTURES,
    **granite.ARCHITECTURES,
    **starcoder2.ARCHITECTURES,
    **stablelm.ARCHITECTURES,
    **cohere.ARCHITECTURES,
    **glm.ARCHITECTURES,
    **exaone4.ARCHITECTURES,
    **nemotron.ARCHITECTURES,
    **hunyuan.ARCHITECTURES,
    **persimmon.ARCHITECTURES,
    **qwen_moe.ARCHITECTURES,
    **mixtral.ARCHITECTURES,
    **olmoe.ARCHITECTURES,
    **glm_moe.ARCHITECTURES,
    **granite_moe.ARCHITECTURES,
    **ernie_moe.ARCHITECTURES,
    **gpt2.ARCHITECTURES,
    **gpt_bigcode.ARCHITECTURES,
    **gpt_neo.ARCHITECTURES,
    **gpt_neox.ARCHITECTURES,
    **gptj.ARCHITECTURES,
    **falcon.ARCHITECTURES,
    **opt.ARCHITECTURES,
    **bloom.ARCHITECTURES,
    **mpt.ARCHITECTURES,
}

SEQUENCE_TO_SEQUENCE: Mapping[str, Architecture[Any]] = {
    **t5.ARCHITECTURES,
    **bart.ARCHITECTURES,
    **mbart.ARCHITECTURES,
    **marian.ARCHITECTURES,
    **m2m100.ARCHITECTURES,
    **pegasus.ARCHITECTURES,
    **blenderbot.ARCHITECTURES,
}

ARCHITECTURES: Mapping[str, Architecture[Any]] = {
    **DECODERS,
    **headless(DECODERS),
    **bert.ARCHITECTURES,
    **distilbert.ARCHITECTURES,
    **mpnet.ARCHITECTURES,
    **albert.ARCHITECTURES,
    **modernbert.ARCHITECTURES,
    **deberta.ARCHITECTURES,
    **deberta_v2.ARCHITECTURES,
    **electra.ARCHITECTURES,
    **eurobert.ARCHITECTURES,
    **megatron_bert.ARCHITECTURES,
    **rembert.ARCHITECTURES,
    **roberta_prelayernorm.ARCHITECTURES,
    **nomic_bert.ARCHITECTURES,
    **gte.ARCHITECTURES,
    **jina_embeddings_v3.ARCHITECTURES,
    **t5.ENCODERS,
    **SEQUENCE_TO_SEQUENCE,
    **bare(SEQUENCE_TO_SEQUENCE),
}

MASKED_LMS: Mapping[str, Architecture[Any]] = {
    **bert.MASKED_LMS,
    **distilbert.MASKED_LMS,
    **mpnet.MASKED_LMS,
    **modernbert.MASKED_LMS,
    **megatron_bert.MASKED_LMS,
    **roberta_prelayernorm.MASKED_LMS,
    **nomic_bert.MASKED_LMS,
    **eurobert.MASKED_LMS,
    **gte.MASKED_LMS,
    **jina_embeddings_v3.MASKED_LMS,
}
"""The encoders whose head over the vocabulary can be read, by the same names: what sparse encoders are made of."""

BARE = "Model"
WITH_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel", BARE)
"""Endings of class names, those first which are meant where a checkpoint names none."""
CLASSIFIERS = ("sequence_classification", "token_classification", "question_answering", "cross_encoder")


def usual_classes(model_type: str) -> tuple[str, ...]:
    """What a `config.json` without `architectures` means: the language model of its type, or else the bare encoder."""
    plain = model_type.replace("-", "").replace("_", "")
    known = {name.lower(): name for name in ARCHITECTURES}
    wanted = (plain + ending.lower() for ending in WITH_HEADS if plain)
    return tuple(known[name] for name in wanted if name in known)


def masked_lm_class(name: str) -> str:
    """The class with a masked language model's head, of the same network."""
    return f"{name.partition('For')[0].removesuffix(BARE)}ForMaskedLM"


def bare_class(name: str) -> str:
    """The class without a classifier's head, where there is one: what sentence-transformers pools the states of."""
    prefix, _, _ = name.partition("For")
    classifies = ARCHITECTURES[name].head in CLASSIFIERS
    return prefix + BARE if classifies and prefix + BARE in ARCHITECTURES else name
