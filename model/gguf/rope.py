"""How a GGUF file stretches rotary positions, as `rope_scaling` in a `config.json` has it. No torch; both processes.

Source: github.com/ggml-org/llama.cpp, `src/llama-model.cpp` and gguf-py/gguf/constants.py.
"""

from model.gguf.facts import Config, Facts

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def scaling(facts: Facts, length: int, num_frequencies: int) -> Config | None:
    """Of a context of `length` and so many frequencies; None: they are as trained. Llama 3's way is stored as a factor
    for each frequency."""
    original = facts.size("rope.scaling.original_context_length", length)
    frequencies, long, short = (facts.factors(tensor, num_frequencies) for tensor in FACTORS)
    if frequencies is not None and any(factor != 1 for factor in frequencies):
        long = short = frequencies
        same: Config = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": length}
        return same | {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    if (long is None) != (short is None):
        there, missing = FACTORS[1:] if short is None else FACTORS[:0:-1]
        raise facts.refused(f"tensor {there!r} is there without {missing!r}")
    if long is not None:
        found: Config = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if "rope.scaling.attn_factor" in facts:
            found["attention_factor"] = facts.positive("rope.scaling.attn_factor")
        return found | {"original_max_position_embeddings": original}
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 1.0))
    kind = facts.keys.text(facts.key("rope.scaling.type"), "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        factor = facts.positive("rope.scaling.factor", 1.0)
        return _yarn(facts) | {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    raise facts.refused(f"rotary scaling {kind!r} is not supported")


def _yarn(facts: Facts) -> Config:
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier"):
        if key in facts and facts.number(key) not in (0.0, 1.0):
            raise facts.refused(f"{facts.key(key)!r} is not supported")
    keys = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    found = {ours: f"rope.scaling.{theirs}" for ours, theirs in keys.items()}
    return {ours: facts.number(key) for ours, key in found.items() if key in facts}
