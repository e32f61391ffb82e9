"""Columns placed by how many tokens are routed to them, on the real server: tokens stay, ranks get equal shares."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.faults import arm, armed, imbalance, whole
from tests.helpers.load import Load, Pump, settled
from tests.helpers.skewed import Skewed, serve_skewed

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

SKEW = 1.5
"""With it the first half of the experts gets about four fifths of the tokens."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skewed]:
    with serve_skewed(tmp_path_factory.mktemp("skewed"), SKEW) as found:
        yield found


def test_columns_follow_the_tokens(served: Skewed) -> None:
    server = served.server
    before = server.status()
    with Load(server.url) as load:
        with Pump(load, served.start, 6) as pump:
            settled(lambda: len(pump.streams) > 6, 60, "requests have ended")
            planned = served.rebalance(dry_run=True)
            assert planned["operation"] is None and server.status()["placement"] == before["placement"]
            assert planned["imbalance"] > 1.3 and planned["columns"] > 0, planned

            done = served.rebalance()
            operation = done["operation"]
            assert operation["phase"] == "done", operation
            assert operation["columns_moved"] == done["columns"] and operation["bytes_moved"] > 0
            assert operation["ranks_after"] == operation["ranks_before"] == before["membership"]
            assert done["expected_imbalance"] < 1.1 < done["imbalance"], done

            after = server.status()
            assert after["epoch"] == before["epoch"] + 1 and after["placement"] != before["placement"]
            assert sorted(after["placement"]) == sorted(before["placement"]), "as many columns as before on each rank"
            seen = served.rebalance(dry_run=True)
            found = [done["imbalance"], seen["imbalance"], done["expected_imbalance"]]
            print("imbalance before, after and expected:", [round(each, 2) for each in found])
            assert seen["imbalance"] < 1 + (done["imbalance"] - 1) / 2, "what was expected has come true"
        load.wait(pump.streams)
    served.check(pump.streams)
    assert imbalance(server.status()) is None, imbalance(server.status())


def test_sizes_change_afterwards(served: Skewed) -> None:
    with Load(served.server.url) as load:
        with Pump(load, served.start, 6) as pump:
            for size in (3, 1, 2):
                served.server.must_scale(size)
        load.wait(pump.streams)
    served.check(pump.streams)
    assert imbalance(served.server.status()) is None, imbalance(served.server.status())


def test_a_rank_dies_while_it_pulls(served: Skewed) -> None:
    server = served.server
    epoch = server.status()["epoch"]
    with Load(server.url) as load:
        with Pump(load, served.start, 6) as pump:
            settled(lambda: len(pump.streams) > 6, 60, "requests have ended")
            arm(served.run_dir, "pull.started", 1, "self")
            ended = served.rebalance()["operation"]
            assert not armed(served.run_dir)
            # Whichever is known first: the worker's end, or that the others miss it in a collective.
            assert ended["phase"] == "rolled_back" and ended["error"].endswith("meanwhile"), ended
            settled(lambda: whole(server), 90, "the server is whole")
        load.wait(pump.streams)
    served.check(pump.streams)
    assert server.status()["epoch"] > epoch
    assert imbalance(server.status()) is None, imbalance(server.status())


def test_the_command(served: Skewed) -> None:
    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "rebalance", *words]
        return subprocess.run([*command, "--url", served.server.url], capture_output=True, text=True, timeout=60)

    idle = cli("--observe", "0.2")
    assert idle.returncode == 2 and "too few to tell" in idle.stderr and "Traceback" not in idle.stderr
    with Load(served.server.url) as load:
        with Pump(load, served.start, 6) as pump:
            settled(lambda: len(pump.streams) > 6, 60, "requests have ended")
            shown = cli("--observe", "4", "--dry-run")
            assert shown.returncode == 0 and "routed tokens seen" in shown.stdout and "a dry run" in shown.stdout
            done = cli("--observe", "4", "--least-gain", "0", "--wait", "--json")
            assert done.returncode == 0, done.stderr
            answer = json.loads(done.stdout)
            assert answer["operation"] is None or answer["operation"]["phase"] == "done"
        load.wait(pump.streams)
    served.check(pump.streams)
