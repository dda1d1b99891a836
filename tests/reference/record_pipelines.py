"""Records what the pipelines of `transformers` 4.57.6 answer on the tiny checkpoints, into `pipelines.json` beside it.

Version 5 took the question-answering, summarization and translation pipelines away, so that they cannot be asked in
the tests. To record again:

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install transformers==4.57.6 torch==2.13.0 && \
    /tmp/venv/bin/python tests/reference/record_pipelines.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_checkpoints import CHECKPOINTS, make

OUTPUT = Path(__file__).with_name("pipelines.json")
ARTICLE = (
    "The first city on the river was built in 1889 by people from the north. They lived in small houses and made a "
    "school, and a company from London found water in the mountain. When the war was lost, the king died and the queen "
    "wrote a book about it. Peace was made in 1912, and the great school of music was called the best in the country. "
    "In 2004 a film about the city won."
)
TEXTS = ["The movie was great, the actor was not.", "a sad story", "Who won the game in Paris? We lost!", "xyzzy 42"]

ANSWERS: list[dict[str, Any]] = [
    {"question": "Who wrote a book?", "context": ARTICLE},
    {"question": "When was the city built?", "context": ARTICLE, "top_k": 4},
    {"question": "When was the city built?", "context": ARTICLE, "max_seq_len": 48, "doc_stride": 16, "top_k": 3},
    {"question": "What won?", "context": ARTICLE, "max_seq_len": 40, "doc_stride": 10, "max_answer_len": 3},
    {"question": "Where?", "context": "The king lived in a house-boat, on the river.", "top_k": 3},
    {"question": "Where?", "context": "The king lived in a house-boat.", "align_to_words": False, "top_k": 3},
    {"question": "Who is it?", "context": "It is not the queen.", "handle_impossible_answer": True, "top_k": 3},
    {"question": "Who died?", "context": ARTICLE, "handle_impossible_answer": True, "max_seq_len": 48, "doc_stride": 8},
    {"question": "why " * 80, "context": "The war was lost.", "max_question_len": 8},
]
SUMMARIES: list[tuple[str, dict[str, Any]]] = [
    ("bart", {}),
    ("bart", {"num_beams": 1, "max_new_tokens": 20}),
    ("bart", {"max_new_tokens": 16, "min_length": 10}),
    ("bart", {"num_beams": 3, "length_penalty": -1.0, "max_new_tokens": 20, "early_stopping": True}),
    ("bart", {"max_new_tokens": 9, "repetition_penalty": 1.5}),
    ("bart-declared", {}),
    ("bart-declared", {"num_beams": 1}),
    ("bart-declared", {"num_beams": 2, "max_length": 30, "min_length": 4}),
    ("t5", {"max_new_tokens": 30}),
    ("t5", {"max_new_tokens": 24, "num_beams": 2}),
]
TRANSLATIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("t5", "translation_en_to_de", {"max_new_tokens": 20}),
    ("t5", "translation_en_to_fr", {"max_new_tokens": 20}),
    ("nllb", "translation", {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}),
    ("nllb", "translation", {"src_lang": "deu_Latn", "tgt_lang": "zho_Hans", "num_beams": 1}),
]
"""Lengths are given where the pipelines would let their own default of 256 win over the checkpoint's `max_length`."""


class Recorder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.cases: list[dict[str, Any]] = []

    def record(self, checkpoint: str, task: str, inputs: Any, parameters: dict[str, Any], **extra: Any) -> None:
        """`inputs` is one positional argument, or a dict of keywords."""
        pipe = transformers.pipeline(task, model=str(self.root / checkpoint), device="cpu")
        output = pipe(**inputs, **parameters) if isinstance(inputs, dict) else pipe(inputs, **parameters)
        case = {"checkpoint": checkpoint, "task": task, "inputs": inputs, "parameters": parameters, "output": output}
        if task.startswith(("summarization", "translation")):
            ids = pipe(inputs, return_tensors=True, **parameters)
            case["ids"] = [next(iter(entry.values())).tolist() for entry in ids]
        self.cases.append(case | extra)


def main() -> None:
    assert transformers.__version__ == "4.57.6", transformers.__version__
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as root:
        recorder = Recorder(Path(root))
        for name in CHECKPOINTS:
            make(name, Path(root) / name)
        for answer in ANSWERS:
            inputs = {key: answer[key] for key in ("question", "context")}
            parameters = {key: value for key, value in answer.items() if key not in inputs}
            recorder.record("question-answering", "question-answering", inputs, parameters)
        record_classifiers(recorder)
        for checkpoint, parameters in SUMMARIES:
            for text in (ARTICLE, TEXTS[0]):
                recorder.record(checkpoint, "summarization", [text], parameters)
        for checkpoint, task, parameters in TRANSLATIONS:
            for text in (TEXTS[0], TEXTS[2]):
                recorder.record(checkpoint, task, [text], parameters)
    head = {"transformers": transformers.__version__, "torch": torch.__version__}
    rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in recorder.cases)
    OUTPUT.write_text(f'{{"versions": {json.dumps(head)}, "cases": [\n{rows}\n]}}\n', encoding="utf-8")


def record_classifiers(recorder: Recorder) -> None:
    for checkpoint in ("three-classes", "several-labels", "regression"):
        parameters: list[dict[str, Any]] = [{}, {"top_k": None}, {"top_k": 2}]
        parameters += [{"top_k": None, "function_to_apply": name} for name in ("none", "sigmoid", "softmax")]
        for choice in parameters:
            recorder.record(checkpoint, "text-classification", TEXTS, choice)
    pair = [{"text": TEXTS[0], "text_pair": TEXTS[1]}]
    recorder.record("three-classes", "text-classification", pair, {"top_k": None})
    labels = ["sports", "politics", "science"]
    for checkpoint in ("entailment", "entailment-first", "entailment-bart"):
        for choice in (
            {},
            {"multi_label": True},
            {"hypothesis_template": "It is about {}!", "multi_label": False},
        ):
            recorder.record(checkpoint, "zero-shot-classification", TEXTS, {"candidate_labels": labels} | choice)
        recorder.record(checkpoint, "zero-shot-classification", TEXTS[0], {"candidate_labels": "music"})


if __name__ == "__main__":
    main()
