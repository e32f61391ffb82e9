"""Every attribute of SGLang's that the code under `patches/` touches is declared.

That the installed SGLang has them, and that its hooked bodies are those that were read, is in test_doctor.py: preflight
as a program.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_patches import bodies
from elasticmoe_patches.catalogue import all_hooks
from elasticmoe_patches.usecheck import find_missing
from elasticmoe_patches.uses import USES, Use, imports
from elasticmoe_sglang import SUPPORTED_SGLANGS
from tests.helpers.sglang_uses import touches, touches_in

_BUILTIN = """
    __func__ __module__ __mro__ __qualname__ addcmul_ append clear clone close dtype eval expand extend fget flatten get
    is_cuda items itemsize load_weights long named_modules numel pop popleft rank repeat scatter_add_ shape sigmoid
    startswith stride synchronize to tolist unsqueeze values wait_stream _replace
"""
_LIBRARIES = "add_signal_handler architectures lifespan_context pid returncode router run_until_complete to_json_string"
"""Of asyncio, FastAPI, subprocess and transformers."""
_GROUPS = "deterministic kernel moe"
"""Of SGLang's published configuration, whose leaves are declared as arguments."""
_READER = "read"
"""Of SGLang's load snapshots, whose reader has one class a transport."""
_OURS = "admit ask before command drop flush members operation_id ranks retiring retiring_rank to_ranks"
"""Of our messages, and of what we put into SGLang's places."""
OF_OTHERS = frozenset(" ".join((_BUILTIN, _LIBRARIES, _GROUPS, _READER, _OURS)).split())
"""Attributes that are not SGLang's, of objects of which no class is known."""


def undeclared(found: Any) -> list[str]:
    names = defaultdict(set)
    for use in (*USES, *imports()):
        names[use.owner].add(use.name)
    known = OF_OTHERS.union(*names.values())
    return [
        f"{touch.place}: {' or '.join(touch.owners) or '(class not known)'}.{touch.name}"
        for touch in found
        if not touch.name.startswith(("elasticmoe_", "elastic_kv"))  # ours, on objects of SGLang's
        and touch.name not in (set().union(*(names[owner] for owner in touch.owners)) if touch.owners else known)
    ]


@pytest.mark.process
def test_nothing_of_sglangs_is_used_without_being_declared() -> None:
    found = touches()
    assert len(found) > 400
    assert undeclared(found) == [], "declare it in patches/elasticmoe_patches/uses.py, after reading its source"


@pytest.mark.parametrize(
    "line",
    [
        "scheduler.gone",
        "scheduler.gone = 1",
        "getattr(scheduler, 'gone', None)",
        "cache = scheduler.tree_cache\n    cache.gone()",
        "for req in scheduler.waiting_queue:\n        req.gone",
        "x = [entry.gone for entry in scheduler.waiting_queue]",
        "from sglang.srt.runtime_context import get_exec\n    get_exec().gone",
    ],
)
def test_a_new_use_is_found(line: str) -> None:
    source = f"from typing import Any\n\ndef function(scheduler: Any) -> None:\n    {line}\n"
    assert [entry.rpartition(".")[2] for entry in undeclared(touches_in(Path("worker/new.py"), ast.parse(source)))] == [
        "gone"
    ]


def test_an_override_of_nothing_is_found() -> None:
    source = (
        "from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool\n\n"
        "class Pool(MHATokenToKVPool):\n    def _make_buffers(self):\n        self.own = self._helper()\n\n"
        "    def _helper(self):\n        return 1\n"
    )
    found = undeclared(touches_in(Path("platform/new.py"), ast.parse(source)))
    assert [entry.rpartition(".")[2] for entry in found] == ["_make_buffers", "own"]


def test_each_use_is_declared_once_and_for_versions_that_exist() -> None:
    keys = [(use.owner, use.name) for use in USES]
    assert sorted(key for key in set(keys) if keys.count(key) > 1) == []
    assert all(set(use.versions) <= set(SUPPORTED_SGLANGS) for use in USES)


def test_the_hooked_bodies_of_every_supported_version_were_read() -> None:
    recorded = json.loads(bodies.RECORD.read_text(encoding="utf-8"))
    assert sorted(recorded) == sorted(SUPPORTED_SGLANGS)
    assert all(set(recorded[version]) <= {spec.target for spec in all_hooks()} for version in recorded)


class Sample:
    annotated: int

    def __init__(self, other: Any) -> None:
        self.assigned, other.elsewhere = 1, 2

    def method(self) -> None:
        """Sets nothing."""

    @property
    def prop(self) -> int:
        self.by_property = 1
        return 1


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("annotated", "read", None),
        ("assigned", "set", None),
        ("by_property", "set", None),
        ("prop", "read", None),
        ("method", "call", None),
        ("elsewhere", "set", "no such attribute"),
        ("gone", "read", "no such attribute"),
        ("annotated", "call", "is a NoneType, not a method"),
    ],
)
def test_what_a_class_provides(name: str, kind: Any, problem: str | None) -> None:
    found = find_missing([Use(owner=f"{__name__}.Sample", name=name, kind=kind)])
    assert [missing.problem for missing in found] == ([problem] if problem else [])


@pytest.mark.process
def test_what_cannot_be_imported_here_is_told_from_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's model cannot be imported on a GPU without its kernel library; other models are served there."""
    package = tmp_path / "outer_of_uses" / "inner"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "bad.py").write_text("import a_library_that_is_not_installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    for owner, name, unimportable in (
        ("outer_of_uses.inner.bad", "Name", True),
        ("outer_of_uses.inner.bad.Name", "attribute", True),
        ("outer_of_uses.inner", "bad", True),
        ("outer_of_uses.inner", "nothing", False),
        ("outer_of_uses.nothing", "name", False),
    ):
        [missing] = find_missing([Use(owner=owner, name=name, kind="import")])
        assert missing.unimportable is unimportable, missing
