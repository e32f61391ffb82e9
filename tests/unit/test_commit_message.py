"""The commit inside SGLang's own messages."""

from __future__ import annotations

import pytest

from elasticmoe_sglang.wire.to_worker import CommitCommand

pytestmark = pytest.mark.process


@pytest.mark.parametrize("pickled", [False, True], ids=["msgpack", "pickle"])
def test_the_commit_travels_in_either_encoding_of_sglang(pickled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    io_struct = pytest.importorskip("sglang.srt.managers.io_struct", reason="SGLang is not installed")
    from elasticmoe_patches.srt.managers.io_struct import ElasticCommandReq, from_wire, register_types, to_wire

    register_types()
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", pickled)
    command = CommitCommand(
        operation_id="3.1", before=(0, 1), members=(0, 2), lost=(), epoch=3, attempt=1, placement=(0, 2, 2), expires=1.5
    )
    received = from_wire(to_wire(ElasticCommandReq(command=command)))
    assert received.command == command
    assert (received.command.joining, received.command.retiring) == ((2,), (1,))
