"""A real Prometheus (Debian's package) that scrapes a server under test, and its HTTP API."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.server import free_port

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = CONFIGS / "prometheus" / "prometheus.yml"
ALERTS = CONFIGS / "prometheus" / "alerts.yml"
DASHBOARD = CONFIGS / "grafana" / "elasticmoe.json"
_VARIABLES = {"$instance": ".*", "$__rate_interval": "1m", "$__range": "5m", "$__interval": "10s"}
"""What Grafana would put in, in this order."""
_READY_S = 30.0


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant vector or scalar. Raises AssertionError with Prometheus's own sentence."""
        response = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        answer = response.json()
        assert response.status_code == 200 and answer["status"] == "success", f"{expression}: {answer.get('error')}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def values(self, expression: str) -> list[float]:
        """The values of its series, those that are numbers."""
        found = [float(series["value"][1]) for series in self.query(expression)]
        return [value for value in found if not math.isnan(value)]

    def value(self, expression: str) -> float:
        """The value of its only series, 0 where there is none yet."""
        found = self.values(expression)
        assert len(found) < 2, f"{expression} has {len(found)} series"
        return found[0] if found else 0.0

    def rules(self) -> dict[str, dict[str, Any]]:
        """The alerting rules as Prometheus evaluates them, by name."""
        groups = requests.get(f"{self.url}/api/v1/rules", timeout=30).json()["data"]["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}


def need_prometheus() -> None:
    """Skip the test where Prometheus is not installed."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.skip("Prometheus is not installed; as root on Debian: apt-get install prometheus")


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """With the configuration that is shipped, but scrapes http://`target`/metrics, and evaluates alerts, every second.

    Args:
        target: host:port. folder: for its configuration, data and log.
    """
    config = CONFIG.read_text()
    for shipped, here in (
        ("127.0.0.1:30000", target),
        ("_interval: 5s", "_interval: 1s"),
        ("_interval: 15s", "_interval: 1s"),
    ):
        assert config.count(shipped) == 1, f"{shipped} in {CONFIG}"
        config = config.replace(shipped, here)
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(ALERTS, folder)
    url = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        served = Prometheus(f"http://{url}")
        _wait_ready(served, process, folder / "prometheus.log")
        yield served
    finally:
        process.terminate()
        process.wait(20)


def _wait_ready(served: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"{served.url}/-/ready", timeout=5).status_code == 200 and served.values("up == 1"):
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"Prometheus scraped nothing within {_READY_S:g} s: {log.read_text()[-2000:]}")


def panels() -> Iterator[tuple[str, str, bool]]:
    """(title, expression with Grafana's variables filled in, whether it shows the policy) of every panel's targets."""
    section = ""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            section = panel["title"]
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in _VARIABLES.items():
                expression = expression.replace(variable, value)
            yield panel["title"], expression, section == "Policy"
