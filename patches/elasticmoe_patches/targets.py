"""Finding what a dotted path names in SGLang, and describing its call signature in one comparable line."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
import re
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a dotted path names: attribute `name` of `parent` (module or class); `raw` is it, unbound."""

    parent: Any
    name: str
    raw: Any

    @property
    def inherited(self) -> bool:
        """Whether a base class of `parent` defines the attribute."""
        return isinstance(self.parent, type) and self.name not in vars(self.parent)

    @property
    def function(self) -> Any:
        """The plain function behind a classmethod or staticmethod; `raw` itself for everything else."""
        return self.raw.__func__ if isinstance(self.raw, classmethod | staticmethod) else self.raw


def sglang_version() -> str | None:
    """Version of the installed SGLang, read from its metadata; None where it is not installed."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve(path: str) -> Target:
    """Import what is needed and find `path`.

    Raises:
        Exception: whatever importing the module raised; AttributeError where the name is not in it.
    """
    parent_path, name = path.rsplit(".", 1)
    parent = pkgutil.resolve_name(parent_path)
    raw = inspect.getattr_static(parent, name) if isinstance(parent, type) else getattr(parent, name)
    return Target(parent=parent, name=name, raw=raw)


def resolve_loaded(path: str) -> Target | None:
    """Find `path` without importing anything; None while its module is not loaded.

    Raises:
        AttributeError: the module is loaded and has no such name.
    """
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is not None:
            # A loaded package with the rest of the path still to import is not "a module without that name".
            if cut < len(parts) - 1 and not hasattr(module, parts[cut]):
                return None
            return resolve(path)
    return None


def signature_text(target: Target) -> str:
    """The call signature in one line: parameter names, kinds and defaults.

    Annotations are left out, because their text depends on the Python version and on how the module imports its types;
    memory addresses in the text of defaults as well. A property gives `property`, a struct its name, other values the
    name of their type.
    """
    value = target.function
    if isinstance(value, property):
        return "property"
    if not callable(value):
        return type(value).__name__
    if isinstance(value, type) and issubclass(value, msgspec.Struct):
        return f"struct {value.__name__}"  # its fields are hundreds, and no hook depends on all of them
    signature = inspect.signature(value)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return _ADDRESS.sub("", text)
