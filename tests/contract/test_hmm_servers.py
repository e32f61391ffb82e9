"""An HMM serves one server at a time: a second one would release the first one's region and KV."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from elasticmoe_sglang.errors import HmmTaken
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from tests.helpers.hmm_clients import BUDGETS, MIB, Other, eventually

pytestmark = pytest.mark.usefixtures("gives_all_back")

CLAIM = "client.close(); client = HmmClient(client.endpoint, name='coordinator', server=True); client.connect()\n"


def test_a_second_server_is_refused_while_the_first_lives(hmm: HmmProcess) -> None:
    with Other(hmm.endpoint, CLAIM + "tell('serves'); wait()") as other:
        assert other.says() == "serves"
        with (
            HmmClient(hmm.endpoint, name="coordinator", server=True) as second,
            pytest.raises(
                HmmTaken, match=f"serves another server, whose main process is {other.process.pid}"
            ) as refused,
        ):
            second.connect(wait_s=0.3)
        assert refused.value.hint is not None and "elasticmoe hmm" in refused.value.hint
        with HmmClient(hmm.endpoint, name="test") as anybody:  # a worker, an operator
            assert [client.name for client in anybody.status().clients] == ["coordinator", "test"]
        os.kill(other.process.pid, signal.SIGKILL)
        with HmmClient(hmm.endpoint, name="coordinator", server=True) as third:
            third.connect(wait_s=10)


def test_the_next_server_waits_for_the_end_of_the_one_before(hmm: HmmProcess) -> None:
    first = HmmClient(hmm.endpoint, name="coordinator", server=True)
    first.connect()
    ends = threading.Timer(0.5, first.close)
    ends.start()
    started = time.monotonic()
    with HmmClient(hmm.endpoint, name="coordinator", server=True) as second:
        second.connect(wait_s=10)
    assert 0.4 < time.monotonic() - started < 9
    ends.join()


def test_another_hmm_is_the_servers_that_comes_first(hmm: HmmProcess, tmp_path) -> None:
    """A server that attaches again claims its place again."""
    endpoint = f"ipc://{tmp_path}/other/hmm.sock"
    with HmmClient(endpoint, name="coordinator", server=True) as first:
        with spawn_hmm(endpoint, BUDGETS):
            first.region("collective-region-1", MIB).close()
        eventually(lambda: first.attached_to() is None)
        with spawn_hmm(endpoint, BUDGETS), HmmClient(endpoint, name="coordinator", server=True) as second:
            second.connect()
            with pytest.raises(HmmTaken):
                first.offer()
            second.close()
            first.connect(wait_s=5)
            with pytest.raises(HmmTaken):
                second.connect()
