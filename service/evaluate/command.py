"""`slimpajama evaluate`: scores a running service on labelled data, and compares two models or two services.

Asks by the REST endpoints alone, so that what is scored is what is served. A process of its own, without torch.
"""

import argparse
import asyncio
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from service.evaluate.asking import EvaluateError, Service
from service.evaluate.kinds import KINDS, Item, Options
from service.evaluate.report import as_json, comparison_table, draw, table, write_json
from service.evaluate.running import Bootstrap, Comparison, Evaluation, answered, comparison, evaluation, read_items


def make_parser() -> argparse.ArgumentParser:
    fields = "\n".join(f"  {name:<11} {kind.fields}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="slimpajama evaluate",
        description="Score a running service on labelled data.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"A line of the data is a JSON object. Its fields, by task:\n{fields}",
    )
    parser.add_argument("--url", required=True, help="the running service, like http://127.0.0.1:8000")
    parser.add_argument("--task", required=True, choices=KINDS)
    parser.add_argument("--data", required=True, type=Path, help="a JSONL file, see below")
    parser.add_argument("--model", help="the checkpoint's name in the service (default: the one that would answer)")
    parser.add_argument("--api-key", help="where the service asks for one")
    parser.add_argument(
        "--compare", metavar="MODEL_OR_URL", help="a second model of the service (`name` or `name@version`), or its URL"
    )
    parser.add_argument("--concurrency", type=_positive, default=16, help="requests at a time (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for room (default: %(default)s)")
    parser.add_argument("--limit", type=_positive, help="only so many items")
    asked = parser.add_argument_group("requests")
    asked.add_argument(
        "--labels", help="classify: zero-shot labels, separated by commas; or `data` for those of the file"
    )
    asked.add_argument("--head", help="classify: one of the checkpoint's task heads")
    asked.add_argument("--source", help="translate: the language of the texts")
    asked.add_argument("--target", help="translate: the language to translate into")
    asked.add_argument("--max-tokens", type=_positive, help="summarize, translate: the most to write")
    asked.add_argument("--unanswerable", action="store_true", help="answer: a reading model may find no answer")
    asked.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    asked.add_argument("--bleu-tokenizer", default="13a", help="sacrebleu's, as zh or ja-mecab (default: %(default)s)")
    shown = parser.add_argument_group("report")
    shown.add_argument("--draws", type=_positive, default=1000, help="of the bootstrap (default: %(default)s)")
    shown.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    shown.add_argument("--json", type=Path, help="write the report here")
    shown.add_argument("--png", type=Path, help="draw the report here")
    return parser


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 with what is wrong on standard error."""
    parsed = make_parser().parse_args(arguments)
    try:
        asyncio.run(_evaluate(parsed))
    except (EvaluateError, OSError) as error:
        sys.stderr.write(f"slimpajama evaluate: {error}\n")
        return 1
    except ModuleNotFoundError as error:
        sys.stderr.write(f"slimpajama evaluate: {error.name} is missing: pip install 'slimpajama[evaluate]'\n")
        return 1
    return 0


async def _evaluate(parsed: argparse.Namespace) -> None:
    kind, how = KINDS[parsed.task], Bootstrap(num_draws=parsed.draws, seed=parsed.seed)
    options = _options(parsed, ())
    items = read_items(parsed.data, kind, options, parsed.limit)
    if parsed.labels == "data" and parsed.task == "classify":
        options = _options(parsed, tuple(sorted({item.gold for item in items})))
        items = read_items(parsed.data, kind, options, parsed.limit)
    service = Service(
        url=parsed.url.rstrip("/"), model=parsed.model, api_key=parsed.api_key, concurrency=parsed.concurrency,
        patience_seconds=parsed.patience,
    )  # fmt: skip
    first = evaluation(await answered(service, kind, items), kind, items, options, how)
    sys.stdout.write(table(first) + "\n")
    made: Comparison | None = None
    if parsed.compare:
        second = evaluation(await answered(_other(service, parsed.compare), kind, items), kind, items, options, how)
        made = comparison(first, second, kind, items, options, how)
        sys.stdout.write(table(second) + "\n" + comparison_table(made) + "\n")
    _write(parsed, items, first, made)


def _options(parsed: argparse.Namespace, of_data: tuple[str, ...]) -> Options:
    given = tuple(label.strip() for label in (parsed.labels or "").split(",") if label.strip())
    return Options(
        labels=of_data or (None if parsed.labels == "data" else given or None),
        head=parsed.head,
        source=parsed.source,
        target=parsed.target,
        max_tokens=parsed.max_tokens,
        unanswerable=parsed.unanswerable,
        truncate=parsed.truncate,
        bleu_tokenizer=parsed.bleu_tokenizer,
    )


def _other(service: Service, named: str) -> Service:
    """Another model of the same service, or the model of the same name (or none) at another URL."""
    is_url = named.startswith(("http://", "https://"))
    return Service(
        url=named.rstrip("/") if is_url else service.url,
        model=service.model if is_url else named,
        api_key=service.api_key,
        concurrency=service.concurrency,
        patience_seconds=service.patience_seconds,
    )


def _write(parsed: argparse.Namespace, items: Sequence[Item], first: Evaluation, made: Comparison | None) -> None:
    if parsed.json:
        setting = {
            "task": parsed.task, "data": parsed.data.name, "num_items": len(items), "draws": parsed.draws,
            "data_sha256": hashlib.sha256(parsed.data.read_bytes()).hexdigest(), "seed": parsed.seed,
        }  # fmt: skip
        write_json(parsed.json, as_json(first, made, setting))
    if parsed.png:
        draw(parsed.png, first, made)
