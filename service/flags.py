"""The command line of `slimpajama serve`: every setting as a flag, made from the fields of `Settings`.

So help, environment and YAML cannot drift apart. Values stay text here; `Settings` reads them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from service.settings import SettingLine, setting_lines
from service.settings_sources import unknown_name

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong and no more: the whole usage is for `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def serve_parser() -> Parser:
    parser = Parser(
        prog="slimpajama serve",
        usage="slimpajama serve --model FOLDER_OR_GGUF_OR_HUB_NAME [--model ...] [settings]",
        description="Load checkpoints and serve them over HTTP.",
        epilog="Every setting may also come from the variable in brackets, or from a YAML file (--config) under the "
        "flag's name with underscores. A flag beats the variable, the variable beats the file. "
        "In a variable, lists are separated by commas. Memory sizes read like 512MiB or 2GiB.",
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for line in setting_lines():
        if line.group not in groups:
            groups[line.group] = parser.add_argument_group(line.group)
        _add_flag(groups[line.group], line)
    return parser


def read_serve_flags(arguments: Sequence[str]) -> dict[str, object]:
    """What the command line gives, by field name. Ends the process with advice on a flag that does not exist."""
    parser = serve_parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_advice(parser, unknown[0]))
    return vars(known)


def _add_flag(group: argparse._ArgumentGroup, line: SettingLine) -> None:
    text = f"{line.description} [{line.variable}; default: {line.default}]".replace("%", "%%")
    if line.is_switch:
        action = "store_true" if line.field.startswith("no_") else argparse.BooleanOptionalAction
        group.add_argument(line.flag, dest=line.field, action=action, help=text)
        return
    metavar = "{" + ",".join(line.choices) + "}" if line.choices else line.field.rpartition("_")[2].upper()
    action = "append" if line.is_list else "store"
    group.add_argument(line.flag, dest=line.field, action=action, metavar=metavar, help=text)


def _advice(parser: Parser, argument: str) -> str:
    name = argument.partition("=")[0]
    if name.startswith("-"):
        return unknown_name("flag", name, parser._option_string_actions)
    hint = f": a checkpoint is given as --model {argument}" if "/" in argument or Path(argument).exists() else ""
    return f"unexpected argument '{argument}'{hint}"
