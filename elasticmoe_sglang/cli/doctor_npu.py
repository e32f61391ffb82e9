"""The checks of `elasticmoe doctor` on a machine with Ascend NPUs.

What the runtime says comes from `elasticmoe_sglang.hmm.vmm.acl_probe`, run as a program. Nothing here imports torch: a
torch_npu that does not fit breaks `import torch` itself, and this command has to say so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elasticmoe_sglang.cli.doctor_checks import Check, device_memory, installed_version
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.hmm.vmm import acl_probe
from elasticmoe_sglang.hmm.vmm.acl_probe import NpuProbe

TORCH_NPU = "2.13.0"
TRITON_ASCEND = "3.2.0"
LEAST_CANN = (8, 1)
"""The first whose headers export memory without a list of admitted processes."""
LEAST_BYTES_A_RANK = 1 << 30
"""For each rank, before any weight or KV: a context, CANN's workspaces. An estimate; not measured on an NPU."""
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
DRIVER_FOLDER = Path("/usr/local/Ascend/driver")
_HOME = "ASCEND_HOME_PATH"
_VERSION = re.compile(r"^version=(\S+)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Installed:
    """Versions on this machine; empty where there is none.

    cann: of the toolkit that `set_env.sh` chose. driver: of the kernel driver. missing: modules that SGLang's NPU path
    imports and that cannot be found.
    """

    cann: str = ""
    driver: str = ""
    torch: str = ""
    torch_npu: str = ""
    triton_ascend: str = ""
    triton: str = ""
    missing: tuple[str, ...] = ()


# Module -> where it comes from. SGLang imports all of them on an NPU; without `acl` it silently has no DeepSeek.
_MODULES = {
    "acl": SET_ENV,
    "sgl_kernel_npu": "install sgl-kernel-npu's wheel for this CANN (github.com/sgl-project/sgl-kernel-npu, releases)",
}


def installed() -> Installed:
    """Reads version files and package metadata; loads nothing."""
    return Installed(
        cann=_cann_version(),
        driver=_version_in(DRIVER_FOLDER / "version.info"),
        torch=installed_version("torch"),
        torch_npu=installed_version("torch_npu"),
        triton_ascend=installed_version("triton-ascend"),
        triton=installed_version("triton"),
        missing=tuple(name for name in _MODULES if importlib.util.find_spec(name) is None),
    )


def _cann_version() -> str:
    """From the toolkit's `<arch>-linux/ascend_toolkit_install.info`."""
    home = os.environ.get(_HOME)
    if not home:
        return ""
    infos = sorted(Path(home).glob("*-linux/ascend_*_install.info"))
    return next(filter(None, map(_version_in, infos)), "")


def _version_in(path: Path) -> str:
    try:
        found = _VERSION.search(path.read_text(errors="replace"))
    except OSError:
        return ""
    return found.group(1) if found else ""


def checks(found: NpuProbe, here: Installed, ranks: int) -> list[Check]:
    """Whether `ranks` ranks, one an NPU, would find what they need."""
    return [*_versions(here), *_modules(here), *_devices(found, ranks)]


def _versions(here: Installed) -> Iterator[Check]:
    numbers = tuple(map(int, re.findall(r"\d+", here.cann)[:2]))
    least = ".".join(map(str, LEAST_CANN))
    cann_ok = bool(numbers) and numbers >= LEAST_CANN
    yield Check(
        name="CANN",
        ok=cann_ok,
        found=here.cann if cann_ok else f"{here.cann or f'not found by {_HOME}'}, needs {least} or newer",
        fix="" if cann_ok else SET_ENV,
    )
    yield Check(
        name="NPU driver",
        ok=bool(here.driver),
        found=here.driver or f"no {DRIVER_FOLDER}/version.info",
        fix="" if here.driver else "npu-smi info   # in a container: mount /usr/local/Ascend/driver of the host",
        required=False,
    )
    torch = here.torch.split("+")[0]
    fits = here.torch_npu.split("+")[0] == TORCH_NPU and torch == TORCH_NPU
    yield Check(
        name="torch_npu",
        ok=fits,
        found=here.torch_npu
        if fits
        else f"{here.torch_npu or 'not installed'} with torch {torch or '-'}, needs {TORCH_NPU} of both",
        fix="" if fits else f"{sys.executable} -m pip install torch=={TORCH_NPU} torch_npu=={TORCH_NPU}",
    )
    pip = f"{sys.executable} -m pip"
    triton_ok = here.triton_ascend == TRITON_ASCEND and not here.triton
    also = f", and triton {here.triton}, which takes its place" if here.triton and here.triton_ascend else ""
    yield Check(
        name="triton-ascend",
        ok=triton_ok,
        found=(here.triton_ascend or "not installed") + (also or ("" if triton_ok else f", needs {TRITON_ASCEND}")),
        fix="" if triton_ok else f"{pip} uninstall -y triton; {pip} install triton-ascend=={TRITON_ASCEND}",
    )


def _modules(here: Installed) -> Iterator[Check]:
    for name, fix in _MODULES.items():
        ok = name not in here.missing
        text = "can be imported" if ok else "not found; SGLang's NPU path imports it"
        yield Check(name=f"module {name}", ok=ok, found=text, fix="" if ok else fix)


def _devices(found: NpuProbe, ranks: int) -> Iterator[Check]:
    try:
        visible = acl_probe.visible_devices()
    except UserInputError as error:
        yield Check(name="NPUs", ok=False, found=error.what, fix=f"export {acl_probe.VISIBLE}=0,1,2,3   # ascending")
        return
    here = len(found.devices)
    ok = here >= ranks
    named = "" if visible is None else f" ({acl_probe.VISIBLE} names {len(visible)})"
    if found.error:
        text = found.error.splitlines()[0]
    else:
        text = f"{here} {found.soc}".rstrip() + f"{named}, for {ranks} ranks" + ("" if ok else ": too few")
    fix = SET_ENV if found.error else f"elasticmoe serve --max-ep-size {here} ...   # or change {acl_probe.VISIBLE}"
    yield Check(name="NPUs", ok=ok, found=text, fix="" if ok else fix)
    if not ok:
        return
    yield device_memory("NPU", found.devices[:ranks], LEAST_BYTES_A_RANK, tool="npu-smi info")
