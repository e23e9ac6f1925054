"""The real `huggingface_hub` client against a loopback server that speaks the Hub's endpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

import adapters_registry.hub as hub_module
from adapters_registry.base import BaseSpec
from adapters_registry.errors import ExpertRefused, SourceGated, SourceNotFound, SourceUnavailable
from adapters_registry.expert import State
from adapters_registry.hub import Hub
from adapters_registry.proposal import HubSource, Proposal
from adapters_registry.registry import Registry
from adapters_registry.validate import Limits

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/reverse"


@dataclass
class FakeHub:
    """What the server knows and what it was asked. Files over `lfs_over` bytes are redirected to a CDN path."""

    files: dict[str, bytes] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": COMMIT})
    gated: bool = False
    token: str | None = None
    lfs_over: int = 2000
    break_after: int | None = None  # a download ends after so many bytes ...
    breaks: int = 0  # ... so many times
    asked: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    cdn_tokens: set[str | None] = field(default_factory=set)
    url: str = ""
    cdn: str = ""


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            if path.startswith("/cdn/"):
                hub.cdn_tokens.add(self.headers.get("authorization"))
                self.send_content(next(each for each in hub.files.values() if digest(each) == path.split("/")[2]))
                return
            hub.tokens.add(self.headers.get("authorization"))
            if not path.startswith((f"/api/models/{REPO}", f"/{REPO}/resolve/")):
                self.refuse(401, "RepoNotFound")
            elif hub.gated and self.headers.get("authorization") != f"Bearer {hub.token}":
                self.refuse(403, "GatedRepo")
            elif path.startswith("/api/"):
                self.send_info(path)
            else:
                self.send_file(path.removeprefix(f"/{REPO}/resolve/"))

        def refuse(self, status: int, code: str) -> None:
            self.reply(status, b"", {"X-Error-Code": code})

        def send_info(self, path: str) -> None:
            revision = path.partition("/revision/")[2] or "main"
            if revision not in hub.revisions:
                self.refuse(404, "RevisionNotFound")
                return
            siblings = [{"rfilename": name, "size": len(content)} for name, content in hub.files.items()]
            info = {"id": REPO, "sha": hub.revisions[revision], "siblings": siblings, "private": False, "tags": []}
            self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def send_file(self, path: str) -> None:
            commit, _, name = path.partition("/")
            content = hub.files.get(name)
            if commit != COMMIT or content is None:
                self.refuse(404, "EntryNotFound")
            elif len(content) > hub.lfs_over:
                linked = {"X-Linked-ETag": f'"{digest(content)}"', "X-Linked-Size": str(len(content))}
                location = {"Location": f"{hub.cdn}/cdn/{digest(content)}"}
                self.reply(302, b"", {"X-Repo-Commit": COMMIT, **linked, **location})
            else:
                self.send_content(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(content)}"'})

        def send_content(self, content: bytes, headers: dict[str, str] | None = None) -> None:
            start = 0
            if wanted := self.headers.get("range"):
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            extra = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
            self.reply(206 if start else 200, content[start:], {**(headers or {}), **extra})

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.breaks and hub.break_after is not None and len(body) > hub.break_after:
                hub.breaks -= 1
                self.wfile.write(body[: hub.break_after])
                self.close_connection = True
            else:
                self.wfile.write(body)

    return Handler


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def fake(adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    state = FakeHub({file.name: file.read_bytes() for file in adapters[0].iterdir()})
    state.files |= {"optimizer.pt": b"\x80\x02." * 4000, "training_args.bin": b"pickle", "logs/run.txt": b"x"}
    # The client waits a second before each new attempt.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(state)) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        state.cdn = f"http://localhost:{server.server_port}"  # another host, as far as the client can tell
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(fake: FakeHub, tmp_path: Path) -> Hub:
    return Hub(endpoint=fake.url, token="hf_secret", cache_dir=tmp_path / "cache")


@pytest.fixture
def registry(tmp_path: Path, base: BaseSpec, hub: Hub) -> Iterator[Registry]:
    with Registry.open(tmp_path / "data", base=base, hub=hub) as opened:
        yield opened


def proposal(**source: Any) -> Proposal:
    return Proposal(name="reverse", source=HubSource(**{"repo": REPO, **source}))


def test_an_expert_comes_from_the_hub_pinned_to_a_commit(
    registry: Registry, fake: FakeHub, adapters: list[Path]
) -> None:
    told: list[tuple[str, float]] = []
    with registry.prepare(proposal(revision="v1"), progress=lambda *step: told.append(step)) as prepared:
        expert = registry.commit(prepared, state=State.ACTIVE)
    assert expert.source == f"hub:{REPO}@{COMMIT}"
    weights = "adapter_model.safetensors"
    assert (expert.path / weights).read_bytes() == (adapters[0] / weights).read_bytes()
    fractions = [fraction for stage, fraction in told if stage == "fetch"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len(fractions) > 2, "bytes received are told, not only start and end"


def test_only_safetensors_json_and_readme_are_fetched(registry: Registry, fake: FakeHub) -> None:
    registry.prepare(proposal()).close()
    fetched = {path.rpartition("/")[2] for method, path in fake.asked if "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_the_token_goes_to_the_hub_and_nowhere_else(registry: Registry, fake: FakeHub) -> None:
    fake.gated, fake.token = True, "hf_secret"
    registry.prepare(proposal()).close()
    assert fake.tokens == {"Bearer hf_secret"}
    assert fake.cdn_tokens == {None}


def test_an_adapter_may_be_in_a_subfolder(registry: Registry, fake: FakeHub) -> None:
    fake.files = {f"experts/reverse/{name}": content for name, content in fake.files.items()}
    with registry.prepare(proposal(subfolder="experts/reverse")) as prepared:
        assert prepared.expert.source == f"hub:{REPO}@{COMMIT}#experts/reverse"
        assert (prepared.expert.path / "adapter_config.json").is_file()


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_cannot_leave_the_repository(registry: Registry, fake: FakeHub, subfolder: str) -> None:
    with pytest.raises(ExpertRefused) as refused:
        registry.prepare(proposal(subfolder=subfolder))
    assert "path_traversal" in refused.value.codes
    assert fake.asked == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"repo": "org/missing"}, "There is no Hub repository 'org/missing', or it is private"),
        ({"revision": "v9"}, "has no revision 'v9'"),
        ({"subfolder": "nowhere"}, "has no folder 'nowhere'"),
        ({"repo": "not a repo"}, "is not the name of a Hub repository"),
        ({"repo": "a/b/c"}, "is not the name of a Hub repository"),
    ],
)
def test_what_does_not_exist_is_not_found(registry: Registry, source: dict[str, str], says: str) -> None:
    with pytest.raises(SourceNotFound, match=says):
        registry.prepare(proposal(**source))


def test_a_gated_repository_says_how_to_get_in(registry: Registry, fake: FakeHub) -> None:
    fake.gated, fake.token = True, "another"
    with pytest.raises(SourceGated, match="Accept its conditions"):
        registry.prepare(proposal())


def test_a_broken_download_is_resumed_where_it_stopped(
    registry: Registry, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what it keeps of a broken answer
    fake.break_after, fake.breaks = 1500, 2
    registry.prepare(proposal()).close()
    assert fake.ranges == ["bytes=1500-", "bytes=3000-"]


def test_a_download_that_keeps_breaking_leaves_nothing(registry: Registry, fake: FakeHub) -> None:
    fake.break_after, fake.breaks = 0, 1000
    with pytest.raises(SourceUnavailable, match=f"Fetching '{REPO}' from the Hub failed"):
        registry.prepare(proposal())
    assert registry.store.digests() == []
    assert list((registry.store.root / ".staging").iterdir()) == []


def test_no_connection_is_said_to_be_the_reason(tmp_path: Path, base: BaseSpec) -> None:
    hub = Hub(endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache")
    with Registry.open(tmp_path / "data", base=base, hub=hub) as registry, pytest.raises(SourceUnavailable):
        registry.prepare(proposal())


def test_what_is_too_large_is_not_fetched(tmp_path: Path, base: BaseSpec, hub: Hub, fake: FakeHub) -> None:
    with Registry.open(tmp_path / "data", base=base, hub=hub, limits=Limits(max_bytes=100)) as registry:
        with pytest.raises(ExpertRefused) as refused:
            registry.prepare(proposal())
        assert refused.value.codes == {"too_large"}
    assert not any("safetensors" in path for _, path in fake.asked)


def test_a_pickle_alone_is_refused_and_not_fetched(registry: Registry, fake: FakeHub) -> None:
    fake.files["adapter_model.bin"] = fake.files.pop("adapter_model.safetensors")
    with pytest.raises(ExpertRefused) as refused:
        registry.prepare(proposal())
    assert refused.value.codes == {"only_pickle"}
    assert not any(path.endswith(".bin") for _, path in fake.asked)


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_offline_uses_what_was_fetched_before(
    registry: Registry, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    fake.revisions[COMMIT] = COMMIT
    with registry.prepare(proposal(revision=revision)) as prepared:
        online = prepared.expert
    fake.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with registry.prepare(proposal(revision=revision)) as prepared:
        assert prepared.expert.source == online.source
        assert prepared.expert.digest == online.digest
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
        registry.prepare(proposal(repo="org/never-fetched"))
    assert fake.asked == []


def test_progress_over_the_hub_s_own_protocol_only_grows() -> None:
    """Xet cannot be served here, so its reporter is driven by hand."""
    told: list[float] = []
    reporter = XetDownloadProgressReporter(
        reconstruction_desc="", total=10, log_level=logging.INFO, tqdm_class=hub_module._bar(told.append)
    )
    with reporter:
        for done in (3, 7, 10):
            report = SimpleNamespace(
                total_bytes_completed=done,
                total_transfer_bytes_completed=done - 2,
                total_bytes=10,
                total_transfer_bytes=9,
                total_bytes_completion_rate=1.0,
                total_transfer_bytes_completion_rate=1.0,
            )
            reporter.update_progress(report)
    assert told == [0.3, 0.7, 1.0]


def test_the_environment_is_honoured(fake: FakeHub, tmp_path: Path) -> None:
    fake.gated, fake.token = True, "hf_from_environment"
    program = (
        "from adapters_registry.hub import Hub; from adapters_registry.proposal import HubSource; "
        f"print(Hub().resolve(HubSource(repo='{REPO}')).origin)"
    )
    environment = {**os.environ, "HF_ENDPOINT": fake.url, "HF_TOKEN": "hf_from_environment", "HF_HOME": str(tmp_path)}

    def run(**extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env={**environment, **extra}, capture_output=True, text=True, timeout=120)

    assert run().stdout.strip() == f"hub:{REPO}@{COMMIT}"
    offline = run(HF_HUB_OFFLINE="1")
    assert "SourceUnavailable" in offline.stderr
    assert "hf_from_environment" not in offline.stderr
