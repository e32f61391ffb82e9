"""An HMM that gets no descriptor or no memory: a typed error for who asked, and nothing else."""

from __future__ import annotations

import contextlib
import resource
import threading
import time

import psutil
import pytest

from elasticmoe_sglang.descriptors import RESERVE
from elasticmoe_sglang.errors import HmmError, HmmUnavailable, VmmError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess
from tests.helpers.hmm_clients import MODEL, PAGE
from tests.helpers.limits import address_space, descriptors, limited

pytestmark = pytest.mark.usefixtures("gives_all_back")


def test_without_a_descriptor_nothing_is_allocated_and_nobody_is_let_in(hmm: HmmProcess, client: HmmClient) -> None:
    client.register_model(MODEL)
    client.allocate(0, "column", columns=[1])
    before = client.status().devices[0].used
    with limited(hmm.pid, resource.RLIMIT_NOFILE, descriptors(hmm.pid)):
        with pytest.raises((HmmError, VmmError), match="Too many open files"):
            client.allocate(0, "column", columns=[2])
        used = psutil.Process(hmm.pid).cpu_times().user
        with pytest.raises(HmmUnavailable), HmmClient(hmm.endpoint, name="late", timeout_s=1.0) as late:
            late.connect()
        assert psutil.Process(hmm.pid).cpu_times().user - used < 0.5, "it asks all the time"
        assert client.status().devices[0].used == before
        waits = HmmClient(hmm.endpoint, name="waits", timeout_s=20.0)
        thread = threading.Thread(target=waits.connect)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
    thread.join(20)
    assert waits.attached_to() is not None
    waits.close()
    assert client.allocate(0, "column", columns=[2])


def test_descriptors_are_kept_for_further_command_sockets(hmm: HmmProcess, client: HmmClient) -> None:
    """Clients connect further ones through ZMQ, which ends a process that has no descriptor for them."""
    client.register_model(MODEL)
    columns = iter(range(MODEL.num_columns))
    with limited(hmm.pid, resource.RLIMIT_NOFILE, descriptors(hmm.pid) + RESERVE + 4):
        with pytest.raises(HmmError, match="more descriptors, and 1 are needed"):
            for column in columns:
                client.allocate(0, "column", columns=[column], nbytes=PAGE)
        threads = [threading.Thread(target=client.status) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert client.status().counters.internal_errors == 0 and hmm.alive()
    assert client.allocate(0, "column", columns=[next(columns)], nbytes=PAGE)


def test_without_memory_of_its_own_it_answers_with_an_error(hmm: HmmProcess, client: HmmClient) -> None:
    client.register_model(MODEL)
    with limited(hmm.pid, resource.RLIMIT_AS, address_space(hmm.pid)):
        with contextlib.suppress(HmmError, VmmError):
            client.allocate(0, "column", columns=list(range(8)))
        assert client.status().pid == hmm.pid
    client.release([block.block_id for block in client.lookup()])
    assert [block.nbytes for block in client.allocate(0, "column", columns=[3])] == [3 * PAGE]
