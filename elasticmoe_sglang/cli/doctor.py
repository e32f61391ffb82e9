"""`elasticmoe doctor`: checks whether serving would work here, and which command fixes what is missing.

Every check reports what it found and, if it failed, the exact command to run. Exit status 0 only if all required checks
have passed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from elasticmoe_sglang.cli import doctor_checks, doctor_gpu, doctor_npu
from elasticmoe_sglang.cli.doctor_checks import Check, Device, HookReport
from elasticmoe_sglang.hmm.vmm import acl_probe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `doctor` command; its namespace carries `run`."""
    text = "Check versions, hooks, devices and memory, and print the commands that fix what is missing."
    parser = subparsers.add_parser("doctor", help=text, description=text)
    _add_flags(parser)
    parser.set_defaults(run=run)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    sizes = "for GPUs and NPUs: check for so many ranks"
    parser.add_argument("--max-ep-size", type=_positive, default=1, metavar="N", help=sizes)
    parser.add_argument("--ranks-per-device", type=_positive, default=1, metavar="N", help=f"{sizes} on each GPU")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of ranks")
    return number


def run(args: argparse.Namespace) -> int:
    """Check and print; returns 0 only if serving would work."""
    devices = doctor_checks.devices()
    hooks = doctor_checks.hooks()
    kind = devices[0].kind
    wanted = doctor_gpu.Wanted(max_ep_size=args.max_ep_size, ranks_per_device=args.ranks_per_device)
    checks = [
        *doctor_checks.versions(kind),
        *doctor_checks.installation(),
        doctor_checks.hooks_check(hooks),
        *doctor_checks.uses_checks(hooks),
        *doctor_checks.memory(kind),
        *_device_checks(kind, wanted),
        *doctor_checks.system(),
    ]
    ok = all(check.ok or not check.required for check in checks)
    if args.json:
        print(json.dumps(as_json(ok, checks, hooks, devices), indent=2))
    else:
        print(as_text(ok, checks, hooks, devices))
    return 0 if ok else 1


def _device_checks(kind: str, wanted: doctor_gpu.Wanted) -> list[Check]:
    if kind == "cuda":
        return doctor_gpu.checks(doctor_gpu.probe(), wanted)
    if kind == "npu":
        return doctor_npu.checks(acl_probe.probe(), doctor_npu.installed(), wanted.max_ep_size)
    return []


def as_json(ok: bool, checks: Sequence[Check], hooks: HookReport, devices: Sequence[Device]) -> dict[str, object]:
    """The report as JSON: `ok`, `checks`, `hooks` and `devices`."""
    return {
        "ok": ok,
        "checks": [asdict(check) for check in checks],
        "hooks": hooks.rows,
        "devices": [asdict(device) for device in devices],
    }


def as_text(ok: bool, checks: Sequence[Check], hooks: HookReport, devices: Sequence[Device]) -> str:
    """The report as text: one line per check, device and hook, and the commands that fix failed checks."""
    width = max(len(check.name) for check in checks)
    lines = [f"{_mark(check)} {check.name:<{width}}  {check.found}" for check in checks]
    lines.append("\ndevices")
    lines.extend(f"  {device.kind} {device.number}: {device.name}, {device.memory}" for device in devices)
    lines.append("\nhooks into SGLang")
    for row in hooks.rows:
        problem = f": {row['problem']}" if row["problem"] else ""
        lines.append(f"  {'ok  ' if row['ok'] else 'FAIL'} {row['target']} [{row['kind']}, {row['scope']}]{problem}")
    if not hooks.rows:
        lines.append(f"  not known: {hooks.error}")
    failed = [check for check in checks if not check.ok]
    if failed:
        lines.append("\nto fix it")
        lines.extend(f"  {check.name}: {check.fix}" for check in failed)
    lines.append("\nserving would work here" if ok else "\nserving would not work here")
    return "\n".join(lines)


def _mark(check: Check) -> str:
    if check.ok:
        return "ok  "
    return "FAIL" if check.required else "warn"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m elasticmoe_sglang.cli.doctor`."""
    parser = argparse.ArgumentParser(prog="elasticmoe doctor")
    _add_flags(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
