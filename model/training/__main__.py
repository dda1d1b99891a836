"""`python -m model.training CONFIG`: make one of the checkpoints that ship with the project, from data to card numbers.

A config file (TOML) names the kind of checkpoint and its settings. Interrupt at will: the same command goes on where
the last one stopped. Runs in its own process; knows nothing of the service.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Any

import torch

from model.training.distill import DistillSettings
from model.training.encoder_recipe import EncoderRecipe, train_encoder
from model.training.finetune import FinetuneSettings
from model.training.language_model_recipe import LanguageModelRecipe, train_language_model_checkpoint
from model.training.networks import LlamaShape
from model.training.pretrain import LanguageModelSettings

REPOSITORY = Path(__file__).parents[2]


def encoder_recipe(raw: dict[str, Any]) -> EncoderRecipe:
    """The typed form of an encoder's config. Raises TypeError on a misspelt or missing key."""
    return EncoderRecipe(
        **{
            **raw,
            "distill": DistillSettings(**raw["distill"]),
            "finetune": FinetuneSettings(**raw["finetune"]),
            "teacher_finetune": FinetuneSettings(**raw["teacher_finetune"]),
        }
    )


def language_model_recipe(raw: dict[str, Any]) -> LanguageModelRecipe:
    """The typed form of a language model's config. Raises TypeError on a misspelt or missing key."""
    return LanguageModelRecipe(
        **{
            **raw,
            "shape": LlamaShape(**raw["shape"]),
            "prose": LanguageModelSettings(**raw["prose"]),
            "instructions": LanguageModelSettings(**raw["instructions"]),
            "courtesies": LanguageModelSettings(**raw["courtesies"]),
        }
    )


def for_profile(raw: dict[str, Any], profile: str) -> dict[str, Any]:
    """The settings with those of the table `gpu` in their places where the profile is "gpu"."""
    chosen = {key: value for key, value in raw.items() if key != "gpu"}
    for key, value in raw.get("gpu", {}).items() if profile == "gpu" else ():
        chosen[key] = {**chosen[key], **value} if isinstance(value, dict) else value
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.training", description=__doc__)
    parser.add_argument("config", type=Path, help="a file of model/training/configs")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("training-runs"), help="tokens, states, curves")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", choices=("cpu", "gpu"), help="whose settings to take; default: the device's")
    parser.add_argument("--train-only", action="store_true", help="stop before export and evaluation")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    profile = arguments.profile or ("cpu" if arguments.device == "cpu" else "gpu")
    raw = for_profile(tomllib.loads(arguments.config.read_text()), profile)
    name, kind = raw.pop("name"), raw.pop("kind")
    work, output = arguments.work / name, arguments.output / name
    options = {"device": arguments.device, "train_only": arguments.train_only}
    if kind == "encoder":
        train_encoder(encoder_recipe(raw), arguments.data, work, output, **options)
    elif kind == "language_model":
        train_language_model_checkpoint(language_model_recipe(raw), arguments.data, work, output, **options)
    else:
        parser.error(f'kind is "{kind}"; it must be "encoder" or "language_model"')


if __name__ == "__main__":
    main()
