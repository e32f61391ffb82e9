"""The envelope codec: what is valid comes back equal, everything else is a MalformedMessage and nothing worse."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elasticmoe_sglang.errors import (
    BudgetExceeded,
    ElasticMoEError,
    HmmError,
    MalformedMessage,
    PeerTimeout,
    ProtocolError,
)
from elasticmoe_sglang.wire import to_coordinator, to_hmm, to_imm, to_worker
from elasticmoe_sglang.wire.envelope import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Codec,
    Envelope,
    ErrorReply,
    Message,
    error_from,
    error_reply,
)
from elasticmoe_sglang.wire.to_hmm import ANSWERS, COMMANDS, LINK_REPLIES, LINK_REQUESTS

CODECS: tuple[Codec[Any], ...] = (
    COMMANDS,
    ANSWERS,
    LINK_REQUESTS,
    LINK_REPLIES,
    to_imm.REQUESTS,
    to_worker.REQUESTS,
    to_worker.ENTER,
    to_coordinator.FROM_WORKER,
    to_coordinator.FROM_IMM,
)

names = st.text(min_size=1, max_size=30)
ids = st.lists(st.integers(0, 2**53 - 1), max_size=5)
commands = st.one_of(
    st.just(to_hmm.StatusRequest()),
    st.builds(
        to_hmm.Allocate,
        device=st.integers(0, 7),
        kind=st.sampled_from(to_hmm.KINDS),
        columns=st.none() | st.lists(st.integers(0, 255), max_size=4),
        nbytes=st.none() | st.integers(1, 2**50),
        txn=st.none() | names,
    ),
    st.builds(to_hmm.OpenRegion, name=names, nbytes=st.integers(1, 2**50)),
    st.builds(to_hmm.Begin, operation_id=names, timeout_s=st.floats(0, 3600)),
    st.builds(to_hmm.Commit, txn=names),
    st.builds(to_hmm.Rollback, txn=names),
    st.builds(to_hmm.Seal, block_ids=ids),
    st.builds(to_hmm.WaitSealed, block_ids=ids),
    st.builds(to_hmm.Release, block_ids=ids, txn=st.none() | names),
)
envelopes = st.builds(
    Envelope,
    request_id=st.text(min_size=1, max_size=64),
    epoch=st.none() | st.integers(0, 2**62 - 1),
    deadline_s=st.floats(0, 86400),
    body=commands,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=6),
    max_leaves=20,
)


@given(envelopes)
def test_what_is_encoded_comes_back_equal(envelope: Envelope[to_hmm.Command]) -> None:
    assert COMMANDS.decode(COMMANDS.encode(envelope)) == envelope


def decode_or_refuse(frame: bytes) -> None:
    for codec in CODECS:
        try:
            envelope = codec.decode(frame)
        except MalformedMessage as error:
            assert len(error.request_id) <= 64 and str(error)
            # What goes back to the sender must itself be valid.
            ANSWERS.decode(ANSWERS.encode(Envelope(request_id=error.request_id or "?", body=error_reply(error))))
        else:
            assert envelope.version == PROTOCOL_VERSION


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_refused(frame: bytes) -> None:
    decode_or_refuse(frame)


@pytest.mark.process
@given(plain)
def test_msgpack_of_any_shape_is_refused(value: Any) -> None:
    decode_or_refuse(msgspec.msgpack.encode(value))


@given(envelopes, st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_messages_are_read_or_refused(envelope: Envelope[to_hmm.Command], flips: list[tuple[int, int]]) -> None:
    frame = bytearray(COMMANDS.encode(envelope))
    for place, value in flips:
        frame[place % len(frame)] = value
    decode_or_refuse(bytes(frame))
    decode_or_refuse(bytes(frame[: flips[0][0] % len(frame)]))


@given(plain, st.sampled_from([0, PROTOCOL_VERSION, PROTOCOL_VERSION + 1]))
def test_the_request_id_survives_a_bad_body(body: Any, version: int) -> None:
    frame = msgspec.msgpack.encode({"version": version, "request_id": "r1", "body": {"type": "No", "x": body}})
    with pytest.raises(MalformedMessage) as caught:
        COMMANDS.decode(frame)
    assert caught.value.request_id == "r1"


def test_another_version_is_named() -> None:
    frame = msgspec.msgpack.encode({"version": 9, "request_id": "r1", "body": {"type": "FromTheFuture"}})
    with pytest.raises(MalformedMessage, match="version 9, the receiver 1") as caught:
        COMMANDS.decode(frame)
    assert caught.value.request_id == "r1"


def test_unknown_fields_bad_numbers_and_foreign_bodies_are_refused() -> None:
    good = {"version": 1, "request_id": "r", "deadline_s": 1.0, "body": {"type": "Seal", "block_ids": [1]}}
    COMMANDS.decode(msgspec.msgpack.encode(good))
    bad: list[dict[str, Any]] = [
        {"body": {"type": "Seal", "block_ids": [1], "also": 2}},
        {"body": {"type": "Seal", "block_ids": [-1]}},
        {"body": {"type": "Seal", "block_ids": [2**60]}},
        {"body": {"type": "Seal", "block_ids": [0] * (to_hmm.MAX_IDS + 1)}},
        {"body": {"type": "Attach", "name": "x"}},
        {"body": {"type": "OpenRegion", "name": "x", "nbytes": 0}},
        {"request_id": ""},
        {"request_id": "x" * 65},
        {"deadline_s": float("nan")},
        {"deadline_s": float("inf")},
        {"deadline_s": -1.0},
        {"epoch": -1},
    ]
    for change in bad:
        with pytest.raises(MalformedMessage):
            COMMANDS.decode(msgspec.msgpack.encode(good | change))


def test_sizes_are_bounded_both_ways() -> None:
    with pytest.raises(MalformedMessage, match="exceeds the limit"):
        COMMANDS.decode(bytes(MAX_MESSAGE_BYTES + 1))
    small: Codec[to_hmm.Command] = Codec(to_hmm.Command, max_bytes=200)
    with pytest.raises(ProtocolError, match="exceeds the limit of 200"):
        small.encode(Envelope(request_id="r", body=to_hmm.Seal(block_ids=list(range(1000)))))


def test_nesting_without_end_is_refused() -> None:
    decode_or_refuse(b"\x91" * 500_000)
    prefix = msgspec.msgpack.encode({"version": 1, "request_id": "r"})
    decode_or_refuse(b"\x83" + prefix[1:] + b"\xa4body" + b"\x91" * 500_000)


def test_errors_cross_the_wire_whole() -> None:
    sent = BudgetExceeded("too much", device=2, needed=10, free=3, budget=7, operation="op", hint="Give more.")
    got = error_from(ANSWERS.decode(ANSWERS.encode(Envelope(request_id="r", body=error_reply(sent)))).body)  # type: ignore[arg-type]
    assert type(got) is BudgetExceeded and isinstance(got, ValueError)
    assert vars(got) == vars(sent) and str(got) == str(sent)
    timeout = error_from(error_reply(PeerTimeout("late", rank=3, epoch=5)))
    assert type(timeout) is PeerTimeout and (timeout.rank, timeout.epoch) == (3, 5)


def test_an_error_of_a_newer_release_is_still_an_error() -> None:
    got = error_from(ErrorReply(error="InventedLater", what="something new", hint="Upgrade."))
    assert type(got) is ElasticMoEError and not isinstance(got, HmmError)
    assert str(got) == "something new. Upgrade."


@given(st.text(st.characters()), st.none() | st.text(st.characters()))
@example("long " * 2000, "hint " * 2000)
@example("a file named \udcff", "\udcff")
def test_any_error_text_can_be_sent(what: str, hint: str | None) -> None:
    reply = error_reply(ElasticMoEError(what, hint=hint, operation=hint))
    assert ANSWERS.decode(ANSWERS.encode(Envelope(request_id="r", body=reply))).body == reply


JOIN = to_worker.JoinSpec(rank=2, members=(0, 2), epoch=3, joining_rank=True, placement=(0, 2))
UNNUMBERED: list[tuple[Codec[Any], Message]] = [
    (to_imm.REQUESTS, to_imm.Register(rank=1, arguments=b"\x00\xff")),
    (to_imm.REQUESTS, to_imm.Assign(join_spec=JOIN)),
    (to_imm.REQUESTS, to_imm.AdoptWorkers(ranks={0: 11, 3: 12})),
    (to_coordinator.FROM_IMM, to_imm.Registered(rank=1, arguments=b"\x00\xff")),
    (to_coordinator.FROM_IMM, to_coordinator.WorkerExited(rank=1, pid=7, status=None)),
    (to_worker.ENTER, to_worker.Enter(arguments=b"", join_spec=JOIN)),
    (
        to_worker.REQUESTS,
        to_worker.PullColumns(operation_id="o", txn="t", sources={5: 0}),
    ),
    (
        to_coordinator.FROM_WORKER,
        to_coordinator.Retired(rank=1, operation_id="o", migrated={0: 2}, kv_chunks={0: (3, 4)}, kv_tokens=9),
    ),
    (to_coordinator.FROM_WORKER, to_worker.Failed(rank=1, operation_id="o", reason="no room")),
    (to_coordinator.FROM_IMM, to_imm.Population(ranks={0: 11}, standbys=[12], starting=[13])),
]


@pytest.mark.parametrize(("codec", "body"), UNNUMBERED, ids=lambda value: type(value).__name__)
def test_what_is_packed_comes_back_equal_and_only_for_its_receiver(codec: Codec[Any], body: Message) -> None:
    frame = codec.pack(body)
    assert codec.unpack(frame) == body
    for other in CODECS:
        if other is not codec:
            with pytest.raises(MalformedMessage):
                other.unpack(frame)


def test_every_message_has_a_name_of_its_own() -> None:
    tags = [cls.__name__ for cls in Message.__subclasses__() if cls.__module__.startswith("elasticmoe_sglang.")]
    assert len(tags) > 40 and len(set(tags)) == len(tags)
