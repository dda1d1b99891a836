"""Adapters that PEFT saved compute what PEFT's own model, nothing merged, computes of them."""

import torch

from tests.model.adapters.conftest import RECORDED, Recording, Store, logits, read_recording

KINDS = ("bert-classifier", "gpt2", "llama", "llama-dora", "llama-embedding", "llama-vocabulary", "t5")


def test_every_kind_was_recorded() -> None:
    assert {path.stem for path in RECORDED} >= set(KINDS)


def test_a_recorded_adapter_gives_the_logits_of_peft(store: Store, recording: Recording) -> None:
    found = logits(store(recording.tensors, base=recording.base, config=recording.config))
    last = found[-len(recording.logits) :]
    torch.testing.assert_close(last, recording.logits, rtol=1e-4, atol=5e-5)


def test_names_as_other_releases_wrote_them_mean_the_same(store: Store) -> None:
    """The adapter's own name in them, heads under `modules_to_save`, biases under `base_layer`, no prefix."""
    (path,) = (path for path in RECORDED if path.stem == "bert-classifier")
    recording = read_recording(path)
    renamed = {}
    for name, tensor in recording.tensors.items():
        if "modules_to_save" in name or "original_module" in name:
            continue
        name = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        name = name.replace("classifier.", "classifier.modules_to_save.default.")
        renamed[name.replace("query.bias", "query.base_layer.bias").removeprefix("base_model.model.")] = tensor
    assert not renamed.keys() & recording.tensors.keys()
    found = logits(store(renamed, base=recording.base, config=recording.config))
    torch.testing.assert_close(found, recording.logits, rtol=1e-4, atol=5e-5)
