"""Which attributes of SGLang's objects the code under `patches/` touches, found in its source.

SGLang's objects are `Any` to our type checker: a parameter annotated `Any` or `type`, what is taken from one, what a
function of ours returns as `Any`, and what a function imported from sglang returns. Where it is known of which class an
object is (the `self` of a hook, the parameters named in `HOLDS`), the attribute has to be declared for that class;
elsewhere, for any. Objects that a class of ours keeps in its own attributes are not followed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).parents[2] / "patches" / "elasticmoe_patches"

_S = "sglang.srt."
HOLDS: Mapping[str, str] = {
    "scheduler": _S + "managers.scheduler.Scheduler",
    "tokenizer_manager": _S + "managers.tokenizer_manager.TokenizerManager",
    "req": _S + "managers.schedule_batch.Req",
    "allocator": _S + "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator",
    "cache": _S + "mem_cache.unified_radix_cache.UnifiedRadixCache",
    "match": _S + "mem_cache.base_prefix_cache.MatchResult",
    "configurator": _S + "mem_cache.kv_cache_configurator.KVCacheConfigurator",
    "controller": _S + "managers.data_parallel_controller.DataParallelController",
    "info": _S + "managers.scheduler_components.dp_attn.MLPSyncBatchInfo",
    "server_args": _S + "server_args.ServerArgs",
    "port_args": _S + "server_args.PortArgs",
    "model_config": _S + "configs.model_config.ModelConfig",
}
"""Parameter of ours -> SGLang's class."""

OURS = frozenset(
    {
        "original",
        "_original",
        "fence",
        "message",
        "args",
        "kwargs",
        "values",
        "ours",
        "coroutine",
        "finish",
        "process",
        "sampling",
    }
)
"""Parameters that are `Any` for another reason."""


Tracked = Mapping[str, tuple[str, ...]]
"""Name in a function -> the classes that the object may be of; none: not known."""


@dataclass(frozen=True)
class Touch:
    """One attribute access: where, on an object of which classes (none: not known), and the attribute's name."""

    place: str
    owners: tuple[str, ...]
    name: str


def touches() -> list[Touch]:
    """Every access, in the order of files and lines."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PATCHES.rglob("*.py"))}
    untyped = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_any(node.returns)
    }
    found: list[Touch] = []
    for path, tree in trees.items():
        found.extend(_File(path.relative_to(PATCHES), tree, untyped).touches())
    return found


def touches_in(path: Path, tree: ast.Module) -> list[Touch]:
    """The accesses of one file; `path` is relative to the package."""
    return list(_File(path, tree, set()).touches())


def _held(name: str) -> tuple[str, ...]:
    return (HOLDS[name],) if name in HOLDS else ()


def _is_any(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(
        isinstance(node, ast.Name) and node.id in ("Any", "type") for node in ast.walk(annotation)
    )


class _File:
    def __init__(self, path: Path, tree: ast.Module, untyped: set[str]) -> None:
        self._path = path
        self._tree = tree
        self._untyped = untyped
        self._own: set[str] = set()
        self._imported: dict[str, str] = {}
        """Name -> dotted path, of what is imported from sglang anywhere in this file."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sglang"):
                self._imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def touches(self) -> Iterator[Touch]:
        yield from self._in(self._tree.body, {}, ())

    def _in(self, body: list[ast.stmt], outer: Tracked, base: tuple[str, ...]) -> Iterator[Touch]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from self._class(node, outer)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from self._function(node, outer, base)
            else:
                nested = [each for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.ClassDef)]
                yield from self._in(nested, outer, base)

    def _class(self, node: ast.ClassDef, outer: Tracked) -> Iterator[Touch]:
        """A class of ours over SGLang's: what it overrides, and what it uses of its base.

        Its own is what it assigns to its `self`, and the methods that it calls itself.
        """
        bases = tuple(
            self._imported[name.id] for name in node.bases if isinstance(name, ast.Name) if name.id in self._imported
        )
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        on_self = [
            each
            for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self"
        ]
        called = {each.attr for each in on_self} & {method.name for method in methods}
        made = {
            each.target.attr if isinstance(each, ast.AnnAssign) else each.targets[0].attr
            for method in methods
            if method.name == "__init__"
            for each in ast.walk(method)
            if isinstance(each, ast.Assign | ast.AnnAssign)
            if isinstance(each.target if isinstance(each, ast.AnnAssign) else each.targets[0], ast.Attribute)
        }
        self._own = called | made
        for method in methods if bases else ():
            if not method.name.startswith("__") and method.name not in self._own:
                yield Touch(self._at(method), bases, method.name)
        yield from self._in(node.body, outer, bases)
        self._own = set()

    def _function(
        self, function: ast.FunctionDef | ast.AsyncFunctionDef, outer: Tracked, base: tuple[str, ...]
    ) -> Iterator[Touch]:
        tracked = dict(outer)
        arguments = function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            tracked.pop(argument.arg, None)
            if _is_any(argument.annotation) and argument.arg not in OURS:
                tracked[argument.arg] = _held(argument.arg)
            elif argument.arg == "self" and base and argument.annotation is None:
                tracked["self"] = base
        hooked = self._hooked_class(function)
        if hooked is not None and "self" in tracked:
            tracked["self"] = (hooked,)
        nested: list[ast.stmt] = []
        for node in _ordered(function.body, nested):
            self._bind(node, tracked)
            touch = self._touch(node, tracked)
            if touch is not None:
                yield touch
        yield from self._in(nested, tracked, ())

    def _hooked_class(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and len(decorator.args) == 2:
                target = decorator.args[1]
                text = target.values[0] if isinstance(target, ast.JoinedStr) else target
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    name = text.value.partition("(")[0]
                    if "." in name:
                        module = ".".join(self._path.with_suffix("").parts)
                        return f"sglang.{module}.{name.rpartition('.')[0]}"
        return None

    def _bind(self, node: ast.AST, tracked: dict[str, tuple[str, ...]]) -> None:
        """Names that take (part of) a tracked value are tracked, without a known class."""
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            pairs = [(node.target, node.iter)]
        elif isinstance(node, ast.NamedExpr):
            pairs = [(node.target, node.value)]
        for target, value in pairs:
            if self._is_tracked(value, tracked):
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        tracked[name.id] = _held(name.id)

    def _is_tracked(self, value: ast.expr, tracked: Tracked) -> bool:
        if isinstance(value, ast.Name):
            return value.id in tracked
        if isinstance(value, ast.Attribute | ast.Subscript | ast.Starred | ast.Await):
            return self._is_tracked(value.value, tracked)
        if isinstance(value, ast.Call):
            called = value.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            if name in ("getattr", "list", "sorted", "reversed", "enumerate", "zip", "iter", "next", "tuple"):
                return any(self._is_tracked(argument, tracked) for argument in value.args)
            return name in self._untyped or name in self._imported or self._is_tracked(called, tracked)
        if isinstance(value, ast.Tuple | ast.List):
            return any(self._is_tracked(element, tracked) for element in value.elts)
        if isinstance(value, ast.IfExp):
            return self._is_tracked(value.body, tracked) or self._is_tracked(value.orelse, tracked)
        if isinstance(value, ast.BoolOp):
            return any(self._is_tracked(element, tracked) for element in value.values)
        if isinstance(value, ast.BinOp):
            return self._is_tracked(value.left, tracked) or self._is_tracked(value.right, tracked)
        if isinstance(value, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            inner = dict(tracked)
            for generator in value.generators:
                self._bind(generator, inner)
            return self._is_tracked(value.elt, inner)
        return False

    def _touch(self, node: ast.AST, tracked: Tracked) -> Touch | None:
        if isinstance(node, ast.Attribute):
            value, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            value, name = node.args[0], str(node.args[1].value)
        else:
            return None
        if isinstance(value, ast.Name) and value.id in self._imported and value.id not in tracked:
            return Touch(self._at(node), (self._imported[value.id],), name)
        if not self._is_tracked(value, tracked):
            return None
        owners = tracked.get(value.id, ()) if isinstance(value, ast.Name) else ()
        if isinstance(value, ast.Name) and value.id == "self" and name in self._own:
            return None
        return Touch(self._at(node), owners, name)

    def _at(self, node: ast.AST) -> str:
        return f"{self._path}:{getattr(node, 'lineno', 0)}"


def _ordered(body: list[ast.stmt], nested: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every node of a function in the order of its source, without nested functions and classes, which are collected.

    Bindings of a comprehension come before what it computes.
    """
    stack: list[ast.AST] = list(reversed(body))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            nested.append(node)
            continue
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            children.sort(key=lambda child: not isinstance(child, ast.comprehension))
        stack.extend(reversed(children))
