"""Settings: options over environment over file, and every mistake by its name."""

from __future__ import annotations

import pytest

from serving.config import ConfigError, ServerSettings, Settings, load_settings


@pytest.fixture
def file(tmp_path):
    return tmp_path / "moerge.yaml"


def test_options_count_more_than_the_environment_and_that_more_than_the_file(file, monkeypatch):
    file.write_text("server: {host: 127.0.0.3, port: 1}\nengine: {slots: 1, resident: 70}\nlog_level: error\n")
    monkeypatch.setenv("MOERGE_ENGINE__SLOTS", "2")
    monkeypatch.setenv("MOERGE_SERVER__PORT", "2")
    settings = load_settings(file, {"server": {"port": 3}})
    assert (settings.server.port, settings.engine.slots, settings.engine.resident) == (3, 2, 70)
    assert (settings.server.host, settings.log_level) == ("127.0.0.3", "error")


def test_without_anything_the_defaults_count():
    assert load_settings().model_dump() == Settings().model_dump()
    settings = load_settings(None, {"server": {"port": None}, "manifest": None})
    assert settings.model_dump() == Settings().model_dump()


def test_an_empty_file_changes_nothing(file):
    file.write_text("# later\n")
    assert load_settings(file).model_dump() == Settings().model_dump()


def test_lists_and_mappings_come_from_the_environment_as_json(monkeypatch, tmp_path):
    monkeypatch.setenv("MOERGE_REGISTRY__IMPORT_DIRS", f'["{tmp_path}"]')
    monkeypatch.setenv("MOERGE_ROUTER__METHODS", '{"retrieval": {"scoring": "best"}}')
    settings = load_settings()
    assert settings.registry.import_dirs == (tmp_path,)
    assert settings.router.methods["retrieval"] == {"scoring": "best"}


def test_methods_are_configured_beside_the_usual_ones(file):
    file.write_text("router: {methods: {retrieval: {top_k: 3}, random: {}, arrow: null}}\n")
    router = load_settings(file).router
    assert router.method == Settings().router.method
    assert router.methods["retrieval"] == {"top_k": 3}
    assert router.methods.keys() == (Settings().router.methods.keys() | {"random"}) - {"arrow"}


def test_the_command_line_s_own_variables_are_no_settings(monkeypatch):
    monkeypatch.setenv("MOERGE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MOERGE_API_KEY", "moe-x")
    assert load_settings().model_dump() == Settings().model_dump()


def problems(file, text=None, options=None):
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_settings(file, options)
    return str(error.value).splitlines()


def test_everything_that_is_wrong_is_named_at_once(file):
    lines = problems(
        file,
        "server: {prot: 8000, port: 70000}\n"
        "engine: {slots: 0, max_rank: 7}\n"
        "router: {method: arrow, methods: {nonsense: {}}}\n"
        "registry: {min_effect: -1}\n"
        "log_level: loud\n"
        "colour: red\n",
    )
    text = "\n".join(lines)
    for field in (
        "server.prot",
        "server.port",
        "engine.slots",
        "engine.max_rank",
        "router.methods",
        "registry.min_effect",
        "log_level",
        "colour",
    ):
        assert f"{file}: {field}" in text
    assert "nonsense" in text


def test_a_method_s_own_settings_are_checked(file):
    (line,) = problems(file, "router: {methods: {retrieval: {k: 0}}}")
    assert line.startswith(f"{file}: router.methods.k: ")


def test_a_method_that_is_not_served_cannot_be_the_default(file):
    (line,) = problems(file, "router: {method: random}")
    assert "random" in line
    assert "retrieval" in line


@pytest.mark.parametrize("text", ["server: [", "- a\n- b\n", "just words", "server: 7", "\x00", "a: &a [*a]"])
def test_a_file_that_is_no_mapping_is_named(file, text):
    assert problems(file, text)[0].startswith(f"{file}: ")


def test_a_file_that_is_no_text_is_named(file):
    file.write_bytes(b"\xff\xfe\x00\xd8")
    assert str(file) in problems(file)[0]


def test_a_file_that_is_not_there_is_named(file):
    assert problems(file) == [f"{file}: no such file."]
    assert "no such file" in problems(file.parent)[0]


def test_a_variable_that_does_not_fit_is_named(file, monkeypatch):
    file.write_text("")
    monkeypatch.setenv("MOERGE_ENGINE__SLOTS", "many")
    assert "engine.slots" in problems(file)[0]
    monkeypatch.setenv("MOERGE_ENGINE__SLOTS", "4")
    monkeypatch.setenv("MOERGE_ENGINE__SLOT", "4")
    assert "engine.slot:" in problems(file)[0]


def test_settings_cannot_be_changed_afterwards():
    settings = Settings()
    for section, name in ((settings, "log_level"), (settings.server, "port"), (settings.router, "method")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, "x")


def test_as_many_experts_stay_loaded_as_there_are_slots(file):
    file.write_text("engine: {slots: 100, resident: 4}")
    assert load_settings(file).engine.resident == 100


def test_a_password_in_the_database_s_url_is_not_shown(file):
    file.write_text("registry: {database_url: 'postgresql://moe:hunter2@db/moerge'}")
    settings = load_settings(file)
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()
    assert "hunter2" in settings.registry.database_url.get_secret_value()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "0.0.0.0", "::", "192.168.0.7", "moe.example", ""]
)
def test_loopback_is_what_nobody_else_can_reach(host):
    assert ServerSettings(host=host).loopback == (host.startswith("127.") or host in ("localhost", "::1"))
