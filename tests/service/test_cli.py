"""The command line: what it says about itself and about mistakes, and that nothing heavy is loaded for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import service
from service.cli import main
from service.flags import read_serve_flags, serve_parser
from service.settings import setting_lines


def test_serve_help_shows_every_setting_with_variable_and_default():
    text = " ".join(serve_parser().format_help().split())
    for line in setting_lines():
        assert f"[{line.variable}; default: {line.default}]" in text
        assert line.flag in text


def test_misspelt_flag_is_an_error_that_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--max-sequence", "3"])
    assert ended.value.code == 2
    assert "unknown flag '--max-sequence': did you mean '--max-sequences'?" in capsys.readouterr().err


def test_flags_are_not_abbreviated():
    with pytest.raises(SystemExit):
        read_serve_flags(["--max-seq", "3"])


def test_model_given_without_its_flag_is_told_how(capsys):
    with pytest.raises(SystemExit):
        read_serve_flags(["owner/model"])
    assert "--model owner/model" in capsys.readouterr().err


def test_flags_left_out_do_not_hide_the_environment():
    assert read_serve_flags(["--port", "1", "--model", "a/b", "--model", "c/d", "--no-prefix-caching"]) == {
        "port": "1",
        "model": ["a/b", "c/d"],
        "prefix_caching": False,
    }


def test_unknown_command_is_an_error_that_suggests_the_right_one(capsys):
    assert main(["srve"]) == 2
    assert "did you mean 'serve'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0", "--model", "a/b"], "--no-auth"),
        ([], "nothing to serve"),
        (["--port", "99999", "--model", "a/b"], "port = '99999'"),
    ],
)
def test_what_cannot_be_served_is_refused_with_advice(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_certificate_that_cannot_be_served_is_refused_with_advice(tmp_path, capsys):
    """It was a traceback of the server's, after the engine had been made."""
    file = tmp_path / "server.pem"
    file.write_text("no certificate")
    arguments = ["--model", "a/b", "--tls-certificate", str(file), "--tls-key", str(file)]
    assert main(["serve", *arguments]) == 2
    assert f"tls_certificate {file}" in capsys.readouterr().err


def test_models_reports_a_folder_without_a_checkpoint(tmp_path, capsys):
    assert main(["models", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_name_longer_than_any_path_is_told_and_no_traceback(capsys):
    assert main(["models", "a" * 5000]) == 1
    assert capsys.readouterr().err == f"slimpajama models: {'a' * 200}: File name too long\n"
    assert main(["serve", "--model", "a" * 5000]) != 0
    assert "cannot be looked for: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import service.app, service.serve, service.server, service.cli", ["torch", "transformers"]),
        (
            "from service.flags import serve_parser; serve_parser().format_help()",
            ["torch", "fastapi", "uvicorn", "tokenizers"],
        ),
    ],
)
def test_the_api_process_imports_nothing_heavy(statement, unwanted):
    code = f"{statement}\nimport sys\nprint([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_process_imports_what_only_tests_need():
    """Others break with every release of transformers: it is what we are compared with, and nothing that runs."""
    root = Path(service.__file__ or "").parents[1]
    files = [path for room in ("service", "model") for path in (root / room).rglob("*.py")]
    running = [path for path in files if "training" not in path.parts]
    assert len(running) > 100
    for path in running:
        for entry in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in entry.names] if isinstance(entry, ast.Import) else []
            names += [entry.module or ""] if isinstance(entry, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"transformers", "sentence_transformers"}, path
