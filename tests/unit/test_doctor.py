"""`elasticmoe doctor`: its status is right, and every failed check names the command that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from elasticmoe_sglang.cli import doctor, doctor_checks
from elasticmoe_sglang.cli.doctor_checks import Check, HookReport

GOOD_HOOKS = HookReport(
    rows=[{"target": "sglang.a.b", "kind": "after", "scope": "flags", "ok": True, "problem": None}],
)


def run_doctor(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *flags: str,
    hooks: HookReport = GOOD_HOOKS,
) -> tuple[int, str]:
    """The command through a parser, with the slow look at SGLang replaced."""
    monkeypatch.setattr(doctor_checks, "hooks", lambda: hooks)
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *flags])
    return args.run(args), capsys.readouterr().out


def test_this_machine_could_serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run_doctor(monkeypatch, capsys)
    assert status == 0, out
    assert out.strip().endswith("serving would work here")
    assert "sglang.a.b" in out and "memory backend cpu" in out


def test_the_report_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run_doctor(monkeypatch, capsys, "--json")
    report = json.loads(out)
    assert report["ok"] is (status == 0)
    assert {"python", "torch", "sglang", "transformers", "pyzmq", "msgspec", "triton", "hooks"} <= {
        check["name"] for check in report["checks"]
    }
    assert all(check["fix"] for check in report["checks"] if not check["ok"])
    assert report["hooks"] == GOOD_HOOKS.rows
    assert report["devices"][0]["kind"] in ("cpu", "cuda", "npu")


@pytest.mark.process
def test_a_hook_that_does_not_fit_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = HookReport(rows=[{**GOOD_HOOKS.rows[0], "ok": False, "problem": "has signature (x), expected (y)"}])
    status, out = run_doctor(monkeypatch, capsys, hooks=bad)
    assert status == 1
    assert "has signature (x), expected (y)" in out
    assert "pip install --force-reinstall --no-deps sglang==0.5.23" in out
    assert out.strip().endswith("serving would not work here")


@pytest.mark.process
def test_an_attribute_that_is_gone_fails_and_a_changed_body_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = "sglang.a.B.rows (read): no such attribute"
    status, out = run_doctor(monkeypatch, capsys, hooks=HookReport(rows=GOOD_HOOKS.rows, uses=3, missing=[gone]))
    assert status == 1
    assert gone in out
    changed = HookReport(rows=GOOD_HOOKS.rows, uses=3, changed=["sglang.a.B.run"])
    checks = {check.name: check for check in doctor_checks.uses_checks(changed)}
    assert checks["used attributes"].ok and checks["used attributes"].found == "3 there"
    assert not checks["hooked bodies"].ok and not checks["hooked bodies"].required
    assert "sglang.a.B.run" in checks["hooked bodies"].found


@pytest.mark.process
def test_no_answer_from_preflight_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run_doctor(monkeypatch, capsys, hooks=HookReport(error="No module named 'sglang'"))
    assert status == 1
    assert "No module named 'sglang'" in out


@pytest.mark.parametrize(
    ("found", "ok", "text"),
    [
        ("0.5.21", True, "0.5.21"),
        ("0.5.23", True, "0.5.23"),
        ("0.5.22", False, "0.5.22, needs 0.5.21 or 0.5.23"),
        (None, False, "not installed, needs 0.5.21 or 0.5.23"),
    ],
)
def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch, found: str | None, ok: bool, text: str) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != "sglang":
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = {check.name: check for check in doctor_checks.versions("cpu")}["sglang"]
    assert (check.ok, check.found) == (ok, text)
    assert check.fix == ("" if ok else f"{sys.executable} -m pip install --no-deps sglang==0.5.23")


def test_a_plugin_filter_that_leaves_us_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    check = {check.name: check for check in doctor_checks.installation()}["SGLANG_PLUGINS"]
    assert not check.ok and check.fix == "export SGLANG_PLUGINS=other,elasticmoe"


def test_a_low_limit_of_open_files_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    check = {check.name: check for check in doctor_checks.system()}["open files"]
    assert not check.ok and check.fix == "ulimit -n 1024"


def test_a_device_without_a_memory_backend_fails_with_its_name() -> None:
    check = doctor_checks.memory("tpu")[1]
    assert not check.ok
    assert "there is no memory backend for tpu" in check.found


def test_the_backend_check_gives_everything_back(no_leaks: None) -> None:
    check = doctor_checks.memory("cpu")[1]
    assert check.ok, check.found


@pytest.mark.process
def test_devices_come_from_the_drivers_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, NVIDIA H200, 143771 MiB'\necho '1, NVIDIA H200, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(device.kind, device.number) for device in doctor_checks.devices()] == [("cuda", 0), ("cuda", 1)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [device.kind for device in doctor_checks.devices()] == ["cpu"]


def test_only_required_checks_decide() -> None:
    warning = Check(name="compilers", ok=False, found="missing: gcc", fix="apt-get install -y gcc", required=False)
    text = doctor.as_text(True, [warning], GOOD_HOOKS, doctor_checks.devices())
    assert "warn compilers" in text and "apt-get install -y gcc" in text


@pytest.mark.process
@pytest.mark.timeout(200)
def test_preflight_as_a_program_reports_the_real_hooks() -> None:
    report = doctor_checks.hooks()
    assert report.error == ""
    assert report.missing == [], "SGLang lacks what is declared in patches/elasticmoe_patches/uses.py"
    assert report.changed == [], "read these bodies, then: python -m elasticmoe_patches.bodies --read"
    assert report.uses > 400
    assert {"target", "kind", "scope", "processes", "hook", "ok", "problem"} == set(report.rows[0])


@pytest.mark.process
def test_the_module_does_not_import_sglang() -> None:
    code = "import sys, elasticmoe_sglang.cli.doctor; sys.exit('sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
