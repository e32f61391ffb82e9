"""Which NPUs this process would see, and how much memory each has.

    python -m elasticmoe_sglang.hmm.vmm.acl_probe      prints one line of JSON, see `NpuProbe`

Asked of a program: reading a device's memory makes a context on it, ACL does not survive a fork, and the processes that
want to know (the launcher, an HMM before it serves, `elasticmoe doctor`) either fork or must hold no device. Imports no
torch: a torch_npu that cannot be loaded breaks `import torch` itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from elasticmoe_sglang.answers import ask_program
from elasticmoe_sglang.errors import DriverError, UserInputError, VmmError
from elasticmoe_sglang.hmm.vmm import acl as _acl

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
PROBE_TIMEOUT_S = 60.0
NODES = Path("/dev")
"""Where the driver shows its devices: davinci_manager, and davinci0, davinci1, ... for each NPU."""


class NpuDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one NPU's memory: free now, and in all."""

    free: int
    total: int


class NpuProbe(msgspec.Struct, frozen=True, kw_only=True):
    """soc: the chip's name. devices: those this process may use, number = index. error: why there are none."""

    soc: str = ""
    error: str = ""
    devices: tuple[NpuDevice, ...] = ()


def visible_devices(environment: Mapping[str, str] | None = None) -> tuple[int, ...] | None:
    """The NPUs that ASCEND_RT_VISIBLE_DEVICES names, None where it is not set; empty hides all.

    CANN reads device ids separated by commas, in ascending order. It drops what follows another character and takes a
    list in another order for none at all, so that a slip would show as missing devices: it is refused here.

    Raises:
        UserInputError: the value is no such list.
    """
    text = (os.environ if environment is None else environment).get(VISIBLE)
    if text is None:
        return None
    parts = text.split(",") if text else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserInputError(
            f"{VISIBLE}={text!r} is not a list of device ids: CANN reads digits and commas only",
            hint=f"Write {VISIBLE}=0,1,2,3",
        )
    numbers = tuple(map(int, parts))
    ascending = tuple(sorted(set(numbers)))
    if numbers != ascending:
        wanted = ",".join(map(str, ascending))
        raise UserInputError(
            f"{VISIBLE}={text} is not in ascending order: CANN would show no device at all",
            hint=f"Write {VISIBLE}={wanted}",
        )
    return numbers


def has_driver() -> bool:
    """Whether the NPU driver's device node is here; says nothing about CANN."""
    return (NODES / "davinci_manager").exists()


def probe() -> NpuProbe:
    """Run the program; its failure is the probe's `error`."""
    module, silent = "elasticmoe_sglang.hmm.vmm.acl_probe", "exit status {status}"
    found = ask_program(module, answer=NpuProbe, timeout_s=PROBE_TIMEOUT_S, silent=silent)
    return NpuProbe(error=found) if isinstance(found, str) else found


@functools.cache
def total_memory() -> tuple[int, ...]:
    """Bytes of each NPU that this process sees, device number = index. Asked once a process.

    Raises:
        DriverError: CANN is not installed, or finds no device.
    """
    found = probe()
    if found.error or not found.devices:
        raise DriverError(f"no NPU can be used: {found.error or 'CANN finds none'}", code=0, hint=_acl.CANN_HINT)
    return tuple(device.total for device in found.devices)


def look() -> NpuProbe:
    """In this process: makes a context on each device, one after the other."""
    try:
        acl = _acl.load()
        count = ctypes.c_uint32()
        acl("aclrtGetDeviceCount", count)
        soc, devices = "", []
        for number in range(count.value):
            acl("aclrtSetDevice", number)
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            acl("aclrtGetMemInfo", _acl.HBM_MEM, free, total)
            soc = soc or acl.soc_name()
            devices.append(NpuDevice(free=free.value, total=total.value))
            acl("aclrtResetDevice", number)
    except VmmError as error:
        return NpuProbe(error=error.what)
    return NpuProbe(soc=soc, devices=tuple(devices))


def main() -> None:
    """The program."""
    print(msgspec.json.encode(look()).decode())


if __name__ == "__main__":
    main()
