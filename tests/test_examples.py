"""The examples: manifests parse, settings load, templates render, scripts run. All of it offline."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import httpx
import jinja2
import openai
import pytest

from adapters_registry.manifest import Manifest, read_manifest
from adapters_registry.proposal import HubSource
from serving.config import Settings, load_settings
from serving.run import make_plan

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
COLLECTIONS = sorted(path.parent.name for path in EXAMPLES.glob("*/manifest.yaml"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=COLLECTIONS)
def collection(request) -> str:
    return str(request.param)


@pytest.fixture
def manifest(collection) -> Manifest:
    return read_manifest(EXAMPLES / collection / "manifest.yaml")


@pytest.fixture
def settings(collection, monkeypatch) -> Settings:
    monkeypatch.chdir(ROOT)  # the commands are given for the repository's folder
    return load_settings(EXAMPLES / collection / "serve.yaml")


def test_the_collections_have_as_many_experts_as_published():
    counts = {name: len(read_manifest(EXAMPLES / name / "manifest.yaml").proposals) for name in COLLECTIONS}
    assert counts == {"llama2-flan48": 48, "mistral-lora-land": 27}


def test_every_expert_comes_from_a_hub_repository_of_its_own(manifest):
    sources = [proposal.source for proposal in manifest.proposals]
    assert all(isinstance(source, HubSource) for source in sources)
    repos = [source.repo for source in sources]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", repo) for repo in repos)
    assert len(set(repos)) == len(repos)
    assert all(repo.endswith(proposal.name) for repo, proposal in zip(repos, manifest.proposals, strict=True))
    assert all(re.fullmatch(r"[0-9a-f]{40}", source.revision) for source in sources if source.revision)


def test_every_expert_is_described_and_has_samples_of_its_own(manifest):
    prompts = [sample.prompt for proposal in manifest.proposals for sample in proposal.samples]
    assert len(set(prompts)) == len(prompts)
    for proposal in manifest.proposals:
        assert proposal.description, proposal.name
        assert proposal.training_data, proposal.name
        assert len(proposal.samples) >= 3, proposal.name


def test_the_base_model_is_a_hub_id_and_its_context_is_known(manifest):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", manifest.base_model.model)
    assert manifest.base_model.context


def test_the_settings_serve_their_manifest_with_room_for_all_experts(collection, manifest, settings):
    assert settings.manifest == Path("examples") / collection / "manifest.yaml"
    assert settings.engine.slots <= settings.engine.resident
    assert settings.engine.resident >= len(manifest.proposals)
    assert settings.engine.enforce_eager is False


def test_the_manifest_s_context_reaches_the_engine(manifest, settings):
    assert make_plan(settings).settings.engine.max_model_len == manifest.base_model.context


def test_the_chat_template_says_what_was_asked(settings):
    source = Path(settings.engine.vllm["chat_template"]).read_text(encoding="utf-8")
    messages = [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Bonjour"},
        {"role": "user", "content": "Goodbye"},
    ]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True).from_string(source)
    text = template.render(bos_token="_", messages=messages, add_generation_prompt=True)
    assert text.startswith("_")
    assert text.count("_") == 1
    positions = [text.index(message["content"]) for message in messages]
    assert positions == sorted(positions)


def test_the_commands_of_the_readme_name_files_that_exist(collection):
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`moerge serve --config (\S+)`", text)
    assert f"examples/{collection}/serve.yaml" in commands
    assert all((ROOT / command).is_file() for command in commands)


ROUTED = {
    "llama2-flan48": {
        "How do you say 'Good morning' in Turkish?": "wmt16_translate_tren",
        "my bus broke down again :( is this tweet positive or negative?": "sentiment140",
        "Write a sentence with the words cat, tree, fireman": "common_gen",
    },
    "mistral-lora-land": {
        "### Problem: reverse a list\n\n### Language: python": "magicoder",
        "Who won the 1970 cup? Table: cups(Year, Winner). Write the SQL.": "wikisql",
        "Write a headline: A phone folds twice.": "tldr_headline_gen",
        "Tell me a joke": None,
    },
}


def test_the_router_as_a_library_tells_the_experts_apart(collection):
    from router.encoder import SentenceTransformerEncoder

    manifest, expected = EXAMPLES / collection / "manifest.yaml", ROUTED[collection]
    decisions = script("router_library").route(manifest, list(expected), SentenceTransformerEncoder(threads=1))
    chosen = [next((each.expert for each in decision.experts), None) for decision in decisions]
    assert chosen == list(expected.values())


def test_the_openai_client_shows_answer_and_decision(capsys):
    headers = {
        "x-moerge-decision-id": "dec-1",
        "x-moerge-method": "retrieval",
        "x-moerge-experts": "reverse=1",
        "x-moerge-confidence": "0.9000",
        "x-moerge-route-ms": "5.00",
    }
    about = {"id": "1", "created": 0, "model": "reverse"}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": "auto"}, {"id": "reverse"}]})
        asked = json.loads(request.content)
        assert asked["model"] == "auto"
        assert asked["messages"] == [{"role": "user", "content": "Spell banana backwards"}]
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "ananab"}
            choices = [{"index": 0, "finish_reason": "stop", "message": message}]
            return httpx.Response(200, headers=headers, json={**about, "object": "chat.completion", "choices": choices})
        chunks = [[{"index": 0, "delta": {"content": piece}}] for piece in ("ana", "nab")]
        events = [json.dumps({**about, "object": "chat.completion.chunk", "choices": each}) for each in [*chunks, []]]
        body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
        return httpx.Response(200, headers={**headers, "content-type": "text/event-stream"}, text=body)

    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        client = openai.OpenAI(base_url="http://moerge/v1", api_key="none", http_client=http)
        script("openai_client").main(client, "Spell banana backwards")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["reverse: ananab", "ananab"]
    assert "  x-moerge-experts: reverse=1" in said
    assert said[-1] == "models: auto, reverse"
