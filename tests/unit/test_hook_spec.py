"""Hooks as data: declarations, the check against the installed SGLang, installing, and checking again afterwards.

The targets are either real ones of the installed SGLang or small modules made here under `sglang.fake_*`, so that a
wrong signature, an overwritten function or a stale import can be produced at will.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_patches import catalogue, hookdocs, plugin, preflight, targets
from elasticmoe_patches.spec import WORKERS, Hooks, HookSpec
from elasticmoe_sglang.errors import HookError
from elasticmoe_sglang.runtime import ENV_CONFIG

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[2]
REAL_TARGET = "sglang.srt.server_args.ServerArgs.from_cli_args"
REAL_SIGNATURE = "(cls, args)"

_numbers = itertools.count()


class Fake:
    """A module of SGLang's with a function, a class and a constant, and a module that imports the function by name."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.name = f"sglang.fake_{number}"
        self.importer_name = f"sglang.fake_importer_{number}"
        self.module = types.ModuleType(self.name)
        exec(_FAKE_SOURCE, vars(self.module))
        self.importer = types.ModuleType(self.importer_name)
        self.importer.double = self.module.double
        sys.modules[self.name] = self.module
        sys.modules[self.importer_name] = self.importer

    def spec(self, name: str, kind: str, hook: Callable[..., Any] | type, **fields: Any) -> HookSpec:
        hook_name = f"hook_{next(_numbers)}"
        setattr(sys.modules[__name__], hook_name, hook)
        defaults = {"signature": "(x, *, y=1)", "reason": "a test", "expires": "never"}
        return HookSpec(
            target=f"{self.name}.{name}", kind=kind, hook=f"{__name__}:{hook_name}", **{**defaults, **fields}
        )


_FAKE_SOURCE = """
LIMIT = 3

def double(x: int, *, y: float = 1) -> int:
    return 2 * x * y

class Thing:
    alias = staticmethod(double)

    def method(self, x: int, *, y: float = 1) -> int:
        return x + y

    @classmethod
    def build(cls, x: int, *, y: float = 1) -> tuple:
        return (cls.__name__, x)

    @staticmethod
    def helper(x: int, *, y: float = 1) -> int:
        return -x

    @property
    def size(self) -> int:
        return 7

class Child(Thing):
    pass
"""


@pytest.fixture
def fake() -> Fake:
    import sglang  # noqa: F401  (the parent package of the fakes)

    return Fake()


def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return ("around", original(*args, **kwargs))


def after(result: Any, *args: Any, **kwargs: Any) -> Any:
    return ("after", result)


def real_spec(**fields: Any) -> HookSpec:
    defaults: dict[str, Any] = {
        "target": REAL_TARGET,
        "kind": "around",
        "hook": f"{__name__}:around",
        "signature": REAL_SIGNATURE,
        "reason": "a test",
        "expires": "never",
    }
    return HookSpec(**{**defaults, **fields})


# -- declarations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "instead"),
        ("scope", "sometimes"),
        ("processes", frozenset({"rank"})),
        ("processes", frozenset()),
        ("hook", "module.function"),
        ("target", "module"),
        ("rebind", ("module",)),
        ("reason", ""),
        ("expires", ""),
        ("signature", ""),
        ("versions", ()),
    ],
)
def test_a_malformed_declaration_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=REAL_TARGET if field != "target" else "module"):
        real_spec(**{field: value})


def test_the_processes_say_where_a_hook_runs() -> None:
    spec = real_spec(processes=frozenset({"worker", "standby"}))
    assert [name for name in ("main", "dpc", "worker", "standby", "any") if spec.runs_in(name)] == [
        "worker",
        "standby",
        "any",
    ]
    assert real_spec().runs_in("main")


def test_a_hook_is_declared_by_decorating_its_function() -> None:
    hook = Hooks("elasticmoe_patches.srt.managers.scheduler", WORKERS, scope="platform")

    @hook("after", "Scheduler.f(self, x='a(b)', *, y=1)", expires="never")
    @hook("attribute", "_is_cpu: bool", scope="both", expires="soon")
    def function() -> None:
        """Why it is
        needed.

        How it works.
        """

    attribute, method = hook
    assert method == HookSpec(
        target="sglang.srt.managers.scheduler.Scheduler.f",
        kind="after",
        hook=f"{__name__}:{function.__qualname__}",
        signature="(self, x='a(b)', *, y=1)",
        reason="Why it is needed.",
        expires="never",
        scope="platform",
        processes=WORKERS,
    )
    assert (attribute.target, attribute.signature) == ("sglang.srt.managers.scheduler._is_cpu", "bool")
    assert (attribute.kind, attribute.scope, attribute.expires) == ("attribute", "both", "soon")


def test_a_hook_without_a_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="reason must not be empty"):
        Hooks("elasticmoe_patches.srt.server_args", WORKERS)("after", "f()", expires="never")(lambda result: None)


def test_signature_text_has_no_annotations_and_no_addresses(fake: Fake) -> None:
    marker = object()
    fake.module.odd = lambda a, /, b=marker, *rest, c, **more: None
    texts = {
        name: targets.signature_text(targets.resolve(f"{fake.name}.{name}"))
        for name in ("double", "Thing.method", "Thing.build", "Thing.helper", "Thing.size", "LIMIT", "odd")
    }
    assert texts == {
        "double": "(x, *, y=1)",
        "Thing.method": "(self, x, *, y=1)",
        "Thing.build": "(cls, x, *, y=1)",
        "Thing.helper": "(x, *, y=1)",
        "Thing.size": "property",
        "LIMIT": "int",
        "odd": "(a, /, b=<object object>, *rest, c, **more)",
    }


# -- the catalogue and its page ---------------------------------------------------------------------------------------


def test_reading_the_catalogue_does_not_import_sglang() -> None:
    code = (
        "import sys; from elasticmoe_patches import catalogue, hookdocs; hookdocs.render(catalogue.all_hooks());"
        "bad = [m for m in sys.modules if m.split('.')[0] == 'sglang']; sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_module_with_hooks_has_the_path_of_one_of_sglangs() -> None:
    import elasticmoe_patches

    root = Path(elasticmoe_patches.__file__).parent
    paths = [path.relative_to(root) for path in (root / "srt").rglob("*.py") if path.name != "__init__.py"]
    [upstream] = importlib.util.find_spec("sglang").submodule_search_locations
    assert [str(path) for path in paths if not (Path(upstream) / path).is_file()] == []
    assert len(paths) >= len(catalogue.hook_modules()) > 10


def test_every_declared_hook_fits_the_installed_sglang() -> None:
    problems = [str(mismatch) for mismatch in preflight.find_mismatches(catalogue.all_hooks())]
    assert problems == []


@pytest.mark.parametrize(
    ("error", "left_out"),
    [
        (ModuleNotFoundError("No module named 'deep_gemm'", name="deep_gemm"), True),
        (ImportError("libcudart.so.13: cannot open shared object file"), True),
        (ModuleNotFoundError("gone", name="sglang.srt.models.glm4_moe"), False),  # another SGLang: that is a mismatch
    ],
)
def test_hooks_on_a_model_that_this_machine_cannot_import_are_left_out(
    error: ImportError, left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang 0.5.21's glm4_moe imports deep_gemm where there are GPUs: without it no server started, of any model."""
    specs = [spec for spec in catalogue.all_hooks() if spec.target.startswith("sglang.srt.models.")]
    gone = [spec for spec in specs if ".glm4_moe." in spec.target]
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> types.ModuleType:
        if name == "sglang.srt.models.glm4_moe":
            raise error
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    preflight._lacks_a_package.cache_clear()
    try:
        kept = preflight._reachable(specs)
    finally:
        preflight._lacks_a_package.cache_clear()
    assert gone and len(specs) > len(gone)
    assert kept == ([spec for spec in specs if spec not in gone] if left_out else specs)


def test_the_page_of_hooks_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    status = hookdocs.main(["--check", str(REPOSITORY / "docs" / "hooks.md")])
    assert status == 0, capsys.readouterr().out


def test_the_page_check_sees_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "hooks.md"
    assert hookdocs.main(["--check", str(page)]) == 1
    assert hookdocs.main([str(page)]) == 0
    assert hookdocs.main(["--check", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8") + "one line more\n", encoding="utf-8")
    assert hookdocs.main(["--check", str(page)]) == 1
    assert "one line more" in capsys.readouterr().out


def test_the_page_names_every_field() -> None:
    spec = real_spec(reason="Because of that.", expires="upstream does it", rebind=("sglang.other.from_cli_args",))
    page = hookdocs.render([spec])
    for text in (REAL_TARGET, "around", "Because of that.", "upstream does it", "sglang.other.from_cli_args", "any"):
        assert text in page


# -- checking ---------------------------------------------------------------------------------------------------------


def test_a_fitting_hook_passes() -> None:
    preflight.check([real_spec()])


def test_a_wrong_version_is_refused(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    monkeypatch.setattr(preflight, "sglang_version", lambda: "0.5.99")
    spec = fake.spec("double", "around", around)
    with pytest.raises(
        HookError, match=r"version 0\.5\.99 is installed, the hooks were written for 0\.5\.21, 0\.5\.23"
    ) as caught:
        preflight.install([spec], "main")
    assert "pip install --no-deps sglang==0.5.23" in str(caught.value)
    assert fake.module.double(2) == 4


def test_a_changed_signature_is_refused(fake: Fake) -> None:
    spec = fake.spec("double", "around", around, signature="(x)")
    with pytest.raises(HookError, match=r"has signature \(x, \*, y=1\), expected \(x\)"):
        preflight.install([spec], "main")
    assert fake.module.double(2) == 4


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"target": "sglang.srt.server_args.ServerArgs.gone"}, "cannot be resolved: AttributeError"),
        ({"target": "sglang.srt.gone.thing"}, "cannot be resolved: "),
        ({"hook": "elasticmoe_patches.gone:hook"}, "the hook cannot be imported: ModuleNotFoundError"),
        ({"hook": f"{__name__}:REAL_TARGET"}, "the hook is a str, not a function or class"),
    ],
)
def test_what_is_not_there_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(HookError, match=problem):
        preflight.check([real_spec(**fields)])


def test_targets_that_the_registry_would_break_are_refused(fake: Fake) -> None:
    for spec, problem in (
        (fake.spec("Thing.size", "around", around, signature="property"), "only a hook of kind attribute"),
        (fake.spec("LIMIT", "after", after, signature="int"), "only a hook of kind attribute"),
        (fake.spec("Child.build", "after", after, signature="(cls, x, *, y=1)"), "name the class that defines it"),
    ):
        with pytest.raises(HookError, match=problem):
            preflight.check([spec])


def test_one_error_lists_all_mismatches_and_nothing_is_hooked(fake: Fake) -> None:
    good = fake.spec("double", "around", around)
    bad = [fake.spec("Thing.method", "around", around, signature="(self)"), real_spec(target="sglang.srt.gone.thing")]
    with pytest.raises(HookError) as caught:
        preflight.install([good, *bad], "main")
    assert "Thing.method" in str(caught.value) and "sglang.srt.gone.thing" in str(caught.value)
    assert fake.module.double(2) == 4


def test_the_table_tells_good_from_bad(fake: Fake) -> None:
    rows = preflight.table([fake.spec("double", "around", around), fake.spec("gone", "around", around)])
    assert [row["ok"] for row in rows] == [True, False]
    assert rows[0]["problem"] is None and "AttributeError" in rows[1]["problem"]


# -- installing -------------------------------------------------------------------------------------------------------


def test_every_kind_of_hook_takes_effect(fake: Fake) -> None:
    def before(*args: Any, **kwargs: Any) -> Any:
        return (args[0], args[1] * 10), kwargs

    specs = [
        fake.spec("double", "around", around),
        fake.spec("Thing.method", "before", before, signature="(self, x, *, y=1)"),
        fake.spec("Thing.build", "after", after, signature="(cls, x, *, y=1)"),
        fake.spec("Thing.helper", "replace", lambda x, *, y=1: ("replaced", x)),
        fake.spec(
            "Thing.size", "attribute", lambda value: property(lambda self: value.fget(self) + 1), signature="property"
        ),
        fake.spec("LIMIT", "attribute", lambda value: value + 1, signature="int"),
    ]
    assert set(preflight.install(specs, "worker")) == set(specs)
    thing = fake.module.Thing()
    assert fake.module.double(2) == ("around", 4)
    assert fake.importer.double(2) == ("around", 4)
    assert thing.method(2) == 21
    assert fake.module.Thing.build(5) == ("after", ("Thing", 5))
    assert fake.module.Child.build(5) == ("after", ("Child", 5))
    assert fake.module.Thing.helper(3) == ("replaced", 3)
    assert thing.size == 8
    assert fake.module.LIMIT == 4
    preflight.verify_installed(specs, "worker")


def test_a_class_is_replaced_before_its_methods_are_wrapped(fake: Fake) -> None:
    class Better(fake.module.Thing):  # type: ignore[misc, name-defined]
        def method(self, x: int, *, y: float = 1) -> Any:
            return "better"

    wrap = fake.spec("Thing.method", "after", after, signature="(self, x, *, y=1)")
    swap = fake.spec("Thing", "replace", Better, signature="()")
    preflight.install([wrap, swap], "worker")
    assert fake.module.Thing is Better
    assert fake.module.Thing().method(1) == ("after", "better")
    preflight.verify_installed([wrap, swap], "worker")


def test_installing_twice_wraps_once_and_other_processes_hooks_stay_out(fake: Fake) -> None:
    spec = fake.spec("double", "around", around)
    other = fake.spec("Thing.method", "around", around, signature="(self, x, *, y=1)", processes=frozenset({"dpc"}))
    assert preflight.install([spec, other], "worker") == (spec,)
    assert preflight.install([spec, other], "worker") == ()
    assert fake.module.double(2) == ("around", 4)
    assert fake.module.Thing().method(1) == 2


def test_a_later_hook_on_a_hooked_target_is_applied_too(fake: Fake) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    first, second = fake.spec("double", "around", around), fake.spec("double", "after", after)
    preflight.install([first], "main")
    HookRegistry.apply_hooks()
    preflight.install([second], "main")
    assert fake.module.double(2) == ("after", ("around", 4))
    assert fake.importer.double(2) == ("after", ("around", 4))
    preflight.verify_installed([first, second], "main")


def test_hooks_of_other_plugins_on_the_same_target_still_apply(fake: Fake) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    spec = fake.spec("double", "around", around)
    preflight.install([spec], "main")
    HookRegistry.register(spec.target, lambda result, *args, **kwargs: ("foreign", result), HookType.AFTER)
    try:
        HookRegistry.apply_hooks()
        assert fake.module.double(2) == ("foreign", ("around", 4))
        preflight.verify_installed([spec], "main")
    finally:
        del HookRegistry._hooks[spec.target]


def test_a_replacement_may_not_bury_hooks_installed_before(fake: Fake) -> None:
    preflight.install([fake.spec("double", "around", around)], "main")
    with pytest.raises(HookError, match="would replace what"):
        preflight.install([fake.spec("double", "replace", lambda x, *, y=1: 0)], "main")


def test_a_hook_that_cannot_be_applied_is_an_error(fake: Fake) -> None:
    def refuse(value: int) -> int:
        raise RuntimeError("no")

    with pytest.raises(HookError, match=r"(?s)is half hooked.*could not be applied: RuntimeError"):
        preflight.install([fake.spec("LIMIT", "attribute", refuse, signature="int")], "main")


# -- checking again once the server stands ----------------------------------------------------------------------------


def test_a_hook_that_was_never_installed_is_found(fake: Fake) -> None:
    with pytest.raises(HookError, match="was never installed in this process"):
        preflight.verify_installed([fake.spec("double", "around", around)], "main")


def test_an_overwritten_function_is_found(fake: Fake) -> None:
    spec = fake.spec("double", "around", around)
    preflight.install([spec], "main")
    fake.module.double = lambda x, *, y=1: x
    with pytest.raises(HookError, match=r"(?s)has lost hooks.*was overwritten"):
        preflight.verify_installed([spec], "main")


def test_an_overwritten_attribute_is_found(fake: Fake) -> None:
    spec = fake.spec("LIMIT", "attribute", lambda value: value + 1000, signature="int")
    preflight.install([spec], "main")
    fake.module.LIMIT = 3
    with pytest.raises(HookError, match=r"was overwritten \(now a int\)"):
        preflight.verify_installed([spec], "main")


def test_a_module_imported_again_is_found(fake: Fake) -> None:
    spec = fake.spec("double", "around", around)
    preflight.install([spec], "main")
    again = types.ModuleType(fake.name)
    exec(_FAKE_SOURCE, vars(again))
    sys.modules[fake.name] = again
    with pytest.raises(HookError, match="was overwritten"):
        preflight.verify_installed([spec], "main")


def test_a_by_name_import_that_bypasses_the_hook_is_found(fake: Fake) -> None:
    original = fake.module.double
    spec = fake.spec("double", "around", around)
    preflight.install([spec], "main")
    fake.importer.kept = original
    with pytest.raises(HookError, match=f"is held unhooked by {fake.importer_name}.kept"):
        preflight.verify_installed([spec], "main")


def test_rebind_reaches_an_alias_in_a_class_and_sees_it_lost(fake: Fake) -> None:
    original = fake.module.double
    alias = f"{fake.name}.Thing.alias"
    spec = fake.spec("double", "around", around, rebind=(alias, "sglang.not_loaded_yet.double"))
    preflight.install([spec], "main")
    assert fake.module.Thing.alias(2) == ("around", 4)
    fake.module.Thing.alias = original
    with pytest.raises(HookError, match=f"is held unhooked by {alias}"):
        preflight.verify_installed([spec], "main")


def test_a_replacement_by_another_plugin_is_found(fake: Fake) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    spec = fake.spec("double", "around", around)
    preflight.install([spec], "main")
    source = HookSource(plugin_name="rival", dist_name="rival-dist")
    HookRegistry.register(spec.target, lambda x, *, y=1: 0, HookType.REPLACE, source=source)
    try:
        HookRegistry.apply_hooks()
        with pytest.raises(HookError, match=r"replaced by another plugin's hook .*rival"):
            preflight.verify_installed([spec], "main")
    finally:
        del HookRegistry._hooks[spec.target]


# -- failing closed ---------------------------------------------------------------------------------------------------


def test_failing_closed_gets_through_sglangs_plugin_loader(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sglang.srt.plugins as plugins

    def broken() -> None:
        preflight.fail_closed(HookError("nothing fits"))

    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    monkeypatch.setattr(plugins, "load_plugins_by_group", lambda group, **kwargs: {"broken": (broken, None)})
    with pytest.raises(SystemExit) as caught:
        plugins.load_plugins()
    assert caught.value.code == preflight.EXIT_STATUS
    assert "elasticmoe: nothing fits" in capsys.readouterr().err


def test_failing_closed_on_another_thread_ends_the_process() -> None:
    code = (
        "import threading, time; from elasticmoe_patches import preflight\n"
        "from elasticmoe_sglang.errors import HookError\n"
        "threading.Thread(target=preflight.fail_closed, args=(HookError('nothing fits'),)).start(); time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert done.returncode == preflight.EXIT_STATUS
    assert "nothing fits" in done.stderr


def test_ending_a_standing_server_takes_its_children_along() -> None:
    code = (
        "import subprocess, sys; from elasticmoe_patches import preflight\n"
        "from elasticmoe_sglang.errors import HookError\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "try:\n    preflight.end_process(HookError('lost'))\nexcept BaseException:\n    pass"
    )
    # The child holds the same stdout: reading to its end only returns in time when the child is gone as well.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert done.returncode == preflight.EXIT_STATUS
    assert "lost" in done.stderr


def test_what_counts_as_using_our_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.flags_used(["--model-path", "m", "--elasticmoe-ep-size=2"], {})
    assert plugin.flags_used([], {ENV_CONFIG: "{}"})
    assert not plugin.flags_used(["--ep-size", "2"], {})
    monkeypatch.setattr(plugin, "_named", None)
    monkeypatch.setenv(plugin.PROCESS_ENV, "standby")
    assert plugin.process_name() == "standby"
    monkeypatch.setenv(plugin.PROCESS_ENV, "nobody")
    with pytest.raises(HookError, match="names no process"):
        plugin.process_name()
    monkeypatch.delenv(plugin.PROCESS_ENV)
    assert plugin.process_name() == "main"


@pytest.fixture
def broken_hook(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> Fake:
    """The catalogue has one elastic and one flags hook, and the elastic one does not fit."""
    flags = fake.spec("Thing.method", "after", after, signature="(self, x, *, y=1)", scope="flags")
    broken = fake.spec("double", "around", around, signature="(x)", processes=frozenset({"worker"}))
    monkeypatch.setattr(plugin, "all_hooks", lambda: (flags, broken))
    monkeypatch.setattr(
        plugin,
        "select",
        lambda process, scopes: tuple(s for s in (flags, broken) if s.scope in scopes and s.runs_in(process)),
    )
    monkeypatch.setattr(plugin, "_named", None)
    monkeypatch.delenv(ENV_CONFIG, raising=False)
    return fake


def test_without_our_flags_only_the_flags_hooks_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, broken_hook: Fake
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch_server", "--model-path", "m"])
    plugin.register()
    assert broken_hook.module.Thing().method(1) == ("after", 2)
    assert broken_hook.module.double(2) == 4


def test_with_our_flags_a_rank_hook_that_does_not_fit_ends_the_launch_in_the_main_process(
    monkeypatch: pytest.MonkeyPatch, broken_hook: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch_server", "--elasticmoe-ep-size", "2"])
    with pytest.raises(SystemExit) as caught:
        plugin.register()
    assert caught.value.code == preflight.EXIT_STATUS
    assert "has signature (x, *, y=1), expected (x)" in capsys.readouterr().err
    assert broken_hook.module.Thing().method(1) == 2


@pytest.mark.parametrize(("process", "ends"), [("worker", True), ("dpc", False)])
def test_a_child_process_checks_what_it_needs_itself(
    monkeypatch: pytest.MonkeyPatch, broken_hook: Fake, process: str, ends: bool
) -> None:
    monkeypatch.setenv(ENV_CONFIG, "{}")
    monkeypatch.setenv(plugin.PROCESS_ENV, process)
    if ends:
        with pytest.raises(SystemExit):
            plugin.register()
        assert broken_hook.module.Thing().method(1) == 2
    else:
        plugin.register()
        assert broken_hook.module.Thing().method(1) == ("after", 2)


def test_a_forked_child_keeps_the_name_its_parent_installed_for(
    monkeypatch: pytest.MonkeyPatch, broken_hook: Fake
) -> None:
    plugin.install_for_process("dpc")
    assert plugin.process_name() == "dpc"
    plugin.verify_for_process("dpc")


def launch_server_with_version(version: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m sglang.launch_server` where the metadata says that SGLang has another version."""
    import os

    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        f"metadata.version = lambda name: {version!r} if name == 'sglang' else real(name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sglang.launch_server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.timeout(150)
def test_a_launch_with_our_flags_on_a_wrong_version_ends_with_one_message(tmp_path: Path) -> None:
    arguments = ["--model-path", "nowhere", "--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4"]
    done = launch_server_with_version("0.5.99", arguments, tmp_path)
    assert done.returncode == preflight.EXIT_STATUS, done.stderr
    assert done.stderr.count("version 0.5.99 is installed, the hooks were written for 0.5.21, 0.5.23") == 1
    assert "Traceback" not in done.stderr.split("elasticmoe: ")[-1]


@pytest.mark.timeout(150)
def test_plain_sglang_on_a_wrong_version_goes_on_untouched(tmp_path: Path) -> None:
    done = launch_server_with_version("0.5.99", ["--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--model-path" in done.stdout
    assert "--elasticmoe" not in done.stdout
    assert "elasticmoe is inactive" in done.stderr
