"""A program around an elastic `sgl.Engine`, for tests/e2e/test_sgl_engine.py: it prints what it sees as a line of JSON.

python -m tests.helpers.engine_program MODEL
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

PROMPT = [5, 6, 7, 8]
TOKENS = 16
SAMPLING = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def ids(engine: Any) -> list[int]:
    answer = engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)
    return list(answer["output_ids"])


def blocking(engine: Any) -> dict[str, Any]:
    """A program without an event loop: every method blocks."""
    from elasticmoe_sglang.errors import RoutingUnknown, StaleRequest, UserInputError

    seen: dict[str, Any] = {"state": engine.get_elastic_ep_state(), "tokens": [ids(engine)], "refused": []}
    for request in ({"new_ep_size": 4}, {"retire_ranks": [2]}, {"restore_ranks": [2]}):
        operation = engine.scale_elastic_ep(**request)
        seen.setdefault("operations", []).append(operation)
        seen["tokens"].append(ids(engine))
    for wrong in ({"new_ep_size": 5}, {"new_ep_size": True}, {"size": 2}, {"new_ep_size": 2, "expected_generation": 0}):
        try:
            engine.scale_elastic_ep(**wrong)
        except (UserInputError, StaleRequest) as error:
            seen["refused"].append(f"{type(error).__name__}: {error}")
    try:
        engine.rebalance_elastic_ep(observe_s=0.1)
    except RoutingUnknown as error:
        seen["idle"] = str(error)
    seen["listed"] = [operation["operation_id"] for operation in engine.get_elastic_ep_operations()]
    seen["shown"] = engine.get_elastic_ep_operation(seen["listed"][0])["operation_id"]
    seen["status"] = engine.get_elastic_ep_status()
    return seen


async def as_dynamo(engine: Any) -> dict[str, Any]:
    """What NVIDIA Dynamo's SGLang worker does: it has an event loop and calls the tokenizer manager."""
    from sglang.srt.managers.io_struct import ScaleElasticEPReqInput

    manager = engine.tokenizer_manager
    seen: dict[str, Any] = {"backend": manager.server_args.elastic_ep_backend, "answers": []}
    for size in (2, 3, 9):
        answer = await manager.scale_elastic_ep(ScaleElasticEPReqInput(new_ep_size=size))
        names = ("success", "message", "old_ep_size", "new_ep_size", "pending_ep_size", "scale_phase")
        seen["answers"].append({name: getattr(answer, name) for name in names})
        if size == 2:
            seen["state while scaling"] = manager.get_elastic_ep_state()
    deadline = time.monotonic() + 120
    while (state := manager.get_elastic_ep_state())["is_scaling_elastic_ep"] and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    seen["state"] = state
    seen["operation"] = await engine.async_scale_elastic_ep(new_ep_size=1, wait=True)
    many = [engine.async_generate(input_ids=PROMPT, sampling_params=SAMPLING) for _ in range(96)]
    *answers, placed = await asyncio.gather(*many, engine.async_rebalance_elastic_ep(observe_s=4.0, dry_run=True))
    seen["placed"] = {"tokens": [list(answer["output_ids"]) for answer in answers], **placed}
    seen["membership"] = (await engine.async_get_elastic_ep_status())["membership"]
    answer = await engine.async_generate(input_ids=PROMPT, sampling_params=SAMPLING)
    seen["tokens"] = list(answer["output_ids"])
    return seen


def main() -> None:
    import sglang

    from elasticmoe_sglang.errors import UserInputError

    settings: dict[str, Any] = {
        "model_path": sys.argv[1],
        "device": "cpu",
        "max_total_tokens": 8192,
        "elasticmoe_ep_size": 2,
        "elasticmoe_max_ep_size": 4,
        "elasticmoe_window_bytes": "4MiB",
    }
    with sglang.Engine(**settings) as engine:
        seen = {"blocking": blocking(engine), "dynamo": engine.loop.run_until_complete(as_dynamo(engine))}
        try:
            sglang.Engine(**settings)
        except UserInputError as error:
            seen["second"] = str(error)
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
