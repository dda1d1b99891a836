"""Model cards: a text with places for numbers, filled from a checkpoint's `evaluation.json`.

A place is `{path.to.number}` or `{path.to.number:format}`; so a card can never say other numbers than the evaluation.
`python -m model.training.cards CHECKPOINT...` rewrites the cards of the named checkpoint folders.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "cards"
MEASURED_LATER = "through_the_service"
"""Of the running service (`rest`), once the recipe has made the checkpoint: the card has no such lines until then."""
_PLACE = re.compile(r"\{([A-Za-z_0-9.]+)(?::([^}]*))?\}")


def fill(template: str, report: dict[str, Any]) -> str:
    """The template with every place filled. Raises KeyError when the report lacks a number."""

    def value(match: re.Match[str]) -> str:
        found: Any = report
        for key in match.group(1).split("."):
            found = found[key]
        return format(found, match.group(2) or "")

    return _PLACE.sub(value, template)


def render_samples(samples: list[dict[str, str]]) -> str:
    """Prompts and continuations as quotes, unedited."""
    blocks = []
    for number, sample in enumerate(samples, 1):
        text = f"**{sample['prompt'].strip()}**{sample['continuation'].rstrip()}"
        blocks.append(f"{number}.\n" + "\n".join(f"   > {line}" if line else "   >" for line in text.split("\n")))
    return "\n\n".join(blocks)


def render_card(folder: Path) -> str:
    """The card of one checkpoint folder, from the template of its name and its evaluation."""
    report = json.loads((folder / "evaluation.json").read_text())
    if "samples" in report:
        report["rendered_samples"] = render_samples(report["samples"])
    lines = (TEMPLATES / f"{folder.name}.md").read_text().splitlines(keepends=True)
    return fill("".join(line for line in lines if MEASURED_LATER in report or MEASURED_LATER not in line), report)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        Path(argument, "README.md").write_text(render_card(Path(argument)))
