"""What one hook into SGLang is, as data.

A hook is declared once, as a decorator of the function it runs (`Hooks`), in the module under `elasticmoe_patches/srt/`
that has the path of the SGLang module it reaches into. `catalogue` collects the declarations, `preflight` checks and
installs them, `hookdocs` prints them. Modules that declare hooks import sglang inside functions only: the declarations
are read without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from elasticmoe_sglang import SUPPORTED_SGLANGS

Kind = Literal["before", "after", "around", "replace", "attribute"]
Process = Literal["main", "dpc", "detokenizer", "worker", "standby", "any"]
Scope = Literal["flags", "platform", "elastic", "both"]

KINDS: tuple[Kind, ...] = get_args(Kind)
PROCESSES: tuple[Process, ...] = get_args(Process)
SCOPES: tuple[Scope, ...] = get_args(Scope)

MAIN: frozenset[Process] = frozenset(("main",))
DPC: frozenset[Process] = frozenset(("dpc",))
WORKERS: frozenset[Process] = frozenset(("worker", "standby"))

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class HookSpec:
    """One hook: its target, what it does there, and for how long it is needed.

    Raises:
        ValueError: a field is not what its description below says.
    """

    target: str
    """Dotted path of a function, method, class or attribute: `sglang.srt.managers.scheduler.Scheduler.run_batch`."""
    kind: Kind
    """How the hook relates to its target; the hook is called as

    - before: `hook(*args, **kwargs)`, returns None or a new `(args, kwargs)`
    - after: `hook(result, *args, **kwargs)`, returns None or a new result
    - around: `hook(original, *args, **kwargs)`, returns the result
    - replace: `hook(*args, **kwargs)`, or a class that replaces a class
    - attribute: `hook(current_value)`, once, at installing; returns the value to set (properties too)

    The first four are SGLang's own hook types (`sglang/srt/plugins/hook_registry.py`).
    """
    hook: str
    """`module:function`, imported when the hook is installed."""
    signature: str
    """What `python -m elasticmoe_patches.preflight --signature TARGET` prints: parameter names, kinds and defaults
    without annotations; for something that cannot be called, the name of its type."""
    reason: str
    """Why the hook is needed: one or two sentences."""
    expires: str
    """What has to happen upstream before the hook can be removed."""
    scope: Scope = "elastic"
    """flags: our command-line flags, always. platform: on our CPU platform, with or without our flags. elastic: with
    our flags only. both: on our CPU platform in any case, elsewhere with our flags."""
    processes: frozenset[Process] = field(default_factory=lambda: frozenset[Process](("any",)))
    """The processes which need it."""
    versions: tuple[str, ...] = SUPPORTED_SGLANGS
    """The SGLang versions whose source was read for it."""
    signatures: tuple[tuple[str, str], ...] = ()
    """(version, signature) for the versions in which it is not `signature`."""
    rebind: tuple[str, ...] = ()
    """Further names under which SGLang holds the target and which would miss the hook: `module.name` of a by-name
    import or `module.Class.name` of an alias. Checked again once the server is up."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.target}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.scope not in SCOPES:
            raise ValueError(f"{self.target}: scope {self.scope!r} is none of {', '.join(SCOPES)}")
        if not self.processes or not self.processes <= set(PROCESSES):
            raise ValueError(
                f"{self.target}: processes {sorted(self.processes)} must be some of {', '.join(PROCESSES)}"
            )
        if self.hook.count(":") != 1:
            raise ValueError(f"{self.target}: hook {self.hook!r} must read module:function")
        if any("." not in path for path in (self.target, *self.rebind)):
            raise ValueError(f"{self.target}: target and rebind need a module and a name in it")
        missing = [name for name in ("signature", "reason", "expires", "versions") if not getattr(self, name)]
        if missing:
            raise ValueError(f"{self.target}: {', '.join(missing)} must not be empty")
        unknown = sorted({version for version, _ in self.signatures} - set(self.versions))
        if unknown:
            raise ValueError(f"{self.target}: a signature for {', '.join(unknown)}, which is none of its versions")

    def signature_in(self, version: str | None) -> str:
        """The signature expected in this version of SGLang."""
        return dict(self.signatures).get(version or "", self.signature)

    def runs_in(self, process: Process) -> bool:
        """Whether a process of this name needs the hook; the name `any` means every hook."""
        return process == "any" or process in self.processes or "any" in self.processes


class Hooks:
    """The hooks of one module, declared by decorating their functions.

    Args:
        module: the declaring module's `__name__`: `elasticmoe_patches.srt.x` declares hooks into `sglang.srt.x`.
        processes, scope: of all its hooks.
    """

    def __init__(self, module: str, processes: frozenset[Process], *, scope: Scope = "elastic") -> None:
        self._module = f"sglang.{module.partition('.')[2]}"
        self._processes = processes
        self._scope = scope
        self._specs: list[HookSpec] = []

    def __iter__(self) -> Iterator[HookSpec]:
        return iter(self._specs)

    def __call__(
        self,
        kind: Kind,
        target: str,
        *,
        expires: str,
        scope: Scope | None = None,
        processes: frozenset[Process] | None = None,
        rebind: tuple[str, ...] = (),
        also: Mapping[str, str] | None = None,
    ) -> Callable[[_FunctionT], _FunctionT]:
        """Declare the decorated function as a hook. The first paragraph of its docstring is the hook's reason.

        Args:
            target: name and signature in SGLang's module, `Class.method(self, x=1)`; `name: type` for what cannot be
                called.
            scope, processes: of this hook; None: the module's. rebind: see `HookSpec`.
            also: version of SGLang -> signature there, where it is not that of `target`.
        """
        name = target.partition("(")[0].partition(":")[0]

        def declare(function: _FunctionT) -> _FunctionT:
            reason = (inspect.getdoc(function) or "").partition("\n\n")[0]
            spec = HookSpec(
                target=f"{self._module}.{name}",
                kind=kind,
                hook=f"{function.__module__}:{function.__qualname__}",
                signature=target[len(name) :].removeprefix(": "),
                reason=" ".join(reason.split()),
                expires=expires,
                scope=scope or self._scope,
                processes=processes or self._processes,
                rebind=rebind,
                signatures=tuple((also or {}).items()),
            )
            self._specs.append(spec)
            return function

        return declare
