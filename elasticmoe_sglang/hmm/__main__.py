"""`python -m elasticmoe_sglang.hmm --endpoint ipc:///run/me/hmm.sock --budget 2GiB --devices 4`"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from elasticmoe_sglang.errors import ElasticMoEError, UserInputError
from elasticmoe_sglang.hmm.config import HmmConfig
from elasticmoe_sglang.hmm.server import serve_hmm
from elasticmoe_sglang.units import parse_bytes


def parse_config(argv: Sequence[str] | None = None) -> HmmConfig:
    """Raises UserInputError; exits on --help and unknown flags."""
    parser = argparse.ArgumentParser(prog="python -m elasticmoe_sglang.hmm", description="Owns device memory.")
    parser.add_argument("--endpoint", required=True, help="ipc:///FOLDER/hmm.sock; the folder must be 0700 and yours")
    parser.add_argument("--budget", required=True, help='a device, such as 2GiB; or one each: "2GiB,2GiB,1GiB"')
    parser.add_argument("--devices", type=int, default=None, help="how many, for a single --budget (default 1)")
    parser.add_argument("--backend", default="cpu", help="kind of memory (default cpu)")
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
    budgets = [parse_bytes(part) for part in args.budget.split(",")]
    devices = args.devices if args.devices is not None else len(budgets)
    if len(budgets) == 1:
        budgets *= devices
    if len(budgets) != devices:
        raise UserInputError(f"{len(budgets)} budgets are given for {devices} devices", hint="Give one, or one each.")
    return HmmConfig(
        endpoint=args.endpoint,
        budgets=tuple(budgets),
        backend=args.backend,
        exit_with_parent=args.exit_with_parent,
        ready_fd=args.ready_fd,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an HMM in this process; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s HMM[%(process)d] %(message)s")
    try:
        serve_hmm(parse_config(argv))
    except ElasticMoEError as error:
        print(f"elasticmoe hmm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
