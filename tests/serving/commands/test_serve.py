"""`moerge serve`: everything that can go wrong before it serves, and `--check`."""

from __future__ import annotations

import json
import logging

import pytest
from typer.testing import CliRunner

from serving import run
from serving.cli import app
from serving.config import load_settings


@pytest.fixture(autouse=True)
def log_level():
    logger = logging.getLogger("moerge")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def manifest(tmp_path, base_folder, adapters):
    path = tmp_path / "manifest.yaml"
    experts = "".join(f"- {{name: e{k}, source: {folder}}}\n" for k, folder in enumerate(adapters))
    path.write_text(
        f"base_model: {{name: tiny, path: {base_folder}, context: 64, dtype: float32}}\nexperts:\n{experts}"
    )
    return path


def serve(*words):
    return CliRunner().invoke(app, ["serve", *(str(word) for word in words)])


def test_check_prints_the_settings_as_they_are_understood(manifest, tmp_path):
    result = serve("--manifest", manifest, "--port", "8123", "--slots", "2", "--data-dir", tmp_path, "--check")
    assert result.exit_code == 0
    settings = json.loads(result.stdout)
    assert (settings["server"]["port"], settings["engine"]["slots"]) == (8123, 2)
    assert (settings["engine"]["max_model_len"], settings["engine"]["dtype"]) == (64, "float32")
    assert "The configuration is good: tiny, 4 experts in the manifest." in result.stderr
    assert not (tmp_path / "tiny").exists()  # nothing was made


def test_check_shows_no_password(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("MOERGE_REGISTRY__DATABASE_URL", "postgresql://moe:hunter2@db/moerge")
    result = serve("--manifest", manifest, "--check")
    assert result.exit_code == 0
    assert "hunter2" not in result.output


def test_what_the_operator_says_counts_more_than_the_manifest(manifest, monkeypatch):
    monkeypatch.setenv("MOERGE_ENGINE__MAX_MODEL_LEN", "32")
    plan = run.make_plan(load_settings(None, {"manifest": manifest}))
    assert (plan.settings.engine.max_model_len, plan.settings.engine.dtype) == (32, "float32")


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_without_a_base_model_there_is_nothing_to_serve(check):
    result = serve(*check)
    assert result.exit_code == 1
    assert result.stderr.startswith("No base model")
    assert "Traceback" not in result.output


def test_mistakes_in_the_file_are_all_named(tmp_path):
    file = tmp_path / "moerge.yaml"
    file.write_text("server: {prot: 1}\nengine: {slots: 0}\n")
    result = serve("--config", file)
    assert result.exit_code == 1
    assert f"{file}: server.prot" in result.stderr
    assert f"{file}: engine.slots" in result.stderr


def test_mistakes_in_the_manifest_are_named_with_their_lines(manifest):
    manifest.write_text(manifest.read_text() + "- {name: Bad Name, source: nowhere}\n")
    result = serve("--manifest", manifest, "--check")
    assert result.exit_code == 1
    assert f"{manifest}:7:" in result.stderr


def test_beyond_loopback_without_a_key_it_does_not_start(manifest, tmp_path):
    result = serve("--manifest", manifest, "--host", "0.0.0.0", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    assert "moerge keys create" in result.stderr
    words = ["keys", "create", "--manifest", str(manifest), "--data-dir", str(tmp_path / "data")]
    assert CliRunner().invoke(app, words).exit_code == 0
    plan = run.make_plan(
        load_settings(
            None, {"manifest": manifest, "server": {"host": "0.0.0.0"}, "registry": {"data_dir": tmp_path / "data"}}
        )
    )
    run.check_keys(plan)


def test_an_engine_that_does_not_start_ends_the_command_with_the_reason(manifest, tmp_path, make_service, monkeypatch):
    service = make_service(tmp_path / "data")
    service.engine.fails_to_start = 1
    monkeypatch.setattr(run, "build_service", lambda plan: service)
    result = serve("--manifest", manifest, "--port", "0")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "no memory"
    assert "Traceback" not in result.output


def test_a_port_that_is_taken_ends_the_command_with_the_reason(manifest, monkeypatch, served):
    monkeypatch.setattr(run, "build_service", None)  # it does not come that far
    result = serve("--manifest", manifest, "--port", served.url.rpartition(":")[2])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Cannot listen on {served.url.removeprefix('http://')}")
    assert "Traceback" not in result.output


def test_each_base_model_has_a_registry_of_its_own(tmp_path):
    settings = load_settings(None, {"registry": {"data_dir": tmp_path}})
    assert run.data_dir(settings, "org/Some Model!") == tmp_path / "org-Some-Model"
    assert run.data_dir(settings, "../../etc").parent == tmp_path
