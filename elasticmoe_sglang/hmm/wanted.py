"""What an `Allocate` asks for: which blocks, and how large. Raises UserInputError for what makes no sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elasticmoe_sglang.errors import HmmError, UserInputError
from elasticmoe_sglang.wire import to_hmm

Part = tuple[int | None, int | None]
"""(column, chunk) of one block."""


def parts_of(
    command: to_hmm.Allocate, model: to_hmm.ModelSpec | None, *, held: Callable[[to_hmm.Lookup], Sequence[to_hmm.Block]]
) -> list[Part]:
    """The blocks to make; `held` finds the live ones."""
    if (command.chunks is None) != (command.rank is None) or (command.rank is not None and command.kind != "kv"):
        raise UserInputError("the chunks of a KV cache are allocated with kind kv and their rank")
    if command.shard and command.kind != "dense":
        raise UserInputError(f"a block of kind {command.kind} is no part of the dense weights")
    if command.chunks is None:
        return [(column, None) for column in _columns_of(command, model)]
    if command.columns is not None or not command.chunks or len(set(command.chunks)) != len(command.chunks):
        raise UserInputError("the chunks to allocate are empty or not distinct, or columns are named with them")
    here = {block.chunk for block in held(to_hmm.Lookup(kind="kv", rank=command.rank))}
    if taken := sorted(chunk for chunk in command.chunks if chunk in here):
        raise UserInputError(
            f"rank {command.rank} has chunks {taken} already", hint="Release what an earlier process left there."
        )
    return [(None, chunk) for chunk in command.chunks]


def _columns_of(command: to_hmm.Allocate, model: to_hmm.ModelSpec | None) -> Sequence[int | None]:
    if (command.columns is not None) != (command.kind == "column"):
        raise UserInputError(f"an allocation of kind {command.kind} names columns if and only if it is for columns")
    if command.columns is None:
        return [None]
    if not command.columns or len(set(command.columns)) != len(command.columns):
        raise UserInputError("the columns to allocate are empty or not distinct")
    if model is not None and max(command.columns) >= model.num_columns:
        raise UserInputError(f"column {max(command.columns)} does not exist; the model has {model.num_columns}")
    return command.columns


def block_bytes(command: to_hmm.Allocate, model: to_hmm.ModelSpec | None) -> int:
    """Bytes of each block, before rounding up: as asked for, or the model's size of the kind."""
    if command.nbytes is not None:
        return command.nbytes
    if model is None:
        raise HmmError(
            f"no size given for a {command.kind} block and no model registered",
            hint="Register the model first, or pass nbytes.",
        )
    sizes = {"column": model.column_bytes, "dense": model.dense_bytes}
    if not sizes.get(command.kind):
        raise UserInputError(f"the model does not say how large a {command.kind} block is", hint="Pass nbytes.")
    return sizes[command.kind]
