"""Lets pip inside a build find what pip finds here: `python3 tests/deploy/pip_here.py FOLDER [IGNORED...]`.

Writes this machine's pip configuration, files and variables in one, to FOLDER/pip.conf, without the options to be
ignored, and prints what a build has to mount besides: the folders and certificates that it names. Mounted, not copied:
no image and no commit holds any of it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path


def configuration() -> dict[str, str]:
    """Of all commands; a variable beats a file, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [re.fullmatch(r"(global|install|:env:)\.([a-z-]+)=(.*)", line) for line in listed.splitlines()]
    entries = [(match[1], match[2], str(ast.literal_eval(match[3]))) for match in found if match]
    return {name: value for _, name, value in sorted(entries, key=lambda entry: entry[0] == ":env:")}


def local_paths(values: list[str]) -> set[Path]:
    """Folders and files of this machine; of an index, the folder above it, where its files are."""
    found = set()
    for word in " ".join(values).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            found.add(path.parent if path.name == "simple" else path)
    return found


def main(folder: Path, ignored: list[str]) -> None:
    entries = {name: value for name, value in configuration().items() if name not in ignored}
    lines = [f"{name} = " + "\n    ".join(value.split()) for name, value in entries.items()]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines]) + "\n")
    sys.stdout.writelines(f"{path}:{path}:ro\n" for path in sorted(local_paths(list(entries.values()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
