"""The repository itself: nothing left over, no machine's paths, documentation that hangs together, layers."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
THIS = Path(__file__)

# Written so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(" + "|".join(("work", "root", "farm")) + r")/")
LEFTOVER = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")) + r")\b")
SHARED = ".." + "/shared"
#: The only addresses that building and installing may name.
BUILD_HOSTS = {"download.pytorch.org", "127.0.0.1"}
BUILD_FILES = (
    "Makefile",
    "Dockerfile",
    "pyproject.toml",
    "requirements/*",
    ".ci/*",
    ".pre-commit-config.yaml",
    "deploy/*",
)


@cache
def tracked() -> tuple[Path, ...]:
    """The files in Git that are here."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("git is not installed, so that nothing says which files belong to the project")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"git does not list the project's files: {error.stderr.strip()}")
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


@cache
def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content and path != THIS:
            found[path] = content.decode()
    return found


def hits(pattern: re.Pattern[str], among: dict[Path, str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path, text in among.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_names_a_path_of_somebody_s_machine():
    assert hits(MACHINE_PATH, texts()) == []


def test_nothing_is_left_to_be_done_in_code_or_prose():
    among = {path: text for path, text in texts().items() if path.suffix in {".py", ".md", ".yaml", ".toml", ""}}
    assert hits(LEFTOVER, among) == []


def test_only_tests_and_measurements_know_of_material_beside_the_repository():
    among = {path: text for path, text in texts().items() if path.relative_to(ROOT).parts[0] not in ("tests", "eval")}
    assert hits(re.compile(re.escape(SHARED)), among) == []


def test_building_asks_nobody_but_the_usual_indexes():
    files = {path for pattern in BUILD_FILES for path in ROOT.glob(pattern) if path in texts()}
    assert files
    for path in files:
        hosts = set(re.findall(r"https?://([^/\s:\"']+)", texts()[path]))
        assert hosts <= BUILD_HOSTS, path.name
    for lock in ROOT.glob("requirements/*.lock"):
        odd = [line for line in lock.read_text().splitlines() if not re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line)]
        assert odd == [], f"{lock.name}: only pinned versions, no indexes, files or options"


def test_no_large_files_but_the_testbed_s_weights():
    large = [path.relative_to(ROOT) for path in tracked() if path.stat().st_size > 2**20]
    assert [path for path in large if path.parts[:3] != ("eval", "testbed", "data")] == []


def test_the_import_layers_hold():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# Documentation

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


def pages() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


def prose(page: Path) -> str:
    """The page without its code, where brackets mean other things."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> list[tuple[Path, str]]:
    """The internal links: the file that each means, and the heading, '' for none."""
    found = []
    for inline, reference in LINK.findall(prose(page)):
        target = inline or reference
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            name, _, anchor = target.partition("#")
            found.append(((page.parent / name).resolve() if name else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", text, flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def test_every_internal_link_leads_somewhere():
    broken = []
    for page in pages():
        for target, anchor in links(page):
            where = f"{page.relative_to(ROOT)} -> {target.relative_to(ROOT) if target.is_relative_to(ROOT) else target}"
            if not target.exists():
                broken.append(where)
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                broken.append(f"{where}#{anchor}")
    assert broken == []


def test_every_page_can_be_found_from_the_index():
    seen, waiting = set[Path](), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".md" and page.is_file():
            seen.add(page)
            waiting += [target for target, _ in links(page)]
    lost = {page for page in pages() if page.is_relative_to(DOCS)} - seen
    assert sorted(str(page.relative_to(ROOT)) for page in lost) == []


def exported() -> dict[str, MetricWrapperBase]:
    """Our metrics under the names that /metrics shows: counters end in _total."""
    from serving import metrics

    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            [family] = CollectorRegistry.collect(_only(metric))
            found[family.name + ("_total" if family.type == "counter" else "")] = metric
    return found


def _only(metric: MetricWrapperBase) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(metric)
    return registry


def test_every_metric_is_documented_with_its_labels():
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(moerge_\w+)` \| (\w+)(?:: ([^|]*))? \|", text, flags=re.MULTILINE)
    documented = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == {name: (metric._type, metric._labelnames) for name, metric in exported().items()}
