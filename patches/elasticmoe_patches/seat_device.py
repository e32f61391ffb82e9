"""What a seat on a GPU does beyond one on the CPU: its windows, and meeting the other seats of a server's start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.seats.control import SeatState

if TYPE_CHECKING:
    from elasticmoe_sglang.seats.cuda_fabric import CudaFabric

_FIRST_SEATS_S = 600.0


def boots_alone(seat: Any) -> bool:
    """On a GPU also the seats of a server's start: nobody waits for another's compiling and capturing."""
    return bool(seat.client.backend.name == "cuda")


def check_collectives(seat: Any) -> None:
    """Raise what a collective on the GPU has reported since the last membership; see `CudaFabric.check`."""
    if seat.cuda is not None:
        seat.cuda.check()


def open_windows(seat: Any) -> CudaFabric | None:
    """The seat's windows, under every process group made from here on; None on the CPU. SGLang has set the device."""
    if not boots_alone(seat):
        return None
    from elasticmoe_sglang.seats.cuda_fabric import CudaFabric
    from elasticmoe_sglang.seats.cuda_group import install_cuda_groups

    attach_s = seat.runtime.config.prepare_deadline_s
    windows = CudaFabric(seat.client, seat.fabric, device=seat.device, attach_s=attach_s)
    install_cuda_groups(seat.fabric, windows)
    return windows


def prepare_to_join(seat: Any) -> None:
    """Before the gate, so that the commit has less to do: map the members' windows, end what runs."""
    if seat.cuda is not None:
        seat.cuda.prefetch(tuple(member for member in seat.ticket.members if seat.fabric.control.alive(member)))
        seat.cuda.drain()


def await_first_members(seat: Any) -> None:
    """Return once the other seats of the server's start have booted.

    Raises:
        SeatError: one did not come.
    """
    control = seat.fabric.control
    control.set_seat_state(seat.me, SeatState.READY)
    deadline = time.monotonic() + _FIRST_SEATS_S
    waiting = set(seat.ticket.members) - {seat.me}
    while waiting := {other for other in waiting if control.seat(other).state < SeatState.READY}:
        if time.monotonic() > deadline:
            raise SeatError(f"seats {sorted(waiting)} did not boot within {_FIRST_SEATS_S:.0f} s", seat=seat.me)
        time.sleep(0.005)
