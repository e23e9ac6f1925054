"""The command line as a whole: quick to start, and documented."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.config import Settings

DOCS = Path(__file__).parents[2] / "docs"
HEAVY = (
    "torch",
    "transformers",
    "sentence_transformers",
    "openai",
    "faiss",
    "sklearn",
    "vllm",
    "fastapi",
    "sqlalchemy",
)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no part of the packages."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_starts_without_anything_heavy():
    code = f"import sys, serving.cli; print([each for each in {HEAVY!r} if each in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_every_command_has_help(generate):
    for path, _ in generate.walk(generate_command(), "moerge"):
        result = CliRunner().invoke(app, [*path.split()[1:], "--help"])
        assert result.exit_code == 0, path
        assert "Usage" in result.stdout


def generate_command():
    from typer.main import get_command

    return get_command(app)


@pytest.mark.parametrize("page", ["cli.md", "configuration.md"])
def test_the_generated_pages_are_up_to_date(generate, page):
    """If this fails: python docs/generate.py"""
    assert (DOCS / page).read_text(encoding="utf-8") == generate.regenerate(page)


def test_every_option_and_argument_is_explained(generate):
    for path, command in generate.walk(generate_command(), "moerge"):
        assert command.help, path
        for param in command.params:
            assert getattr(param, "help", None), (path, param.name)


def test_every_setting_is_explained(generate):
    for section, model in generate.sections(Settings):
        for name in model.model_fields:
            if generate.nested(model.model_fields[name]) is None:
                assert generate.meaning(model, name), (section, name)


def test_the_version_is_told():
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.startswith("moerge 0.")


def test_without_a_command_help_is_shown():
    assert "Usage" in CliRunner().invoke(app, []).output


def test_an_unknown_command_is_a_usage_error():
    result = CliRunner().invoke(app, ["fly"])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
