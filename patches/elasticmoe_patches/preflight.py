"""Check that SGLang is what the hooks were written for, install them, and verify later that they are still installed.

SGLang logs and swallows whatever a plugin or a hook raises while it is loaded, and would then serve half-hooked. So the
registry's applying of hooks is called here directly, every mismatch is collected into one HookError, and the
process that gets it ends: see `fail_closed` (before anything runs) and `end_process` (once the server is up).

    python -m elasticmoe_patches.preflight                     all hooks, and what SGLang lacks; status 1 with either
    python -m elasticmoe_patches.preflight --json              the same for programs (`elasticmoe doctor` reads it)
    python -m elasticmoe_patches.preflight --signature TARGET  the text for a new hook's `signature`
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import threading
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from elasticmoe_patches.demote import demoted
from elasticmoe_patches.spec import HookSpec, Process
from elasticmoe_patches.targets import Target, resolve, resolve_loaded, sglang_version, signature_text
from elasticmoe_patches.usecheck import find_missing
from elasticmoe_patches.uses import declared
from elasticmoe_sglang import SUPPORTED_SGLANG, SUPPORTED_SGLANGS
from elasticmoe_sglang.errors import HookError

EXIT_STATUS = 78
"""Exit status of a process whose hooks do not fit: EX_CONFIG of sysexits.h."""
MARK = "__elasticmoe_hook__"
"""Attribute of every wrapper of ours: the `module:function` names of the hooks in it, innermost first."""

_REGISTRY = "sglang.srt.plugins.hook_registry.HookRegistry"
_REGISTRY_SIGNATURE = "(cls, target, hooks)"


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One reason why a hook cannot be installed, or no longer is."""

    spec: HookSpec
    problem: str

    def __str__(self) -> str:
        return f"{self.spec.target}: {self.problem} [hook {self.spec.hook}]"


@dataclass(frozen=True)
class _Installed:
    original: Any
    value: Any


_installed: dict[HookSpec, _Installed] = {}
_MODELS = "sglang.srt.models."


class HookExit(SystemExit):
    """Ends the process; not an `Exception`, so that SGLang's plugin loader does not swallow it."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


def check_version() -> None:
    """Compare the installed SGLang's version with the supported ones.

    Raises:
        HookError: it is none of them, or SGLang is not installed.
    """
    if sglang_version() not in SUPPORTED_SGLANGS:
        raise _error("cannot be hooked, nothing was changed in it", [])


def find_mismatches(specs: Iterable[HookSpec]) -> list[Mismatch]:
    """Everything that keeps these hooks from being installed; nothing is changed."""
    version = sglang_version()
    found: list[Mismatch] = []
    for spec in _reachable(specs):
        problem = _version_problem(spec, version) or _target_problem(spec) or _hook_problem(spec)
        if problem:
            found.append(Mismatch(spec=spec, problem=problem))
    return found


def check(specs: Iterable[HookSpec]) -> None:
    """Compare version, target and signature of every hook with the installed SGLang.

    Raises:
        HookError: one error that lists all mismatches.
    """
    mismatches = find_mismatches(specs)
    if mismatches:
        raise _error("cannot be hooked, nothing was changed in it", mismatches)


def check_uses() -> None:
    """Check that the installed SGLang has every attribute that this package uses (`uses.py`).

    What cannot be imported on this machine is left out: whoever needs it gets the ImportError.

    Raises:
        HookError: one error that lists all attributes that it has not.
    """
    missing = [each for each in find_missing(declared(sglang_version())) if not each.unimportable]
    if missing:
        lines = "".join(f"\n  - {each}" for each in missing)
        raise HookError(
            f"SGLang {sglang_version()} lacks what this package uses; the launch ends here:{lines}\n",
            hint=f"Install a supported version without local changes: pip install --no-deps sglang=={SUPPORTED_SGLANG}",
        )


def install(specs: Iterable[HookSpec], process: Process) -> tuple[HookSpec, ...]:
    """Install the hooks which a process of this name needs; those that are installed already are not touched.

    Returns the hooks that this call installed. A forked child inherits its parent's hooks and the record of them.

    Raises:
        HookError: from the check before, or because applying one failed; the process must then end.
    """
    wanted = _reachable(spec for spec in specs if spec.runs_in(process) and spec not in _installed)
    check(wanted)
    # Replacements first, so that everything else wraps them (SGLang's registry uses this order too).
    wanted.sort(key=lambda spec: spec.kind not in ("replace", "attribute"))
    for spec in wanted:
        if spec.kind == "replace":
            _refuse_to_bury_hooks(spec)
        try:
            _installed[spec] = _apply_attribute(spec) if spec.kind == "attribute" else _apply(spec)
        except Exception as error:
            raise _error("is half hooked", [Mismatch(spec=spec, problem=f"could not be applied: {error!r}")]) from error
    verify_installed(wanted, process)
    return tuple(wanted)


def verify_installed(specs: Iterable[HookSpec], process: Process) -> None:
    """Check that every hook which a process of this name needs is really reached through SGLang's modules.

    To be called once more when the server is up: by then a module may have been imported again, another plugin may
    have overwritten a target, or a by-name import made before may be found.

    Raises:
        HookError: one error that lists all hooks which are not installed.
    """
    wanted = _reachable(spec for spec in specs if spec.runs_in(process))
    mismatches = [Mismatch(spec=spec, problem=problem) for spec in wanted if (problem := _placement_problem(spec))]
    mismatches.extend(_stale_imports([spec for spec in wanted if spec in _installed and spec.kind != "attribute"]))
    if mismatches:
        raise _error("has lost hooks", mismatches)


def fail_closed(error: HookError) -> NoReturn:
    """Print the error and end the process before it serves anything, with exit status 78.

    On the main thread by `HookExit`, so that SGLang's own clean-up runs; elsewhere, where that would end one thread
    only, at once.
    """
    _print(error)
    if threading.current_thread() is threading.main_thread():
        raise HookExit
    os._exit(EXIT_STATUS)


def end_process(error: HookError) -> NoReturn:
    """Print the error, kill this process's children and end it at once, with exit status 78.

    For a server that is up: an event loop or a web framework may catch `SystemExit` and continue to serve.
    """
    import psutil

    _print(error)
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(EXIT_STATUS)


def table(specs: Iterable[HookSpec]) -> list[dict[str, Any]]:
    """One JSON-able row a hook: its declaration, `ok`, and the `problem` found (None where there is none)."""
    specs = tuple(specs)
    problems = {mismatch.spec: mismatch.problem for mismatch in find_mismatches(specs)}
    return [
        {
            "target": spec.target,
            "kind": spec.kind,
            "scope": spec.scope,
            "processes": sorted(spec.processes),
            "hook": spec.hook,
            "ok": spec not in problems,
            "problem": problems.get(spec),
        }
        for spec in specs
    ]


def _print(error: HookError) -> None:
    print(f"\nelasticmoe: {error}\n", file=sys.stderr, flush=True)


def _error(what: str, mismatches: Sequence[Mismatch]) -> HookError:
    version = sglang_version()
    versions = sorted({version for mismatch in mismatches for version in mismatch.spec.versions} or SUPPORTED_SGLANGS)
    wrong_version = version not in versions
    listed = [mismatch for mismatch in mismatches if not (wrong_version and _version_problem(mismatch.spec, version))]
    if wrong_version:
        reasons = [f"version {version} is installed, the hooks were written for {', '.join(versions)}"]
    else:
        reasons = []
    lines = "".join(f"\n  - {reason}" for reason in [*reasons, *listed])
    return HookError(
        f"SGLang {version or '(not installed)'} {what}; the launch ends here:{lines}\n",
        hint=f"Install a supported version (pip install --no-deps sglang=={SUPPORTED_SGLANG}) without local changes "
        "and without plugins that touch the same functions, or start it without --elasticmoe-* flags. "
        "`elasticmoe doctor` shows all hooks",
    )


def _reachable(specs: Iterable[HookSpec]) -> list[HookSpec]:
    """Without those on a model whose module this machine cannot import: SGLang leaves such models out, too."""
    return [spec for spec in specs if not _is_left_out(spec.target)]


def _is_left_out(target: str) -> bool:
    return target.startswith(_MODELS) and _lacks_a_package(_MODELS + target.removeprefix(_MODELS).partition(".")[0])


@cache
def _lacks_a_package(module: str) -> bool:
    """Whether it is there and needs a module that is not."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return error.name != module
    except ImportError:
        return True
    return False


def _version_problem(spec: HookSpec, version: str | None) -> str | None:
    if version in spec.versions:
        return None
    return f"written for SGLang {', '.join(spec.versions)}, found {version or 'none'}"


def _target_problem(spec: HookSpec) -> str | None:
    if spec.kind == "attribute" and spec in _installed:
        return None  # it was checked then; what is found now is ours
    try:
        target = resolve(spec.target)
        found = signature_text(target)
    except Exception as error:  # importing SGLang's module runs its code, which may raise anything
        return f"cannot be resolved: {error!r}"
    expected = spec.signature_in(sglang_version())
    if found != expected:
        return f"has signature {found}, expected {expected}"
    if spec.kind == "attribute":
        return None
    if not callable(target.function):
        return f"is a {found}, which only a hook of kind attribute can reach"
    if target.inherited and target.function is not target.raw:
        return "is a classmethod or staticmethod of a base class; name the class that defines it"
    return _registry_problem()


def _registry_problem() -> str | None:
    found = signature_text(resolve(f"{_REGISTRY}._apply_target"))
    return None if found == _REGISTRY_SIGNATURE else f"SGLang's hook registry applies hooks by {found}"


def _hook_problem(spec: HookSpec) -> str | None:
    try:
        hook = _load_hook(spec)
    except Exception as error:  # importing the hook's module runs its code, which may raise anything
        return f"the hook cannot be imported: {error!r}"
    return None if callable(hook) else f"the hook is a {type(hook).__name__}, not a function or class"


def _load_hook(spec: HookSpec) -> Any:
    module, name = spec.hook.split(":")
    return getattr(importlib.import_module(module), name)


def _refuse_to_bury_hooks(spec: HookSpec) -> None:
    buried = [other.hook for other in _installed if other.target == spec.target]
    if buried:
        problem = f"would replace what {', '.join(buried)} already wraps; install both in one call"
        raise _error("is half hooked", [Mismatch(spec=spec, problem=problem)])


def _apply(spec: HookSpec) -> _Installed:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    before = resolve(spec.target)
    source = HookSource(plugin_name="elasticmoe", dist_name="elasticmoe-sglang")
    # Not register() + apply_hooks(): that swallows errors, and marks the target as patched, after which neither a later
    # hook of ours nor one of another plugin on the same target would ever be applied.
    with demoted(HookRegistry.__module__, logging.INFO):  # a line a hook; `plugin.report_hooks` says it in one
        HookRegistry._apply_target(spec.target, [(HookType(spec.kind), _load_hook(spec), source)])
    after = resolve(spec.target)
    setattr(after.function, MARK, (*_marks(after), spec.hook))
    _rebind(spec, after.raw)
    return _Installed(original=before.function, value=after.function)


def _apply_attribute(spec: HookSpec) -> _Installed:
    target = resolve(spec.target)
    value = _load_hook(spec)(target.raw)
    setattr(target.parent, target.name, value)
    _rebind(spec, value)
    return _Installed(original=target.raw, value=value)


def _rebind(spec: HookSpec, value: Any) -> None:
    for path in spec.rebind:
        alias = resolve_loaded(path)
        if alias is not None:
            setattr(alias.parent, alias.name, value)


def _marks(target: Target) -> tuple[str, ...]:
    value = target.function
    # A subclass of a class of ours is not ours, so a class must carry the mark itself.
    return tuple(vars(value).get(MARK, ()) if isinstance(value, type) else getattr(value, MARK, ()))


def _placement_problem(spec: HookSpec) -> str | None:
    if spec not in _installed:
        return "was never installed in this process"
    try:
        paths = {path: resolve_loaded(path) for path in (spec.target, *spec.rebind)}
    except AttributeError as error:
        return f"is gone: {error}"
    for path, target in paths.items():
        if target is not None and not _in_place(spec, target):
            holder = "was overwritten" if path == spec.target else f"is held unhooked by {path}"
            return f"{holder} (now {_describe(target.function)})"
    return _buried_by_other_plugin(spec)


def _in_place(spec: HookSpec, target: Target) -> bool:
    if spec.kind == "attribute":
        return target.raw is _installed[spec].value
    return spec.hook in _marks(target)


def _buried_by_other_plugin(spec: HookSpec) -> str | None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType, _format_source

    # A REPLACE of another plugin keeps our mark (functools.wraps copies it) and never calls us.
    for kind, _hook, source in HookRegistry._hooks.get(spec.target, ()):
        if kind == HookType.REPLACE:
            return f"is replaced by another plugin's hook ({_format_source(source)})"
    return None


def _stale_imports(specs: Sequence[HookSpec]) -> list[Mismatch]:
    """Modules of SGLang which still hold an original by name and so bypass its hook."""
    originals = {id(_installed[spec].original): spec for spec in specs}
    if not originals:
        return []  # in a fork everything is installed already, and scanning all modules takes 40 ms
    return [
        Mismatch(spec=originals[id(value)], problem=f"is held unhooked by {module.__name__}.{name}")
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType) and module.__name__.startswith("sglang.")
        for name, value in list(vars(module).items())
        if id(value) in originals
    ]


def _describe(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', '?')}.{name}" if name else f"a {type(value).__name__}"


def _main(argv: Sequence[str] | None = None) -> int:
    from elasticmoe_patches.bodies import changed
    from elasticmoe_patches.catalogue import all_hooks

    parser = argparse.ArgumentParser(prog="python -m elasticmoe_patches.preflight", description="Check the hooks.")
    parser.add_argument("--json", action="store_true", help="print the table for programs")
    parser.add_argument("--signature", metavar="TARGET", nargs="+", help="print signature texts")
    args = parser.parse_args(argv)
    if args.signature:
        for path in args.signature:
            print(f"{path}\t{signature_text(resolve(path))}")
        return 0
    bodies_changed = changed(all_hooks(), sglang_version())
    rows = table(all_hooks())
    uses = list(declared(sglang_version()))
    missing = [str(each) for each in find_missing(uses)]
    if args.json:
        print(
            json.dumps(
                {
                    "sglang": sglang_version(),
                    "hooks": rows,
                    "uses": len(uses),
                    "missing": missing,
                    "changed": bodies_changed,
                }
            )
        )
    else:
        for row in rows:
            print(f"{'ok      ' if row['ok'] else 'MISMATCH'} {row['target']} [{row['kind']}, {row['scope']}]", end="")
            print(f": {row['problem']}" if row["problem"] else "")
        print("".join(f"MISSING  {each}\n" for each in missing), end="")
        print("".join(f"CHANGED  {each}: its body is not the one that was read\n" for each in bodies_changed), end="")
    return 0 if not missing and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    # Under -m this file is __main__; the installed hooks are recorded in the module of its real name.
    from elasticmoe_patches.preflight import _main as main

    sys.exit(main())
