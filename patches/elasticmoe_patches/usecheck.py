"""Whether the installed SGLang has every attribute that this package uses (`uses.py`).

A class has an attribute when it, or a base class, defines or annotates it, or when one of its methods assigns it to its
`self`; nothing is instantiated.
"""

from __future__ import annotations

import dis
import importlib.util
import inspect
import pkgutil
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from elasticmoe_patches.uses import Use


@dataclass(frozen=True, kw_only=True)
class Missing:
    """One attribute that the installed SGLang has not, and why that is said."""

    use: Use
    problem: str
    unimportable: bool = False
    """Its module cannot be imported on this machine."""

    def __str__(self) -> str:
        return f"{self.use.target} ({self.use.kind}): {self.problem}"


def find_missing(uses: Iterable[Use]) -> list[Missing]:
    """The uses for which the installed SGLang has nothing; imports their modules."""
    found = []
    for use in uses:
        try:
            problem = _problem(use)
        except Exception as error:  # importing SGLang's module runs its code, which may raise anything
            unimportable = isinstance(error, ImportError)
            found.append(Missing(use=use, problem=f"cannot be resolved: {error!r}", unimportable=unimportable))
        else:
            if problem:
                found.append(Missing(use=use, problem=problem))
    return found


def _problem(use: Use) -> str | None:
    owner = _resolve(use.owner)
    if isinstance(owner, type):
        if use.name not in _provided(owner):
            return "no such attribute"
        value = inspect.getattr_static(owner, use.name, None)
        callable_ = callable(value) or isinstance(value, classmethod | staticmethod)
        if use.kind in ("call", "override") and not callable_ and not isinstance(value, property):
            return f"is a {type(value).__name__}, not a method"
        return None
    if not hasattr(owner, use.name):
        _resolve(use.target)  # a module that its package has not imported yet
    return None


def _resolve(path: str) -> Any:
    """What a dotted path names.

    Raises:
        ImportError: a module on the way cannot be imported here. AttributeError: there is no such thing.
    """
    try:
        return pkgutil.resolve_name(path)
    except AttributeError:  # also for a submodule that cannot be imported, and then without the reason
        parts = path.split(".")
        found = importlib.import_module(parts.pop(0))
        for part in parts:
            if not hasattr(found, part) and isinstance(found, types.ModuleType):
                _import_part(found, part)
            found = getattr(found, part)
        return found


def _import_part(package: types.ModuleType, part: str) -> None:
    """Raises ImportError if the package has a module of this name that cannot be imported."""
    name = f"{package.__name__}.{part}"
    if hasattr(package, "__path__") and importlib.util.find_spec(name) is not None:
        importlib.import_module(name)


@cache
def _provided(cls: type) -> frozenset[str]:
    names: set[str] = set()
    for base in cls.__mro__:
        names.update(vars(base), vars(base).get("__annotations__", ()))
        for value in vars(base).values():
            for function in _functions(value):
                names.update(_assigned(function.__code__))
    return frozenset(names)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, types.FunctionType):
        yield value


def _assigned(code: types.CodeType) -> Iterator[str]:
    """Names that a method assigns to its first argument: SELF is loaded right before STORE_ATTR."""
    own = code.co_varnames[0] if code.co_argcount else None
    before: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
            if loaded == own:
                yield str(instruction.argval)
        before = instruction
