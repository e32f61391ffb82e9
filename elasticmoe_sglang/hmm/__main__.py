"""`python -m elasticmoe_sglang.hmm --endpoint ipc:///run/me/hmm.sock --budget 2GiB --devices 4`

`elasticmoe hmm` is the same program.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from elasticmoe_sglang.errors import ElasticMoEError, UserInputError
from elasticmoe_sglang.hmm.config import HmmConfig
from elasticmoe_sglang.hmm.default_budget import Budgets, default_backend, default_budget
from elasticmoe_sglang.hmm.server import serve_hmm
from elasticmoe_sglang.units import format_bytes, parse_bytes

logger = logging.getLogger(__name__)

PROG = "python -m elasticmoe_sglang.hmm"


def parse_config(argv: Sequence[str] | None = None, *, prog: str = PROG) -> HmmConfig:
    """What the flags ask for; the log says which budget was chosen.

    Raises:
        UserInputError, DriverError: it cannot be had. Exits on --help and unknown flags.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Owns device memory.")
    parser.add_argument("--endpoint", required=True, help="ipc:///FOLDER/hmm.sock; the folder must be 0700 and yours")
    parser.add_argument(
        "--budget",
        help='a device, such as 2GiB; or one each: "2GiB,2GiB,1GiB" (default: all memory of each GPU; on the CPU '
        "the machine's memory, in equal shares)",
    )
    parser.add_argument(
        "--devices", type=int, help="how many, without a --budget for each (default: all GPUs or NPUs; on the CPU 1)"
    )
    parser.add_argument("--backend", help="kind of memory (default: cuda or npu where there is one, else cpu)")
    parser.add_argument(
        "--exit-with-parent",
        nargs="?",
        type=int,
        const=os.getppid(),
        default=None,
        metavar="PID",
        help="end when the parent process ends; with PID also when it was gone before this process looked",
    )
    parser.add_argument("--ready-fd", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    backend = args.backend or default_backend()
    chosen = _given(args.budget, args.devices) if args.budget is not None else default_budget(backend, args.devices)
    logger.info("budget: %s (%s)", ", ".join(map(format_bytes, chosen.devices)), chosen.source)
    return HmmConfig(
        endpoint=args.endpoint,
        budgets=chosen.devices,
        backend=backend,
        exit_with_parent=args.exit_with_parent,
        ready_fd=args.ready_fd,
    )


def _given(budget: str, devices: int | None) -> Budgets:
    budgets = tuple(parse_bytes(part) for part in budget.split(","))
    wanted = devices if devices is not None else len(budgets)
    if len(budgets) == 1:
        budgets *= wanted
    if len(budgets) != wanted:
        raise UserInputError(f"{len(budgets)} budgets are given for {wanted} devices", hint="Give one, or one each.")
    return Budgets(devices=budgets, source="as --budget says")


def main(argv: Sequence[str] | None = None, *, prog: str = PROG) -> int:
    """Runs an HMM in this process; the exit status. `prog` is what usage and errors call the program."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s HMM[%(process)d] %(message)s")
    try:
        serve_hmm(parse_config(argv, prog=prog))
    except ElasticMoEError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
