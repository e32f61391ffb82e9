"""How many programs a collective's kernel may have where ranks share a device."""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_sglang.errors import UserInputError

_COLLECTIVES_AT_ONCE = 2
_MOST_PROGRAMS = 32


@dataclass(frozen=True, kw_only=True)
class LaunchRoom:
    """multiprocessors: each rank's; programs: of each launch, the same on every rank."""

    multiprocessors: int
    programs: int

    @classmethod
    def of(cls, multiprocessors: int, ranks: int) -> LaunchRoom:
        """What `ranks` ranks of a device with so many multiprocessors have.

        A program that waits for a peer keeps its multiprocessor. All ranks of the device, each with the collective that
        ends and the one that begins, must fit beside each other, or one waits for a peer that finds no place. A program
        may need a whole multiprocessor's registers.

        Raises:
            UserInputError: the ranks leave each other no room.
        """
        each = multiprocessors // ranks
        room = each // _COLLECTIVES_AT_ONCE
        if room < 1:
            raise UserInputError(
                f"{ranks} ranks on one GPU leave {each} multiprocessors a rank, and a collective takes "
                f"{_COLLECTIVES_AT_ONCE}",
                hint="Lower --elasticmoe-ranks-per-device",
            )
        return cls(multiprocessors=each, programs=min(_MOST_PROGRAMS, 1 << room.bit_length() - 1))
