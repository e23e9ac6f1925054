"""`moerge keys`: on the registry's database, without a server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from serving.cli import app


@pytest.fixture
def keys(tmp_path):
    def run(*words, env=None):
        data = ["--data-dir", str(tmp_path / "data")]
        env = {"MOERGE_BASE_MODEL__PATH": "org/tiny", **(env or {})}
        return CliRunner().invoke(app, ["keys", *words, *data], env=env)

    return run


def test_a_key_is_shown_once_and_listed_without_its_secret(keys):
    made = keys("create", "--owner", "ann", "--scope", "infer", "--scope", "admin")
    assert made.exit_code == 0
    token = made.stdout.strip()
    assert token.startswith("moe-")
    assert "cannot be shown again" in made.stderr
    listed = keys("list", "--json").stdout
    (key,) = json.loads(listed)
    assert (key["owner"], sorted(key["scopes"])) == ("ann", ["admin", "infer"])
    assert token.rpartition("-")[2] not in listed
    assert "ann" in keys("list").stdout


def test_a_key_without_a_word_is_the_operator_s_for_answers(keys):
    body = json.loads(keys("create", "--json").stdout)
    assert (body["owner"], body["scopes"]) == ("operator", ["infer"])
    assert body["key"].startswith(f"moe-{body['id']}-")


def test_a_key_is_revoked(keys):
    key = json.loads(keys("create", "--json").stdout)["id"]
    assert f"Key {key} of operator is revoked." in keys("revoke", key).stderr
    assert json.loads(keys("list", "--json").stdout)[0]["revoked_at"]
    assert keys("revoke", "nonsense").stderr == "No API key 'nonsense'.\n"


def test_mistakes_are_one_message_and_status_1(keys):
    wrong = keys("create", "--scope", "root")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    assert "infer" in wrong.stderr
    nameless = keys("list", env={"MOERGE_BASE_MODEL__PATH": ""})
    assert nameless.exit_code in (0, 1)
    assert "Traceback" not in nameless.output


async def test_the_server_on_the_same_folder_knows_the_key(keys, make_service, tmp_path):
    token = keys("create").stdout.strip()
    service = make_service(tmp_path / "data" / "tiny")
    assert service.registry.keys.verify(token).owner == "operator"
    service.router.close()
    service.registry.close()
