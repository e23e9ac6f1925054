"""The files of a report, and the command that writes them."""

from __future__ import annotations

import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval.cli import app
from eval.records import NotARun, Run, write_run
from eval.report import CSV, HTML, JSON, MARKDOWN, write_report
from tests.eval.report.conftest import NAMES, SCRIPT
from tests.eval.report.runs import Made

pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")


class Page(HTMLParser):
    """Tags with their attributes, and text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def page(odd) -> Page:
    return Page((odd / HTML).read_text(encoding="utf-8"))


def test_all_four_files_are_written_and_nothing_else(odd):
    assert {path.name for path in odd.iterdir()} == {
        HTML, MARKDOWN, CSV, JSON, "run.json", "samples.jsonl", "examples.jsonl",
    }  # fmt: skip


def test_the_page_has_everything_that_it_needs(page):
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}]
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    style = next(
        attributes["content"] for tag, attributes in page.tags if "content-security-policy" in str(attributes).lower()
    )
    assert "default-src 'none'" in str(style)


def test_what_models_and_people_wrote_is_text(page):
    text = "".join(page.text)
    assert text.count(SCRIPT) > 3
    assert all(name in text for name in NAMES)
    assert [tag for tag, attributes in page.tags if attributes.get("src") == "x"] == []


def test_ids_are_unique_and_pictures_are_described(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) > 10
    assert all(each["role"] == "img" and len(str(each["aria-label"])) > 40 for each in pictures)
    assert len([tag for tag, _ in page.tags if tag == "figcaption"]) == len(pictures)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")


def test_an_incomplete_run_says_so_everywhere(odd, page):
    assert "This run is incomplete" in "".join(page.text)
    assert "20 records of router-03" in "".join(page.text)
    assert "This run is incomplete" not in (odd / MARKDOWN).read_text(encoding="utf-8")
    assert "INCOMPLETE" in (odd / MARKDOWN).read_text(encoding="utf-8")
    assert json.loads((odd / JSON).read_text(encoding="utf-8"))["table"]["complete"] is False
    with (odd / CSV).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["complete"] for row in rows} == {"False"}
    assert sum(int(row["missing"]) for row in rows if row["router"] == "router-03") == 5  # of ood it has no row
    lacking = [
        attributes["class"]
        for tag, attributes in page.tags
        if tag == "tr" and "lacking" in str(attributes.get("class"))
    ]
    assert len(lacking) == 2  # semi-ood lacks 5, ood has none at all


def test_a_complete_run_has_no_banner(make):
    folder = make(experts=2, routers=1, per_task=2, regimes=("in-distribution",), traced=False)
    write_report(folder)
    text = (folder / HTML).read_text(encoding="utf-8")
    assert "Complete: all" in text
    assert 'role="alert"' not in text
    assert "INCOMPLETE" not in (folder / MARKDOWN).read_text(encoding="utf-8")


def test_json_holds_what_the_pictures_show(odd):
    told = json.loads((odd / JSON).read_text(encoding="utf-8"))
    assert set(told["table"]["regimes"]) == {"in-distribution", "semi-ood", "ood"}
    assert told["expert_matrix"]["columns"][0] == "base model"
    assert set(told["confusion"]) == {*NAMES, "router-02", "router-03", "evidence gate"}
    assert told["abstention"]["in-distribution"]["router-02"]["answered"][-1] <= 1
    assert told["gates"][0]["gate"] == "evidence"
    assert told["losses"][0]["worst"][0]["right"] == ["right"]


def test_a_run_of_which_nothing_came_is_reported_as_such(tmp_path):
    run = Run(suite="nothing", digest="0", expected=10, missing=("everything",), routers=tuple(Made().infos()))
    write_run(tmp_path, run, [])
    write_report(tmp_path)
    text = (tmp_path / HTML).read_text(encoding="utf-8")
    assert "This run is incomplete" in text
    assert text.count("no records at all") > 10


def test_without_matplotlib_there_is_no_page_and_a_hint(make, monkeypatch):
    folder = make(experts=2, routers=2, per_task=1, regimes=("in-distribution",), traced=False)
    (folder / HTML).write_text("of another run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert not (folder / HTML).exists()
    assert all((folder / name).exists() for name in (JSON, CSV, MARKDOWN))
    assert "pip install 'moerge[eval]'" in result.stderr


def test_the_command_writes_the_same_bytes_again_and_leaves_with_3_when_samples_lack(odd):
    before = {path.name: path.read_bytes() for path in odd.iterdir()}
    result = CliRunner().invoke(app, ["report", str(odd), "--json"])
    assert result.exit_code == 3, result.output
    told = json.loads(result.stdout)
    assert told["complete"] is False
    assert [Path(path).name for path in told["files"]] == [HTML, JSON, CSV, MARKDOWN]
    assert "incomplete" in result.stderr
    assert {path.name: path.read_bytes() for path in odd.iterdir()} == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(NotARun):
        write_report(tmp_path)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert re.search(r"run\.json", result.stderr)
    assert "Traceback" not in result.output
