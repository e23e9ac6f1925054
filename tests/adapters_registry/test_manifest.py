"""Manifests: what they mean, and what is said about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_registry.errors import ManifestError
from adapters_registry.expert import Sample
from adapters_registry.manifest import parse_source, read_manifest
from adapters_registry.proposal import FolderSource, HubSource

GOOD = """\
base_model: {name: quickstart, path: base, context: 512, aliases: [org/base]}
defaults: {licence: Apache-2.0, tags: [demo]}
experts:
  - name: reverse
    source: experts/reverse
    description: Spells a word backwards.
    tags: [spelling, demo]
    training_data: ["generated: 4,000 words, seed 7"]
    samples: samples/reverse.jsonl
  - name: flan
    source: hub:org/repo@v1#sub/folder
    licence: MIT
    samples: [one, {prompt: two, answer: "2"}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "experts/reverse", "samples"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "samples" / "reverse.jsonl").write_text('{"prompt": "abc", "answer": "cba"}\n\n{"prompt": "x"}\n')
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "manifest.yaml").write_text(text)
    return folder / "manifest.yaml"


def problems(folder: Path, text: str) -> list[str]:
    """The problems, without the folder they are in."""
    with pytest.raises(ManifestError) as error:
        read_manifest(write(folder, text))
    return [each.replace(f"{folder}/", "") for each in error.value.problems]


def test_a_manifest_is_a_base_model_and_proposals(folder: Path) -> None:
    manifest = read_manifest(write(folder, GOOD))
    base = manifest.base_model
    assert (base.name, base.model, base.context) == ("quickstart", str(folder / "base"), 512)
    assert base.aliases == ("org/base",)
    reverse, flan = manifest.proposals
    assert reverse.source == FolderSource(path=folder / "experts/reverse")
    assert reverse.licence == "Apache-2.0"
    assert reverse.tags == ("demo", "spelling")
    assert reverse.training_data == ("generated: 4,000 words, seed 7",)
    assert reverse.samples == (Sample(prompt="abc", answer="cba"), Sample(prompt="x"))
    assert flan.source == HubSource(repo="org/repo", revision="v1", subfolder="sub/folder")
    assert (flan.licence, flan.tags) == ("MIT", ("demo",))
    assert flan.training_data is None, "the model card may say"
    assert flan.samples == (Sample(prompt="one"), Sample(prompt="two", answer="2"))


def test_it_may_be_read_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, GOOD)
    monkeypatch.chdir(folder.parent)
    assert read_manifest(Path(folder.name) / "manifest.yaml").base_model.model == str(folder / "base")


@pytest.mark.parametrize(
    ("path", "model", "revision"),
    [("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", None), ("org/name@abc123", "org/name", "abc123")],
)
def test_a_base_model_may_be_on_the_hub(folder: Path, path: str, model: str, revision: str | None) -> None:
    base = read_manifest(write(folder, f"base_model: {{name: b, path: {path}}}")).base_model
    assert (base.model, base.revision) == (model, revision)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hub:org/repo", HubSource(repo="org/repo")),
        ("hub:org/repo@main", HubSource(repo="org/repo", revision="main")),
        ("hub:org/repo@refs/pr/1", HubSource(repo="org/repo", revision="refs/pr/1")),
        ("hub:org/repo#a/b", HubSource(repo="org/repo", subfolder="a/b")),
        ("/abs/folder", FolderSource(path=Path("/abs/folder"))),
        ("../sibling", FolderSource(path=Path("/sibling"))),
    ],
)
def test_sources_are_folders_or_on_the_hub(text: str, source: object) -> None:
    assert parse_source(text, Path("/here")) == source


@pytest.mark.parametrize("text", ["hub:", "hub:a b", "hub:org/repo@"])
def test_half_a_hub_source_is_a_mistake(text: str) -> None:
    with pytest.raises(ValueError, match="write hub:org/repo"):
        parse_source(text, Path("/here"))


BASE = "base_model: {name: b, path: base}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["manifest.yaml:1: manifest: "]),
        ("[]", ["manifest.yaml:1: manifest: "]),
        ("experts: []", ["manifest.yaml:1: base_model: Field required"]),
        ("a: [\n", ["manifest.yaml:2: not YAML: "]),
        ("base_model: {name: b}\n", ["manifest.yaml:1: base_model.path: Field required"]),
        ("base_model:\n  name: b\n  path: ./none\n", ["manifest.yaml:3: base_model.path: there is no folder none"]),
        (BASE + "surprise: 1", ["manifest.yaml:2: surprise: Extra inputs are not permitted"]),
        (
            BASE + "experts:\n- name: a\n  source: experts/reverse\n  lisence: x",
            ["manifest.yaml:5: experts.0.lisence: "],
        ),
        (BASE + "experts:\n- name: a\n  source: gone", ["manifest.yaml:4: experts.0.source: there is no folder gone"]),
        (BASE + "experts:\n- name: A b\n  source: hub:o/r", ["manifest.yaml:3: experts.0.name: 'A b' is not a name"]),
        (BASE + "experts:\n- name: a\n  source: 'hub:'", ["manifest.yaml:4: experts.0.source: 'hub:' is not a Hub"]),
        (
            BASE + "experts:\n- {name: a, source: hub:o/r}\n- {name: a, source: hub:o/s}",
            ["manifest.yaml:4: experts.1.name: there are two experts called 'a'"],
        ),
        (BASE + BASE, ["manifest.yaml:2: base_model: given twice"]),
        (
            BASE + "experts:\n- name: a\n  source: hub:o/r\n  samples: none.jsonl",
            ["manifest.yaml:5: experts.0.samples: cannot read none.jsonl: No such file"],
        ),
        (
            BASE + "experts:\n- name: a\n  source: hub:o/r\n  samples:\n  - fine\n  - ''",
            ["manifest.yaml:7: experts.0.samples.1: a sample prompt is empty"],
        ),
    ],
)
def test_mistakes_are_named_with_their_line(folder: Path, text: str, expected: list[str]) -> None:
    found = problems(folder, text)
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


def test_mistakes_in_a_samples_file_are_named_with_its_lines(folder: Path) -> None:
    (folder / "s.jsonl").write_text('{"prompt": "a"}\nnonsense\n{"prompt": "", "x": 1}\n')
    text = BASE + "experts:\n- name: a\n  source: hub:o/r\n  samples: s.jsonl"
    one, two, three = problems(folder, text)
    assert one.startswith("s.jsonl:2: not JSON")
    assert two.startswith("s.jsonl:3: prompt: ")
    assert three.startswith("s.jsonl:3: x: ")


def test_all_mistakes_are_said_at_once(folder: Path) -> None:
    text = BASE + "experts:\n- {name: A, source: gone}\n- {name: b, source: gone, samples: none.jsonl}"
    assert len(problems(folder, text)) == 4


def test_files_that_cannot_be_read_say_why(folder: Path) -> None:
    with pytest.raises(ManifestError, match="No such file"):
        read_manifest(folder / "nothing.yaml")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_manifest(folder / "binary.yaml")
