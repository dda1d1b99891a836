"""What the keys of a GGUF file say of a mixture of experts, as a `config.json` has it. No torch; both processes."""

from model.gguf.facts import Config, Facts

SOFTMAX = 1
"""Of llama.cpp's ways to make shares of a router's scores."""


def has_experts(facts: Facts) -> bool:
    return "expert_count" in facts and facts.keys.whole(facts.key("expert_count")) > 0


def expert_counts(facts: Facts, *, normalized: bool) -> Config:
    """`normalized`: whether llama.cpp divides the shares of a token's experts by their sum, for all of a family."""
    if "expert_weights_scale" in facts and facts.number("expert_weights_scale") not in (0.0, 1.0):
        raise facts.refused(f"{facts.key('expert_weights_scale')!r} is not supported")
    if facts.keys.whole(facts.key("expert_gating_func"), SOFTMAX) != SOFTMAX:
        raise facts.keys.wrong(facts.key("expert_gating_func"), f"{SOFTMAX} (softmax)")
    if facts.keys.flag(facts.key("expert_weights_norm"), normalized) != normalized:
        raise facts.keys.wrong(facts.key("expert_weights_norm"), f"{str(normalized).lower()}, as llama.cpp has it")
    return {
        "num_experts": facts.size("expert_count"),
        "num_experts_per_tok": facts.size("expert_used_count"),
        "norm_topk_prob": normalized,
    }


def expert_size(facts: Facts, config: Config) -> Config:
    """Where a file leaves it out, so much that all of a token's experts are as wide as the MLP would be."""
    usual = max(1, config["intermediate_size"] // config["num_experts_per_tok"])
    return {"moe_intermediate_size": facts.size("expert_feed_forward_length", usual)}
