"""First uses of kernels are told apart from what was loaded before.

Triton's hooks are called here as Triton calls them; `tests/gpu/test_cuda_loads.py` loads real kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from triton import knobs

from elasticmoe_kernels.triton.loads import KernelLoads


@pytest.fixture
def loads() -> Iterator[KernelLoads]:
    made = KernelLoads()
    yield made
    made.close()


class Function:
    def __init__(self, name: str) -> None:
        self.name = name


def compiled(name: str) -> None:
    described = {
        "signature": {"out": "*i32", "count": "i32", "sources": ("*i32", "*i32"), "BLOCK": "constexpr"},
        "constants": {(3,): 128},
        "configs": [{(0,): [["tt.divisibility", 16]], (1,): [], (2, 1): [["tt.divisibility", 16]]}],
        "num_warps": 4,
    }
    knobs.runtime.jit_post_compile_hook(key="", repr="", fn=Function(name), compile=described)


def loaded(name: str) -> None:
    knobs.runtime.kernel_load_end_hook(None, None, name, {}, "hash")


def test_only_what_comes_after_the_warm_up_is_reported(loads: KernelLoads) -> None:
    compiled("scatter")
    loaded("scatter")
    told: list[str] = []
    loads.report(told.append)
    assert loads.before == ["scatter[warps=4, BLOCK=128, aligned: out sources.1]"] and not told
    compiled("gather")
    loaded("gather")
    assert told == ["gather[warps=4, BLOCK=128, aligned: out sources.1]"] and len(loads.before) == 1


def test_a_kernel_that_was_compiled_earlier_has_its_name_only(loads: KernelLoads) -> None:
    told: list[str] = []
    loads.report(told.append)
    compiled("gather")
    loaded("scatter")
    loaded("scatter")
    assert told == ["scatter", "scatter"]


def test_nothing_is_left_behind() -> None:
    before = knobs.runtime.jit_post_compile_hook, list(knobs.runtime.kernel_load_end_hook.calls)
    KernelLoads().close()
    assert (knobs.runtime.jit_post_compile_hook, knobs.runtime.kernel_load_end_hook.calls) == before
