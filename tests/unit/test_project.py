"""Rules of the project that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.test_import_directions import PACKAGES, modules

REPOSITORY = Path(__file__).parents[2]

MAX_LINES = 700
LONGER_FOR_A_REASON: dict[str, str] = {}
"""Path of a file that may be longer than MAX_LINES -> why it cannot be split."""

MACHINE_PATHS = re.compile(r"""(?<![\w.<$}~-])/(?:work|root|home/\w+|Users/\w+|mnt|opt/pypi\S*|tmp/\w+/\w+)(?:/|\b)""")
REGISTRY_HOSTS = re.compile(
    r"https?://[\w.-]*(?:pypi|pythonhosted|artifactory|nexus|registry|devpi|anaconda|mirror)", re.IGNORECASE
)


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
    )
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def occurrences(pattern: re.Pattern[str], path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs/architecture.md"])
def test_the_documents_exist(name: str) -> None:
    assert (REPOSITORY / name).read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_too_long(package: str) -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for _, path in modules(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert set(long) <= set(LONGER_FOR_A_REASON), f"split these, or give the reason in this test: {long}"


def test_the_exceptions_are_still_needed() -> None:
    for name, reason in LONGER_FOR_A_REASON.items():
        assert reason and len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) > MAX_LINES, name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str) -> None:
    root = PACKAGES[package]
    folders = {folder for path in root.rglob("*.py") for folder in (path.parent, *path.parent.parents)}
    bare = [folder for folder in folders if folder.is_relative_to(root) and not (folder / "__init__.py").exists()]
    assert bare == [], "without __init__.py a folder is not installed"


def test_every_test_file_has_a_name_of_its_own() -> None:
    """Folders of tests are no packages: of two files with one name pytest collects the first and ends at the second."""
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []


@pytest.mark.process
@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_tracked_files_name_no_machine(pattern: re.Pattern[str]) -> None:
    found = [line for path in tracked_text_files() if path != Path(__file__) for line in occurrences(pattern, path)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cd /work/main", True),
        ('path = "/root/.cache"', True),
        ("see /home/someone/src", True),
        ("in the /dev/shm folder", False),
        ("docs/work/main and $HOME/work", False),
        ("the network/root of it", False),
    ],
)
def test_the_pattern_for_machine_paths(text: str, found: bool) -> None:
    assert bool(MACHINE_PATHS.search(text)) is found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    silent = [
        str(path.relative_to(REPOSITORY))
        for _, path in modules(package)
        if (tree := ast.parse(path.read_text(encoding="utf-8"))).body and not ast.get_docstring(tree)
    ]
    assert silent == []
