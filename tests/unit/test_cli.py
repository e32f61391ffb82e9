"""The `elasticmoe` command against a real HTTP server whose coordinator runs over the fake cluster."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from rich.console import Console

from elasticmoe_sglang.api.router import build_router, mount
from elasticmoe_sglang.cli import serve
from elasticmoe_sglang.cli.main import main
from elasticmoe_sglang.cli.progress import OperationProgress, completion
from elasticmoe_sglang.cli.render import draw_placement, operations_table, status_view
from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.coordinator.status import MemoryStatus, Operation, Phase, Status
from elasticmoe_sglang.launch_config import load_launch_config
from tests.helpers.fake_cluster import FakeCluster

pytestmark = pytest.mark.process


@contextmanager
def http_server(app: FastAPI) -> Iterator[int]:
    """The app on a free port of the loopback interface, in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the HTTP server did not start"
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def elastic_server(cluster: FakeCluster) -> Iterator[int]:
    app = FastAPI()
    mount(app, build_router(cluster.coordinator(prepare_deadline_s=30)))
    with http_server(app) as port:
        yield port


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ELASTICMOE_URL", "ELASTICMOE_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.fixture
def port() -> Iterator[int]:
    with elastic_server(FakeCluster()) as port:
        yield port


def run(port: int, *argv: str) -> int:
    return main([*argv, "--port", str(port)])


def test_scale_wait_json(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "scale", "4", "--wait", "--json") == 0
    out, err = capsys.readouterr()
    operation = json.loads(out)
    assert operation["phase"] == "done" and operation["ranks_after"] == [0, 1, 2, 3]
    assert "EP 2 -> 4, 4/4 columns" in err


def test_scale_retire_and_restore_for_people(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "scale", "4", "--wait") == 0
    assert run(port, "scale", "--retire", "1,3", "--wait") == 0
    out = capsys.readouterr().out
    assert "ranks 2, 3" in out and "ranks 1, 3" in out and "requests moved" in out
    assert run(port, "scale", "--restore", "3", "--wait", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ranks_after"] == [0, 2, 3]


def test_scale_without_wait_returns_at_once(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "scale", "3", "--json", "--operation-id", "mine") == 0
    assert json.loads(capsys.readouterr().out)["operation_id"] == "mine"
    assert run(port, "scale", "3", "--json", "--operation-id", "mine", "--wait") == 0
    assert json.loads(capsys.readouterr().out)["phase"] == "done"


def test_a_rolled_back_operation_is_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with elastic_server(FakeCluster(faults={"boot 2": "raise_after"})) as port:
        assert run(port, "scale", "3", "--wait") == 1
    assert "rolled_back" in capsys.readouterr().out


def test_an_operation_that_does_not_end_in_time_is_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with elastic_server(FakeCluster(faults={"boot 2": "hang"})) as port:
        assert run(port, "scale", "3", "--wait", "--timeout", "0.1", "--json") == 1
    assert "still preparing after 0.1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["scale", "9"], "ask for a size from 1 to 4"),
        (["scale", "0"], "positive integer"),
        (["scale", "-1"], "positive integer"),
        (["scale", "--retire", "0"], "rank 0 cannot be retired"),
        (["scale", "--restore", "1"], "rank 1 is not inactive"),
        (["scale", "3", "--operation-id", "a b"], "letters, digits"),
        (["operations", "nobody"], "no operation 'nobody'"),
    ],
)
def test_a_refusal_is_exit_status_2(
    port: int, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(port, *argv) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["scale"],
        ["scale", "4", "--retire", "1"],
        ["scale", "--restore", "1", "--retire", "1"],
        ["scale", "x"],
        ["scale", "--retire", "x"],
        [],
    ],
)
def test_wrong_usage_is_exit_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["status"], ["scale", "2"], ["operations"]])
def test_no_server_is_exit_status_3(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--url", "http://127.0.0.1:9"]) == 3
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:9", "nonsense", "http://", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_exit_status_3(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", url]) == 3
    assert "no server answers" in capsys.readouterr().err


def test_a_server_that_is_not_elastic(capsys: pytest.CaptureFixture[str]) -> None:
    with http_server(FastAPI()) as port:
        assert run(port, "status") == 2
    assert "the server is not elastic. Start it with `elasticmoe serve`" in capsys.readouterr().err


def test_a_server_that_speaks_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    app = FastAPI()
    app.get("/elastic_ep/status")(lambda: {"status": "fine"})
    with http_server(app) as port:
        assert run(port, "status") == 3
    assert "is not that of an elastic server" in capsys.readouterr().err


def test_the_hmm_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    with elastic_server(FakeCluster(hmm_answers=False)) as port:
        assert run(port, "scale", "3") == 2
        assert "Serving goes on" in capsys.readouterr().err
        assert run(port, "status") == 0
        assert "HMM: nobody answers" in capsys.readouterr().out


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    app = FastAPI()

    @app.middleware("http")
    async def check(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.headers.get("authorization") != "Bearer secret":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return await go_on(request)

    mount(app, build_router(FakeCluster().coordinator()))
    with http_server(app) as port:
        assert run(port, "status") == 2
        assert "Pass its key with --admin-key" in capsys.readouterr().err
        assert run(port, "status", "--admin-key", "wrong") == 2
        assert "key is wrong" in capsys.readouterr().err
        assert run(port, "status", "--admin-key", "secret") == 0
        monkeypatch.setenv("ELASTICMOE_ADMIN_KEY", "secret")
        monkeypatch.setenv("ELASTICMOE_URL", f"http://localhost:{port}")
        assert main(["status", "--json"]) == 0


def test_status_json_and_operations(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "scale", "3", "--wait", "--operation-id", "first") == 0
    capsys.readouterr()
    assert run(port, "status", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["membership"], status["topology_generation"], status["safe_to_terminate_ranks"]) == (
        [0, 1, 2],
        1,
        [3],
    )
    assert run(port, "operations", "--json") == 0
    assert [entry["operation_id"] for entry in json.loads(capsys.readouterr().out)["operations"]] == ["first"]
    assert run(port, "operations") == 0
    assert "2 -> 3" in capsys.readouterr().out
    assert run(port, "operations", "first", "--json") == 0
    assert json.loads(capsys.readouterr().out)["phase"] == "done"


def test_watching_prints_a_line_each_time_until_the_server_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    with elastic_server(FakeCluster()) as port:
        watcher = threading.Thread(target=lambda: ended.append(run(port, "status", "--json", "--watch", "0.02")))
        watcher.start()
        time.sleep(0.4)
    watcher.join(10)
    assert ended == [3]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and all(json.loads(line)["epoch"] == 0 for line in lines)


def text_of(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(renderable)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_picture_of_a_placement() -> None:
    text = text_of(draw_placement([0, 0, 1, 11] + [2] * 62))
    assert "001b22" in text and "66 expert columns" in text


def test_the_view_of_a_status(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "scale", "3", "--wait") == 0
    capsys.readouterr()
    assert run(port, "status") == 0
    out = capsys.readouterr().out
    for part in ("EP size 3 of 4 ranks", "epoch 1", "standby", "ipc:///hmm.sock", "column", "dense", "operation "):
        assert part in out, part


def test_views_of_an_empty_server() -> None:
    status = Status(
        ep_size=1, max_ep_size=1, epoch=0, membership=[0], target_ranks=[0], ranks=[], placement=[],
        memory=MemoryStatus(available=False, error="gone"), running=None, last=None,
    )  # fmt: skip
    assert "HMM: gone" in text_of(status_view(status))
    assert "no change so far" in text_of(operations_table([]))


def test_the_bar_only_moves_forward(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "scale", "4", "--wait", "--json") == 0
    done = msgspec.json.decode(capsys.readouterr().out, type=Operation)
    points = [
        completion(msgspec.structs.replace(done, phase=phase, columns_moved=moved))
        for phase, moved in (
            (Phase.PLANNED, 0),
            (Phase.PREPARING, 0),
            (Phase.PREPARING, 3),
            (Phase.COMMITTING, 4),
            (Phase.FINISHING, 4),
            (Phase.DONE, 4),
        )
    ]
    numbers = [point for point in points if point is not None]
    assert numbers == sorted(set(numbers)) and (numbers[0], numbers[-1]) == (0, 100)
    assert completion(msgspec.structs.replace(done, phase=Phase.ROLLED_BACK)) is None
    with OperationProgress(Console(file=io.StringIO())) as progress:
        progress.show(done)


SIZES_1_2 = ["--elasticmoe-ep-size", "1", "--elasticmoe-max-ep-size", "2"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--ep-size", "2", "--max-ep-size", "4"], ["--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4"]),
        (["--max-ep-size=3"], ["--elasticmoe-ep-size", "3", "--elasticmoe-max-ep-size", "3"]),
        (
            ["--model-path", "DIR", "--ep-size=1", "--port", "1", "--elasticmoe-max-ep-size", "2", "--tool", "-1", "x"],
            [*SIZES_1_2, "--model-path", "DIR", "--port", "1", "--tool", "-1", "x"],
        ),
        (
            ["--ep-size", "1", "--max-ep-size", "2", "--device-budget", "2MiB", "--config", "sglang.yaml"],
            [*SIZES_1_2, "--elasticmoe-device-budget", "2097152", "--config", "sglang.yaml"],
        ),
    ],
)
def test_serve_becomes_sglangs_launcher(argv: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        launched.append(words)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(SystemExit):
        main(["serve", *argv])
    assert launched == [[sys.executable, "-m", "sglang.launch_server", *expected]]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model-path", "DIR"], "no size was given"),
        (["--ep-size", "5", "--max-ep-size", "4"], "is larger than"),
        (["--ep-size", "0"], "at least 1"),
        (["--ep-size", "1", "--hmm-endpoint", "x"], "is not an endpoint"),
    ],
)
def test_serve_refuses_before_it_launches(
    argv: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("launched"))
    assert main(["serve", *argv]) == 2
    assert sentence in capsys.readouterr().err


CONFIGS = Path(__file__).parents[2] / "configs"


def test_serve_takes_a_launch_configuration_and_flags_override_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        launched.append(words[3:])
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setattr("os.environ", dict(os.environ))
    path = CONFIGS / "h200" / "qwen3-30b-a3b.json"
    file = load_launch_config(path)
    own = ["--max-ep-size", "5", "--model-path", "OTHER", f"--run-dir={path.parent}"]
    with pytest.raises(SystemExit):
        main(["serve", "--config", str(path), *own])
    [words] = launched
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args, sglang = parser.parse_known_args(words)
    expected = file.elastic.to_dict() | {"max_ep_size": 5, "run_dir": str(path.parent)}
    assert ElasticConfig.from_namespace(args) == ElasticConfig.from_dict(expected)
    assert sglang[:2] == ["--model-path", file.model_path] and sglang[-2:] == ["--model-path", "OTHER"]
    assert set(map(str, file.sglang_flags)) <= set(sglang)
    assert file.environment.items() <= os.environ.items()


def test_serve_refuses_a_configuration_that_this_version_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    file = CONFIGS / "ascend-910b" / "deepseek-v3.json"
    missing = json.loads(file.read_text())["missing"]
    assert missing and main(["serve", "--config", str(file)]) == 2
    assert missing[0] in capsys.readouterr().err
    assert main(["serve", "--config=nowhere.json"]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--ep-size"], ["--ep-size", "two"], ["--device-budget", "lots", "--ep-size", "1"]])
def test_serve_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *argv])
    assert ended.value.code == 2


def test_serve_keeps_the_order_of_sglangs_flags() -> None:
    words = ["--a", "--ep-size", "1", "--b", "c", "--d=e", "--max-ep-size=2", "-f"]
    assert serve.split(["--config", "a.json", "--config=b.yaml", "--config", "c.yaml"]) == (
        ["--config", "a.json"],
        ["--config=b.yaml", "--config", "c.yaml"],
    )
    assert serve.split(words) == (["--ep-size", "1", "--max-ep-size=2"], ["--a", "--b", "c", "--d=e", "-f"])


@pytest.mark.parametrize("command", ["serve", "scale", "status", "operations", "hmm", "tiny-model", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_hmm_reads_its_own_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hmm", "--endpoint", f"ipc://{tmp_path}/h.sock", "--budget", "lots"]) == 2
    assert "lots" in capsys.readouterr().err


def test_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tiny-model", str(tmp_path / "m"), "--layers", "1", "--experts", "2", "--hidden", "64", "--json"]
    assert main(argv) == 0
    made = json.loads(capsys.readouterr().out)
    assert json.loads((Path(made["path"]) / "config.json").read_text())["num_hidden_layers"] == 1
    assert made["bytes"] > 1000
    assert main(["tiny-model", str(tmp_path / "n"), "--hidden", "63"]) == 2
    assert "hidden" in capsys.readouterr().err


def test_client_commands_start_without_torch_and_fastapi() -> None:
    code = (
        "import sys; from elasticmoe_sglang.cli.main import main\n"
        "status = main(['status', '--url', 'http://127.0.0.1:9'])\n"
        "heavy = {'torch', 'fastapi', 'numpy', 'zmq'} & set(sys.modules)\n"
        "sys.exit(f'{status} {heavy}' if heavy or status != 3 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
