"""`moerge doctor`: would a server start here?"""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from router.versions import RouterVersions
from serving.cli import app
from serving.commands import doctor

# vLLM itself takes long to import; the tests against the real one look at that check.
QUICK = tuple(check for check in doctor.CHECKS if check is not doctor.vllm)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", QUICK)


def examine(*words, env=None):
    result = CliRunner().invoke(app, ["doctor", *(str(word) for word in words), "--json"], env=env)
    return result, {each["check"]: each for each in json.loads(result.stdout)}


def test_every_check_says_what_it_found(tmp_path):
    env = {
        "MOERGE_BASE_MODEL__PATH": "org/tiny",
        "MOERGE_REGISTRY__DATA_DIR": str(tmp_path),
        "MOERGE_SERVER__PORT": "0",
    }
    result, found = examine(env=env)
    assert {"python", "torch", "vllm plugin", "encoder", "memory", "configuration", "registry folder", "port"} <= set(
        found
    )
    assert found["python"]["ok"]
    assert found["vllm plugin"]["ok"]
    assert found["configuration"]["detail"] == "tiny, 0 experts in the manifest"
    assert all(each["detail"] for each in found.values())
    assert result.exit_code == (1 if any(each["ok"] is False for each in found.values()) else 0)


def test_a_router_version_that_cannot_be_read_is_found(tmp_path):
    versions = RouterVersions(tmp_path / "tiny" / "routers")
    versions.promote(versions.save().number)
    env = {"MOERGE_BASE_MODEL__PATH": "org/tiny", "MOERGE_REGISTRY__DATA_DIR": str(tmp_path)}
    assert examine(env=env)[1]["router"]["detail"] == "version 1 is in force"
    (versions.folder / "1.json").write_text("{")
    found = examine(env=env)[1]["router"]
    assert found["ok"] is False
    assert "The router file 1.json cannot be used" in found["detail"]


def test_a_port_that_is_taken_is_found(served):
    env = {"MOERGE_BASE_MODEL__PATH": "org/tiny", "MOERGE_SERVER__PORT": served.url.rpartition(":")[2]}
    result, found = examine(env=env)
    assert found["port"]["ok"] is False
    assert result.exit_code == 1


def test_a_configuration_that_is_wrong_is_a_finding_not_a_crash(tmp_path):
    file = tmp_path / "moerge.yaml"
    file.write_text("colour: red\n")
    result, found = examine("--config", file)
    assert found["configuration"]["ok"] is False
    assert "colour" in found["configuration"]["detail"]
    assert result.exit_code == 1


def test_a_plugin_that_is_kept_out_is_found():
    _, found = examine(env={"VLLM_PLUGINS": "other"})
    assert found["vllm plugin"]["ok"] is False
    assert "add moerge" in found["vllm plugin"]["detail"]


def test_people_get_a_line_for_each_check():
    result = CliRunner().invoke(app, ["doctor"])
    assert "ok  python" in result.stdout
    assert "configuration" in result.stdout
