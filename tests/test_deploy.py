"""Container, compose and systemd files, as far as they can be checked without running them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

from serving.config import load_settings

ROOT = Path(__file__).parents[1]
SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|API_KEY", re.IGNORECASE)


@dataclass
class Stage:
    """One `FROM ... [AS name]` and the instructions after it, as (word, rest)."""

    image: str
    name: str | None
    instructions: list[tuple[str, str]]

    def all(self, word: str) -> list[str]:
        return [rest for each, rest in self.instructions if each == word]


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found: list[Stage] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            found.append(Stage(image, name or None, []))
        else:
            found[-1].instructions.append((word, rest.strip()))
    return found


def environment(stage: Stage) -> dict[str, str]:
    return dict(part.split("=", 1) for each in stage.all("ENV") for part in shlex.split(each))


def test_two_stages_of_one_image_so_that_the_environment_moves_as_it_is(stages):
    build, runtime = stages
    assert build.image == runtime.image
    assert build.image.startswith("python:3.11-slim")
    [home] = build.all("WORKDIR")
    assert f"--from={build.name} {home} {home}" in runtime.all("COPY")
    assert environment(runtime)["PATH"].startswith(f"{home}/.venv/bin:")


def test_the_image_is_built_by_the_makefile_s_own_steps(stages):
    assert "make install-runtime" in stages[0].all("RUN")
    assert re.search(r"^install-runtime:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_everything_that_is_copied_exists_and_is_let_in(stages):
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for instruction in stages[0].all("COPY"):
        *sources, _ = shlex.split(instruction)
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatchcase(source, pattern) for pattern in kept), f"{source} is kept out by .dockerignore"


def test_the_runtime_is_nobody_s_root_and_says_how_it_is(stages):
    runtime = stages[1]
    words = [word for word, _ in runtime.instructions]
    assert runtime.all("USER") == ["moerge"]
    assert words.index("USER") < words.index("ENTRYPOINT")
    [probe] = runtime.all("HEALTHCHECK")
    assert "/health" in probe


def test_no_secrets_and_nothing_fetched_by_address(stages):
    for stage in stages:
        assert not stage.all("ADD")
        for word in ("ENV", "ARG"):
            assert not [rest for rest in stage.all(word) if SECRET.search(rest)]


def test_the_image_serves_the_quickstart_on_all_addresses(stages, monkeypatch):
    build, runtime = stages
    for name, value in environment(runtime).items():
        if name.startswith("MOERGE_"):
            monkeypatch.setenv(name, value)
    settings = load_settings()
    [home] = build.all("WORKDIR")
    assert settings.server.host == "0.0.0.0"
    assert not settings.server.loopback, "so a key is asked for"
    assert settings.manifest is not None
    assert (ROOT / settings.manifest.relative_to(home)).is_file()
    assert str(settings.registry.data_dir).startswith(runtime.all("VOLUME")[0])


def test_compose_builds_this_image_and_keeps_its_data():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    moerge, postgres = compose["services"]["moerge"], compose["services"]["postgres"]
    assert (ROOT / "deploy" / moerge["build"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
    assert postgres["profiles"] == ["postgres"]
    assert all(port.startswith("127.0.0.1:") for port in moerge["ports"])
    volumes = {volume.split(":")[0] for service in (moerge, postgres) for volume in service["volumes"]}
    assert volumes == set(compose["volumes"])
    values = {**moerge["environment"], **postgres["environment"]}
    assert all(str(value).startswith("${") for name, value in values.items() if SECRET.search(name))


def test_an_empty_database_url_of_compose_means_sqlite(monkeypatch):
    monkeypatch.setenv("MOERGE_REGISTRY__DATABASE_URL", "")
    assert not load_settings().registry.database_url


def test_the_systemd_unit_serves_hardened():
    lines = (ROOT / "deploy" / "moerge.service").read_text(encoding="utf-8").splitlines()
    options = [line for line in lines if "=" in line and not line.startswith("#")]
    assert "ExecStart=/opt/moerge/.venv/bin/moerge serve --config /etc/moerge/config.yaml" in options
    wanted = {"User=moerge", "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "CapabilityBoundingSet="}
    assert wanted <= set(options)
    assert not [line for line in options if line.startswith("Environment=") and SECRET.search(line)]
