"""Who may import whom: the three packages, the layers inside elasticmoe_sglang, and no module itself in a circle.

Read from the source (every import statement, inside functions too), so that an import on a path no test runs counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[2]

PACKAGES = {
    "elasticmoe_sglang": REPOSITORY / "elasticmoe_sglang",
    "elasticmoe_kernels": REPOSITORY / "kernels" / "elasticmoe_kernels",
    "elasticmoe_patches": REPOSITORY / "patches" / "elasticmoe_patches",
}

FORBIDDEN = {
    # Behaviour knows nothing of SGLang; where it needs a fact about it, it runs elasticmoe_patches as a program.
    "elasticmoe_sglang": ("sglang", "sgl_kernel", "elasticmoe_patches"),
    # Device code works on raw tensors.
    "elasticmoe_kernels": ("sglang", "sgl_kernel", "elasticmoe_patches", "elasticmoe_sglang"),
    "elasticmoe_patches": (),
}

LAYERS: tuple[tuple[str, ...], ...] = (
    ("", "errors"),
    ("generated_page",),
    (
        "units",
        "undo",
        "event_loop",
        "wire.envelope",
        "models",
        "faults",
        "descriptors",
        "lifeline",
        "run_dir_reaper",
        "live_figures",
        "cpu_bind",
        "answers",
    ),
    ("tiny_model", "model_shape", "models.docs"),
    ("policy.settings",),
    ("config", "comm.membership", "wire"),
    ("runtime", "launch_config"),
    ("hmm", "planner"),
    ("comm",),
    ("worker",),
    ("imm",),
    ("coordinator",),
    ("metrics", "tracing"),
    ("policy",),
    ("api",),
    ("cli",),
)
"""elasticmoe_sglang from the bottom up. A module imports from its own entry and from lower layers, never from another
entry of its layer. The longest entry that a module's name starts with is its own; "" is the package itself."""


def modules(package: str) -> Iterator[tuple[str, Path]]:
    root = PACKAGES[package]
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))), path


def nodes(node: ast.AST, *, at_run_time: bool) -> Iterator[ast.AST]:
    """The node and all below it; with `at_run_time` without the bodies of `if TYPE_CHECKING:`."""
    if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
        for child in node.orelse:
            yield from nodes(child, at_run_time=at_run_time)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from nodes(child, at_run_time=at_run_time)


def imported_names(path: Path, *, at_run_time: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, by statement or by a literal given to import_module."""
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), at_run_time=at_run_time):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; the project imports by full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "resolve_name"):
                yield node.lineno, str(node.args[0].value)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_entry(module: str) -> tuple[int, str]:
    """Layer number and entry of a module or imported name of elasticmoe_sglang."""
    name = module.removeprefix("elasticmoe_sglang").removeprefix(".")
    found = [
        (len(entry), number, entry)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if entry and inside(name, entry)
    ]
    if found:
        _, number, entry = max(found)
        return number, entry
    return 0, ""


def imported_modules(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Each module's imports among `files` (module -> path): of a module, or of a name in it."""
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for _, name in imported_names(path, at_run_time=True):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One circle of imports, its first module also last; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def test_no_module_imports_itself_in_a_circle() -> None:
    files = dict(found for package in PACKAGES for found in modules(package))
    assert circle(imported_modules(files)) == []


def test_the_check_sees_circles_in_functions_and_none_for_type_checkers(tmp_path: Path) -> None:
    sources = {
        "package": "",
        "package.a": "import os\nfrom package.b import name\n",
        "package.b": "def f():\n    from package import c\n",
        "package.c": "import typing\nif typing.TYPE_CHECKING:\n    import package.a\n",
    }
    files = {module: tmp_path / module for module in sources}
    for module, source in sources.items():
        files[module].write_text(source)
    graph = imported_modules(files)
    assert graph == {"package": set(), "package.a": {"package.b"}, "package.b": {"package.c"}, "package.c": set()}
    assert circle(graph) == []
    files["package.c"].write_text("import package.a.name\n")
    assert sorted(set(circle(imported_modules(files)))) == ["package.a", "package.b", "package.c"]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package: str) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for _, path in modules(package)
        for line, name in imported_names(path)
        if any(inside(name, forbidden) for forbidden in FORBIDDEN[package])
    ]
    assert wrong == []


def test_layers_import_downwards() -> None:
    wrong = []
    for module, path in modules("elasticmoe_sglang"):
        own_layer, own_entry = layer_entry(module)
        for line, name in imported_names(path):
            if not inside(name, "elasticmoe_sglang"):
                continue
            layer, entry = layer_entry(name)
            if entry != own_entry and layer >= own_layer:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line}: {own_entry or 'the package'} imports {name}")
    assert wrong == []


def test_every_part_has_its_layer() -> None:
    known = {entry.split(".")[0] for layer in LAYERS for entry in layer}
    parts = {
        path.stem if path.is_file() else path.name
        for path in PACKAGES["elasticmoe_sglang"].iterdir()
        if path.suffix == ".py" or list(path.glob("*.py"))
    }
    assert parts - known - {"__init__"} == set(), "name the new part in LAYERS"


def test_the_check_itself_sees_imports(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import sglang.srt\nfrom sglang import x\n"
        "def f():\n    import importlib\n    importlib.import_module('sglang.y')\n"
    )
    assert [name for _, name in imported_names(source) if inside(name, "sglang")] == [
        "sglang.srt",
        "sglang.x",
        "sglang.y",
    ]
    assert not inside("sglang_other", "sglang")
    assert layer_entry("elasticmoe_sglang.comm.membership") == (5, "comm.membership")
    assert layer_entry("elasticmoe_sglang.comm.commit_barrier")[1] == "comm"
    assert layer_entry("elasticmoe_sglang.SUPPORTED_SGLANG") == (0, "")
