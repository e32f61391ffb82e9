"""The files under configs/k8s agree with the server's routes, flags and metrics, and with each other."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from elasticmoe_sglang.config import ElasticConfig, add_arguments

K8S = Path(__file__).parents[2] / "configs" / "k8s"


def parts(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((K8S / name).read_text()))


def part(name: str, kind: str) -> dict[str, Any]:
    (found,) = (entry for entry in parts(name) if entry["kind"] == kind)
    return found


@pytest.fixture
def container() -> dict[str, Any]:
    (found,) = part("server.yaml", "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def elastic(arguments: list[str], *, short: bool = False) -> tuple[ElasticConfig, dict[str, str]]:
    """The settings in a command line, and the other flags."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, short=short)
    parsed, others = parser.parse_known_args(arguments)
    config = ElasticConfig.from_namespace(parsed)
    assert config is not None
    return config, dict(other.split("=", 1) if "=" in other else (other, "") for other in others)


def test_every_file_is_read_here() -> None:
    assert {path.name for path in K8S.iterdir()} == {"server.yaml", "keda.yaml", "dynamo.yaml", "gpustack.yaml"}
    for name in ("server.yaml", "keda.yaml", "dynamo.yaml"):
        assert all({"apiVersion", "kind", "metadata", "spec"} <= set(entry) for entry in parts(name))


def test_a_pod_has_the_gpus_of_the_largest_size(container: dict[str, Any]) -> None:
    config, others = elastic(container["args"], short=True)
    assert container["command"] == ["elasticmoe", "serve"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == config.num_devices == config.max_ep_size
    assert config.ep_size < config.max_ep_size and "--enable-metrics" in others
    assert others["--port"] == str(container["ports"][0]["containerPort"])


def test_the_service_finds_the_pods(container: dict[str, Any]) -> None:
    deployment, service = part("server.yaml", "Deployment"), part("server.yaml", "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"] == "http"
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(container["ports"][0]["containerPort"])


def test_no_probe_is_less_patient_than_a_change(container: dict[str, Any]) -> None:
    """/health takes a second at least and Kubernetes' own limit is one; a commit may take until its deadline."""
    deadline_s = ElasticConfig(ep_size=1, max_ep_size=2).commit_deadline_s
    ready, live = container["readinessProbe"], container["livenessProbe"]
    assert ready["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/ready"
    assert live["httpGet"]["path"] == "/health" and live["timeoutSeconds"] > deadline_s
    assert live["periodSeconds"] * live["failureThreshold"] > deadline_s
    assert ready["timeoutSeconds"] > 1


def test_keda_adds_servers_before_one_is_full(container: dict[str, Any]) -> None:
    scaled, deployment = part("keda.yaml", "ScaledObject"), part("server.yaml", "Deployment")
    target = scaled["spec"]["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"]) == (deployment["apiVersion"], deployment["kind"])
    assert target["name"] == deployment["metadata"]["name"]
    (trigger,) = scaled["spec"]["triggers"]
    # With AverageValue replicas = sum / threshold: a threshold of all ranks would only be met by full servers.
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert re.findall(r"[a-z]+:[a-z_]+", trigger["metadata"]["query"]) == ["elasticmoe:policy_desired_ranks"]
    config, _ = elastic(container["args"], short=True)
    assert config.max_ep_size / 2 < int(trigger["metadata"]["threshold"]) < config.max_ep_size
    assert scaled["spec"]["minReplicaCount"] >= 1, "nobody would say how many ranks are wanted"


def test_dynamos_worker_is_an_elastic_server() -> None:
    frontend, worker = part("dynamo.yaml", "DynamoGraphDeployment")["spec"]["components"]
    assert (frontend["type"], worker["type"]) == ("frontend", "worker")
    (main,) = worker["podTemplate"]["spec"]["containers"]
    assert main["command"] == ["python3", "-m", "elasticmoe_patches.run", "dynamo.sglang"]
    config, others = elastic(main["args"])
    assert others["--elastic-ep-backend"] == "elasticmoe"
    assert main["resources"]["limits"]["nvidia.com/gpu"] == str(config.num_devices)


def test_gpustacks_backend_runs_an_elastic_server() -> None:
    (backend,) = parts("gpustack.yaml")
    version = backend["version_configs"][backend["default_version"]]
    command = shlex.split(version["run_command"].replace("{{gpu_count}}", "8"))
    assert command[:3] == ["python3", "-m", "sglang.launch_server"]
    assert {"{{model_path}}", "{{model_name}}", "{{worker_ip}}", "{{port}}"} <= set(command)
    config, _ = elastic([*command[3:], *backend["default_backend_param"]])
    assert (config.ep_size, config.max_ep_size) == (2, 8)
    assert backend["health_check_path"] == "/ready"
