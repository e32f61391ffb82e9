"""What a standby imports ahead: the radix cache's core that SGLang will use, and no other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from elasticmoe_patches.worker import preload

pytestmark = pytest.mark.process


BACKEND = "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"


@pytest.mark.parametrize("core", ["python", "rust"])
def test_the_core_is_the_one_that_sglang_selects(monkeypatch: pytest.MonkeyPatch, core: str) -> None:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_cache import tree_core_registry

    monkeypatch.setattr(tree_core_registry, "_rust_fallback_reason", lambda params: None)
    monkeypatch.setenv(BACKEND, core)
    params = CacheInitParams(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=None, page_size=4)
    assert preload.tree_core() == tree_core_registry.select_tree_core_backend(params) == core


def test_the_core_is_pythons_where_sglang_falls_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.unified_cache import tree_core_registry

    monkeypatch.setattr(tree_core_registry, "_rust_fallback_reason", lambda params: "there is no library")
    monkeypatch.setenv(BACKEND, "rust")
    assert preload.tree_core() == "python"


CODE = """
import sys
from elasticmoe_patches.worker import preload
from sglang.srt.mem_cache.unified_cache import tree_core_registry
preload.install_for_process = lambda process: ()
tree_core_registry._rust_fallback_reason = lambda params: None
sys.modules["sglang.srt.mem_cache.rust_tree_core.extension"] = None  # its import fails: no library
preload.preload()
assert "sglang.srt.managers.scheduler" in sys.modules
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("core", "loads"), [("python", True), ("rust", False)])
def test_a_library_that_does_not_load_ends_nobody_who_does_not_need_it(core: str, loads: bool) -> None:
    environment = {**os.environ, BACKEND: core}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=110, env=environment)
    assert (done.returncode == 0) is loads, done.stderr
    if not loads:
        assert "rust_tree_core.extension" in done.stderr.splitlines()[-1]
