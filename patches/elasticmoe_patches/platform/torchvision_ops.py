"""Let ``import torchvision`` succeed where its compiled operators cannot load.

SGLang and transformers import torchvision. Its wheel on PyPI is a CUDA build, whose compiled operators do not load
beside a CPU build of torch; the import then fails because Python code registers gradients for operators that nobody
declared. Declaring their names is enough: serving text calls none of them, and a call of one still fails loudly
(no kernel is registered).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import torch

_OPERATOR = re.compile(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"')

# A torch.library.Library withdraws its declarations when it is collected.
_declared: torch.library.Library | None = None


def declare_if_unloadable() -> bool:
    """Declare torchvision's operators unless its compiled library loads. Returns whether it declared them."""
    global _declared
    if _declared is not None or "torchvision" in sys.modules:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    package = Path(spec.submodule_search_locations[0])
    if _loads(package):
        return False
    _declared = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in operator_names(package):
        _declared.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    return True


def operator_names(package: Path) -> list[str]:
    """Names of the operators that torchvision's Python side refers to, sorted."""
    source = (package / "_meta_registrations.py").read_text(encoding="utf-8")
    return sorted(set(_OPERATOR.findall(source)))


def _loads(package: Path) -> bool:
    libraries = [*package.glob("_C*.so"), *package.glob("_C*.pyd")]
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True
