"""`elasticmoe doctor` on a machine with Ascend NPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from elasticmoe_sglang.cli import doctor, doctor_checks, doctor_npu
from elasticmoe_sglang.cli.doctor_npu import Installed
from elasticmoe_sglang.hmm.vmm import acl_probe
from elasticmoe_sglang.hmm.vmm.acl_probe import NpuDevice, NpuProbe

FITS = Installed(cann="8.1.RC1", driver="24.1.0", torch="2.13.0+cpu", torch_npu="2.13.0", triton_ascend="3.2.0")
B3 = NpuDevice(free=60 << 30, total=64 << 30)
FOUR = NpuProbe(soc="Ascend910B3", devices=(B3,) * 4)


def failed(found: NpuProbe = FOUR, here: Installed = FITS, ranks: int = 4) -> dict[str, str]:
    """Name -> what was found, of the checks that failed. Each names a command."""
    bad = [check for check in doctor_npu.checks(found, here, ranks) if not check.ok]
    assert all(check.fix for check in bad)
    return {check.name: check.found for check in bad}


def test_a_machine_that_serves_passes_every_check() -> None:
    assert not failed()
    texts = {check.name: check.found for check in doctor_npu.checks(FOUR, FITS, 4)}
    assert texts["NPUs"] == "4 Ascend910B3, for 4 ranks" and texts["NPU memory"] == "60 GiB of 64 GiB free"


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        ({"cann": "8.0.RC3"}, "CANN", "8.0.RC3, needs 8.1 or newer"),
        ({"cann": ""}, "CANN", "not found by ASCEND_HOME_PATH, needs 8.1 or newer"),
        ({"driver": ""}, "NPU driver", "no /usr/local/Ascend/driver/version.info"),
        ({"torch": "2.12.0"}, "torch_npu", "2.13.0 with torch 2.12.0, needs 2.13.0 of both"),
        ({"torch_npu": ""}, "torch_npu", "not installed with torch 2.13.0, needs 2.13.0 of both"),
        ({"triton_ascend": ""}, "triton-ascend", "not installed, needs 3.2.0"),
        ({"triton": "3.6.0"}, "triton-ascend", "3.2.0, and triton 3.6.0, which takes its place"),
        ({"missing": ("acl",)}, "module acl", "not found; SGLang's NPU path imports it"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], name: str, text: str) -> None:
    assert failed(here=replace(FITS, **change)) == {name: text}


@pytest.mark.parametrize("version", ["8.1.RC1", "8.2.RC1.alpha002", "8.10.0", "9.0.0"])
def test_newer_toolkits_fit(version: str) -> None:
    assert not failed(here=replace(FITS, cann=version))


def test_too_few_npus_and_lists_that_hide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(ranks=8) == {"NPUs": "4 Ascend910B3, for 8 ranks: too few"}
    assert failed(NpuProbe(error="libascendcl.so cannot be loaded")) == {"NPUs": "libascendcl.so cannot be loaded"}
    monkeypatch.setenv(acl_probe.VISIBLE, "4,5")
    text = "2 Ascend910B3 (ASCEND_RT_VISIBLE_DEVICES names 2), for 4 ranks: too few"
    assert failed(NpuProbe(soc="Ascend910B3", devices=(B3,) * 2)) == {"NPUs": text}
    monkeypatch.setenv(acl_probe.VISIBLE, "5,4")
    assert "not in ascending order" in failed()["NPUs"]


def test_memory_that_others_hold_is_found() -> None:
    busy = NpuProbe(soc="Ascend910B3", devices=(B3, NpuDevice(free=1 << 29, total=64 << 30)))
    assert not failed(busy, ranks=1)
    assert failed(busy, ranks=2) == {"NPU memory": "512 MiB of 64 GiB free, 1 GiB needed beside weights and KV"}


def test_versions_are_read_from_canns_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "latest" / "aarch64-linux"
    folder.mkdir(parents=True)
    (folder / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.1.RC1\narch=x\n")
    (tmp_path / "version.info").write_text("Version=24.1.0\nascendhal_version=7.35.23\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(folder.parent))
    monkeypatch.setattr(doctor_npu, "DRIVER_FOLDER", tmp_path)
    here = doctor_npu.installed()
    assert (here.cann, here.driver, here.torch_npu) == ("8.1.RC1", "24.1.0", "")
    assert set(here.missing) == {"acl", "sgl_kernel_npu"}
    monkeypatch.delenv("ASCEND_HOME_PATH")
    assert doctor_npu.installed().cann == ""


def test_an_npus_checks_replace_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "triton" in {check.name for check in doctor_checks.versions("cpu")}
    assert "triton" not in {check.name for check in doctor_checks.versions("npu")}
    monkeypatch.setattr(acl_probe, "probe", lambda: FOUR)
    names = {check.name for check in doctor._device_checks("npu", doctor.doctor_gpu.Wanted(max_ep_size=4))}
    assert {"CANN", "NPU driver", "torch_npu", "triton-ascend", "NPUs", "NPU memory"} <= names
    assert doctor._device_checks("cpu", doctor.doctor_gpu.Wanted()) == []
