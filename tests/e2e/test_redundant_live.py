"""Copies of busy expert columns on the real server: ranks take turns with rows, and tokens stay, in every fault."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.browser import browser
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import arm, armed, imbalance, whole
from tests.helpers.footprint import named
from tests.helpers.load import Load, Pump, Stream, settled
from tests.helpers.skewed import Skewed, serve_skewed

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

STREAMS = 12
SKEW = 10.0
"""With it a quarter of the experts gets nearly all tokens: more than a rank's share, which moving cannot divide."""
COPIES = 6
RANKS = 3
WHOLE_WITHIN_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Served(Skewed):
    def rebalance(self, **body: Any) -> dict[str, Any]:  # type: ignore[override]
        """Observed for as long as it takes on a busy machine."""
        return super().rebalance(observe_s=(4.0, 12.0, 40.0), **body)

    @contextlib.contextmanager
    def under_load(self) -> Iterator[list[Stream]]:
        """Streams decode within; afterwards the server is whole, and every token is that of a server never changed."""
        with Load(self.server.url) as load:
            with Pump(load, self.start, STREAMS) as pump:
                settled(lambda: len(pump.streams) > STREAMS, 60, "requests have ended")
                yield pump.streams
                settled(lambda: whole(self.server), WHOLE_WITHIN_S, "the server is whole")
            load.wait(pump.streams)
        self.check(pump.streams)
        assert imbalance(self.server.status()) is None, imbalance(self.server.status())

    def copied(self) -> dict[int, set[int]]:
        """Column -> its holders, of columns with copies; made first if there are none on three ranks."""
        status = self.server.status()
        if status["ep_size"] != RANKS:
            self.server.must_scale(RANKS)
        if not self.server.status()["copies"]:
            assert self.rebalance(least_gain=0.0)["operation"]["phase"] == "done"
        status = self.server.status()
        assert status["copies"], status["placement"]
        return {int(c): {status["placement"][int(c)], *ranks} for c, ranks in status["copies"].items()}

    def holders(self, column: int) -> set[int]:
        status = self.server.status()
        return {status["placement"][column], *status["copies"].get(str(column), ())}


@contextlib.contextmanager
def serve(folder: Path, *args: str, ep_size: int = RANKS, capacity: int = 4) -> Iterator[Served]:
    """A server with answers from before any change."""
    with serve_skewed(folder, SKEW, *args, ep_size=ep_size, capacity=capacity) as found:
        yield Served(**vars(found))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # SGLang's own flag means the same.
    with serve(tmp_path_factory.mktemp("redundant"), "--ep-num-redundant-experts", str(COPIES)) as found:
        yield found


def imm_pid(server: ElasticServer) -> int | None:
    """None while there is none."""
    for process in psutil.Process(server.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "imm" in named([process]).values():
                return process.pid
    return None


def test_the_page_draws_copies_and_takes_them_away(served: Served) -> None:
    server = served.server

    def held() -> dict[int, list[int]]:
        status = server.status()
        ranks = range(status["max_ep_size"])
        owned = {rank: [c for c, owner in enumerate(status["placement"]) if owner == rank] for rank in ranks}
        return {
            rank: owned[rank] + sorted(int(c) for c, at in status["copies"].items() if rank in at) for rank in ranks
        }

    with served.under_load(), browser() as page:
        served.copied()
        page.open(server.url)
        page.wait_live()
        page.wait(lambda: page.placement() == held(), "copies are drawn behind the columns that a rank owns")
        labels = page.js("return [...document.querySelectorAll('.cells')].map(cells => cells.ariaLabel)")
        assert any("and copies of" in label for label in labels), labels
        served.rebalance(copies=0, least_gain=0.0)
        page.wait(lambda: page.placement() == held(), "no copies are drawn")
        assert page.js("return document.querySelectorAll('.cell.copy').length") == 0
        assert not page.complaints(), page.complaints()


def test_sizes_change_with_copies(served: Served) -> None:
    with served.under_load():
        held = served.copied()
        for size in (4, 2, 3):
            served.server.must_scale(size)
            staying = {column: ranks & set(range(size)) for column, ranks in held.items()}
            for column, ranks in staying.items():
                assert len(served.holders(column)) >= min(1, len(ranks))
            # Copies on ranks that stay are kept, except those that have become their columns' owners.
            status = served.server.status()
            assert all(rank < size for ranks in status["copies"].values() for rank in ranks), status["copies"]
            assert imbalance(status) is None, imbalance(status)
            held = {column: served.holders(column) for column in held}


def test_a_rank_dies_and_who_has_a_copy_owns(served: Served) -> None:
    server = served.server
    with served.under_load():
        held = served.copied()
        victim = max((rank for ranks in held.values() for rank in ranks if rank), key=lambda rank: sum(
            rank in ranks for ranks in held.values()
        ))  # fmt: skip
        before = server.status()
        os.kill(server.worker_pids()[victim], signal.SIGKILL)
        settled(lambda: server.status()["epoch"] > before["epoch"], WHOLE_WITHIN_S, "survivors serve")
        loss = next(op for op in server.operations() if op["cause"] == "loss")
        assert loss["lost"] == [victim] and loss["phase"] in ("done", "finishing"), loss
        survived = {column for column, ranks in held.items() if ranks - {victim}}
        pulled = {move["column"] for move in loss["moves"]}
        assert not pulled & survived, "a column that a survivor holds is not copied"
        assert len(pulled) == before["placement"].count(victim) - len(
            [column for column in survived if before["placement"][column] == victim]
        )


def test_rank_0_dies_and_is_replaced_with_its_copies(served: Served) -> None:
    server = served.server
    with served.under_load():
        served.copied()
        before = server.status()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        settled(lambda: server.status()["epoch"] > before["epoch"] and whole(server), WHOLE_WITHIN_S, "it is replaced")
        after = server.status()
        assert [after["placement"], after["copies"]] == [before["placement"], before["copies"]]


def test_copies_are_rolled_back_when_a_rank_dies_while_it_pulls(served: Served) -> None:
    server = served.server
    with served.under_load():
        served.copied()
        served.rebalance(copies=0, least_gain=0.0)
        before = server.status()
        assert before["copies"] == {}
        planned = served.rebalance(dry_run=True, least_gain=0.0)
        assert planned["expected_copies"] > 0, planned
        arm(served.run_dir, "pull.started", 1, "self")
        ended = served.rebalance(least_gain=0.0)["operation"]
        assert not armed(served.run_dir)
        assert ended["phase"] == "rolled_back" and ended["error"].endswith("meanwhile"), ended
        settled(lambda: whole(server), WHOLE_WITHIN_S, "the server is whole")
        assert server.status()["copies"] == {} and server.status()["epoch"] > before["epoch"]


def test_the_hmm_dies_and_ranks_offer_the_same_columns(served: Served) -> None:
    server = served.server
    with served.under_load():
        held = served.copied()
        pid = server.status()["memory"]["pid"]
        os.kill(pid, signal.SIGKILL)
        settled(lambda: server.status()["memory"]["pid"] not in (None, pid), 60, "another HMM serves")
        settled(lambda: whole(server), WHOLE_WITHIN_S, "the server is whole")
        assert {column: served.holders(column) for column in held} == held
        assert imbalance(server.status()) is None, "every copy is in the ledger, once"
        server.must_scale(2)
        assert imbalance(server.status()) is None


def test_the_imm_dies(served: Served) -> None:
    server = served.server
    with served.under_load():
        held = served.copied()
        pid = imm_pid(server)
        os.kill(pid, signal.SIGKILL)
        settled(lambda: imm_pid(server) not in (None, pid), 60, "another IMM starts")
        settled(lambda: whole(server), WHOLE_WITHIN_S, "the server is whole")
        assert {column: served.holders(column) for column in held} == held
        server.must_scale(4)


def test_the_command_and_what_is_refused(served: Served) -> None:
    server = served.server

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", *words]
        return subprocess.run([*command, "--url", server.url], capture_output=True, text=True, timeout=60)

    refused = cli("rebalance", "--copies", str(COPIES + 1))
    assert refused.returncode == 2 and f"copies must be at most {COPIES} on this server" in refused.stderr
    with served.under_load():
        held = served.copied()
        shown = cli("status").stdout
        assert all(f"column {column}: also on rank" in shown for column in held), shown
        dropped = cli("rebalance", "--observe", "12", "--copies", "0", "--wait", "--json")
        assert dropped.returncode == 0, dropped.stderr
        answer = json.loads(dropped.stdout)
        assert answer["copies"] > 0 == answer["expected_copies"] and answer["operation"]["phase"] == "done"
        assert server.status()["copies"] == {}


def test_ranks_of_one_device_share_the_memory_of_copies(tmp_path: Path) -> None:
    """Two ranks of a device that get the same column copy it once, and it stays there while either holds it."""
    flags = (
        "--elasticmoe-redundant-experts",
        "8",
        "--elasticmoe-ranks-per-device",
        "2",
        "--elasticmoe-hot-standbys",
        "1",
    )
    with serve(tmp_path, *flags) as served:
        server = served.server
        with served.under_load():
            done = served.rebalance(least_gain=0.0)
            assert done["operation"]["phase"] == "done" and done["expected_copies"] > 0, done
            status = server.status()
            devices = {rank["rank"]: rank["device"] for rank in status["ranks"]}
            holders = [served.holders(column) for column in range(len(status["placement"]))]
            together = [ranks for ranks in holders if len({devices[rank] for rank in ranks}) < len(ranks)]
            print("columns that ranks of one device share:", together)
            assert together and imbalance(status) is None, imbalance(status)
            for size in (4, 2, 3):
                server.must_scale(size)
                assert imbalance(server.status()) is None, imbalance(server.status())
            pid = server.status()["memory"]["pid"]
            os.kill(pid, signal.SIGKILL)
            settled(lambda: server.status()["memory"]["pid"] not in (None, pid), 60, "another HMM serves")
            settled(lambda: whole(server), WHOLE_WITHIN_S, "the server is whole")
            served.rebalance(copies=0, least_gain=0.0)
            assert imbalance(server.status()) is None, imbalance(server.status())


@pytest.mark.soak
def test_copies_with_attention_replicas_of_two_ranks(tmp_path: Path) -> None:
    """A copy outlives its owner's replica, which is lost with one of its ranks and comes back."""
    own = (
        "--elasticmoe-attention-tp",
        "2",
        "--elasticmoe-standbys",
        "2",
        "--elasticmoe-redundant-experts",
        str(COPIES),
    )
    with serve(tmp_path, *own, ep_size=6, capacity=6) as served:
        server = served.server
        with served.under_load():
            assert served.rebalance(least_gain=0.0)["operation"]["phase"] == "done"
            assert server.status()["copies"]
        for rank in (3, 0):
            pid = server.worker_pids()[rank]
            with served.under_load():
                os.kill(pid, signal.SIGKILL)
                settled(lambda: server.status()["ep_size"] == 6, WHOLE_WITHIN_S, "all replicas are back")
            lost = [set(operation["lost"]) for operation in server.operations() if operation["cause"] == "loss"]
            assert {rank, rank ^ 1} in lost
