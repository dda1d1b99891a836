"""How an encoder-decoder checkpoint wants to be decoded, and what a request makes of it: `SamplingParams`.

In rising order of weight: what the summarization and translation pipelines of `transformers` 4.57.6 assume (4 beams,
256 new tokens), what the checkpoint declares (`generation_config.json`, or `config.json` where there is none), what it
declares for the task (`task_specific_params`), what the request says. That is the order which the pipelines document;
their code lets the assumed `num_beams` and `max_new_tokens` win over declared ones, which is not followed here.
Lengths in checkpoints count the decoder's start token, ours count generated tokens. No torch; both processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.architectures.raw import RawConfig, read_json
from model.batch import BeamParams, SamplingParams
from model.declared_rules import NEUTRAL, bans, not_implemented, one_id
from model.errors import CheckpointError

ASSUMED_BEAMS = 4
ASSUMED_MAX_TOKENS = 256
UNSET_MAX_LENGTH = 20
"""The default of `transformers`, which old configs spell out without meaning it."""

CLASS_IDS: Mapping[str, Mapping[str, int]] = {
    "bart": {"decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 0, "forced_eos_token_id": 2},
    "marian": {"decoder_start_token_id": 58100, "eos_token_id": 0, "forced_eos_token_id": 0},
    "mbart": {"eos_token_id": 2, "bos_token_id": 0, "forced_eos_token_id": 2},
    "m2m_100": {"decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 0},
    "pegasus": {"decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1},
    "blenderbot": {
        "decoder_start_token_id": 1,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "forced_eos_token_id": 2,
        "encoder_no_repeat_ngram_size": 3,
    },
    "blenderbot-small": {"decoder_start_token_id": 1, "eos_token_id": 2, "bos_token_id": 1, "forced_eos_token_id": 2},
    "mvp": {"decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 0},
    "plbart": {"eos_token_id": 2, "bos_token_id": 0, "forced_eos_token_id": 2},
    "t5": {"eos_token_id": 1},
    "mt5": {"eos_token_id": 1},
    "umt5": {"decoder_start_token_id": 0, "eos_token_id": 1},
}
"""By `model_type`: what a `config.json` that leaves these keys out means to transformers."""
DECODER_ENDS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "vaultgemma"), (1,)),
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "ministral3", "apertus", "bloom", "ernie4_5", "exaone4", "gpt_neox"),
            *("granite", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "opt", "persimmon"),
            *("phi", "seed_oss", "ernie4_5_moe", "granitemoe", "mixtral"),
        ),
        (2,),
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "starcoder2"), (50256,)),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "olmoe"), (50279,)),
    **dict.fromkeys(("cohere", "cohere2"), (255001,)),
    **dict.fromkeys(("glm", "glm4"), (151329, 151336, 151338)),
    **dict.fromkeys(("arcee", "smollm3"), (128001,)),
    "cwm": (128001, 128008, 128009),
    "falcon": (11,),
    "jais2": (150024,),
    "nemotron": (3,),
    "phi3": (32000,),
    "stablelm": (0,),
}
"""Likewise the ends of a decoder's texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a request says about decoding; None leaves it to the checkpoint. Lengths count generated tokens."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    """Above 0: sampling, without beams."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    forced_bos_id: int | None = None
    """The target language's token, where the checkpoint is told the language so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """An encoder-decoder checkpoint's own way of decoding."""

    decoder_start_id: int
    eos_ids: tuple[int, ...]
    context_length: int
    declared: Mapping[str, Any] = field(default_factory=dict)
    """Generation parameters by their names in `transformers`, without those that are null."""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`task_specific_params`: "summarization", "translation_en_to_de", ..."""
    prefix: str = ""

    @property
    def decoder_prompt(self) -> list[int]:
        """What the target starts with."""
        return [self.decoder_start_id]

    def prefix_for(self, task: str | None = None) -> str:
        """What is put before a source text ("summarize: ")."""
        prefix = self.tasks.get(task or "", {}).get("prefix", self.prefix)
        return prefix if isinstance(prefix, str) else ""

    def sampling(self, task: str | None = None, choices: Choices | None = None) -> SamplingParams:
        """Raises ValueError, as advice to the caller, if the request's choices contradict each other."""
        choices = choices or Choices()
        values = {**self.declared, **self._task_values(task)}
        sampled = _is_sampled(values, choices)
        if sampled and (choices.num_beams or 1) > 1:
            raise ValueError(f"num_beams is {choices.num_beams}, which needs temperature 0; beams are not sampled")
        max_tokens = self._max_tokens(task, choices)
        min_tokens = choices.min_tokens
        if min_tokens is None:
            # What only a default asks for gives way to a shorter limit that was asked for.
            min_tokens = min(_min_tokens(values), max_tokens)
        if min_tokens > max_tokens:
            raise ValueError(f"min_tokens is {min_tokens:,}; max_tokens is {max_tokens:,}")
        suppressed, sequences = bans(values, self.eos_ids)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=_first(choices.temperature, values.get("temperature"), 1.0) if sampled else 0.0,
            # 50 is what `transformers` samples from when a checkpoint asks for sampling without saying more.
            top_k=_first(choices.top_k, values.get("top_k"), 0 if choices.temperature is not None else 50),
            top_p=_first(choices.top_p, values.get("top_p"), 1.0),
            min_p=_first(choices.min_p, values.get("min_p"), 0.0),
            repetition_penalty=_first(choices.repetition_penalty, values.get("repetition_penalty"), 1.0),
            no_repeat_ngram_size=_first(choices.no_repeat_ngram_size, values.get("no_repeat_ngram_size"), 0),
            encoder_no_repeat_ngram_size=_first(values.get("encoder_no_repeat_ngram_size"), 0),
            seed=choices.seed,
            stop_ids=self.eos_ids,
            forced_bos_id=_first(choices.forced_bos_id, values.get("forced_bos_token_id"), None),
            forced_eos_id=one_id(values.get("forced_eos_token_id")),
            suppressed_ids=suppressed,
            banned_sequences=sequences,
            beam=None if sampled else _beam(values, choices),
        )

    def _task_values(self, task: str | None) -> dict[str, Any]:
        values = self.tasks.get(task or "", {})
        return {key: value for key, value in values.items() if key != "prefix" and value is not None}

    def _max_tokens(self, task: str | None, choices: Choices) -> int:
        if choices.max_tokens is not None:
            return choices.max_tokens
        for values in (self._task_values(task), self.declared):
            if values.get("max_new_tokens") is not None:
                return min(int(values["max_new_tokens"]), self.context_length - 1)
            if values.get("max_length") not in (None, UNSET_MAX_LENGTH):
                return max(1, min(int(values["max_length"]), self.context_length) - 1)
        return min(ASSUMED_MAX_TOKENS, self.context_length - 1)


def read_generation_defaults(folder: Path, raw: RawConfig, context_length: int) -> GenerationDefaults:
    """Reads a checkpoint folder's `generation_config.json` beside its `config.json`.

    Raises: CheckpointError if the start of the target is nowhere said, or if a parameter is not implemented.
    """
    raw = RawConfig({**CLASS_IDS.get(raw.text("model_type", ""), {}), **raw.values}, raw.file)
    path = folder / "generation_config.json"
    file = RawConfig(read_json(path), path.name) if path.is_file() else raw
    declared = {key: value for key, value in file.values.items() if value is not None}
    for key, value in not_implemented(declared, NEUTRAL).items():
        raise CheckpointError(
            f"{file.file} asks for {key!r}: {value!r}, which is not implemented; take it out to decode without it",
            file=file.file,
        )
    start = _id_of("decoder_start_token_id", file, raw)
    start = _id_of("bos_token_id", file, raw) if start is None else start
    if start is None:
        raise CheckpointError(f"{file.file} has no 'decoder_start_token_id'", file=file.file)
    tasks = raw.section("task_specific_params").values if "task_specific_params" in raw else {}
    eos: Any = next((source.values["eos_token_id"] for source in (file, raw) if "eos_token_id" in source), [])
    return GenerationDefaults(
        decoder_start_id=start,
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        context_length=context_length,
        declared=declared,
        tasks={name: dict(values) for name, values in tasks.items() if isinstance(values, dict)},
        prefix=raw.text("prefix", "") if "prefix" in raw else "",
    )


def sequence_to_sequence_tasks(raw: RawConfig) -> tuple[str, ...]:
    """What an encoder-decoder checkpoint can be asked for, as far as its config tells."""
    kind = raw.text("model_type", "")
    names = list(raw.section("task_specific_params")) if "task_specific_params" in raw else []
    summarizes = any(name.startswith("summarization") for name in names)
    if kind in ("marian", "m2m_100") or (kind == "mbart" and not summarizes):
        return ("generate", "translate")
    if kind in ("blenderbot", "blenderbot-small"):
        return ("generate",)
    # Most mBARTs translate; one that was made to summarize says so, and need not be told languages.
    tasks = ["generate", "summarize"]
    if any(name.startswith("translation") for name in names):
        tasks.append("translate")
    if kind in ("t5", "mt5", "umt5"):
        tasks.append("answer")
    return tuple(tasks)


def _id_of(key: str, *sources: RawConfig) -> int | None:
    return next((source.whole(key) for source in sources if key in source), None)


def _is_sampled(values: Mapping[str, Any], choices: Choices) -> bool:
    if choices.temperature is not None:
        return choices.temperature > 0
    return bool(values.get("do_sample", False)) and (choices.num_beams or 1) == 1


def _min_tokens(values: Mapping[str, Any]) -> int:
    if values.get("min_new_tokens") is not None:
        return int(values["min_new_tokens"])
    return max(0, int(values.get("min_length") or 0) - 1)


def _beam(values: Mapping[str, Any], choices: Choices) -> BeamParams | None:
    num_beams = _first(choices.num_beams, values.get("num_beams"), ASSUMED_BEAMS)
    if num_beams == 1:
        return None
    return BeamParams(
        num_beams=num_beams,
        length_penalty=_first(choices.length_penalty, values.get("length_penalty"), 1.0),
        early_stopping=_first(choices.early_stopping, values.get("early_stopping"), False),
        renormalize_logits=values.get("renormalize_logits") is True,
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
