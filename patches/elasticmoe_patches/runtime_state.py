"""SGLang's endpoints that set state of a running server, and what becomes of that state when ranks join.

A rank that joins or replaces another boots from the launch arguments: it knows nothing of what ranks were told since.
So what is set at run time is either sent to all ranks again after a change (`REPLAYED`), or cannot matter to another
rank (`KEPT`), or the endpoint is refused with a sentence (`REFUSED`), over HTTP and in the process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elasticmoe_sglang.errors import UnsupportedFeature, refused_sentence


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What sets one piece of state.

    Attributes:
        routes: (path, HTTP methods).
        calls: methods of SGLang's TokenizerManager.
        why: a refused one's reason and what to do; otherwise why no other rank needs the state.
    """

    routes: tuple[tuple[str, tuple[str, ...]], ...]
    calls: tuple[str, ...]
    why: str


def _endpoint(why: str, *names: str, calls: tuple[str, ...] | None = None) -> Endpoint:
    both = ("GET", "POST")
    return Endpoint(
        routes=tuple((f"/{name}", both) for name in names), calls=names if calls is None else calls, why=why
    )


REFUSED: tuple[Endpoint, ...] = (
    _endpoint(
        "the weights lie in the HMM's memory, in columns that each rank has some of, and ranks that join take them "
        "from there. Restart the server with the new checkpoint; an HMM of your own (--hmm-endpoint) too",
        "update_weights_from_disk",
        "update_weights_from_tensor",
        "update_weights_from_distributed",
        "update_weights_from_ipc",
        "begin_weight_update",
        "end_weight_update",
        "init_weights_update_group",
        "destroy_weights_update_group",
        "update_weight_version",
    ),
    _endpoint(
        "it needs a communicator of all ranks, and no rank has all experts. Copy the checkpoint",
        "init_weights_send_group_for_remote_instance",
        "send_weights_to_remote_instance",
    ),
    _endpoint(
        "it reads and overwrites weights by name, and no rank has all experts. Compare the checkpoints",
        "weights_checker",
        "get_weights_by_name",
        calls=("check_weights", "get_weights_by_name"),
    ),
    _endpoint(
        "the memory is the HMM's, and KV caches and columns are mapped in it. Scale down instead (elasticmoe scale)",
        "release_memory_occupation",
        "resume_memory_occupation",
    ),
    _endpoint(
        "ranks that join would not pause, and ranks that pause would not meet them. Stop sending requests, or abort "
        "them with /abort_request",
        "pause_generation",
        "continue_generation",
    ),
    Endpoint(
        routes=(("/set_internal_state", ("POST", "PUT")),),
        calls=("set_internal_state",),
        why="ranks that join would not know of it. Give the setting at launch",
    ),
    _endpoint("ranks that join would not be slowed down. Limit --max-running-requests at launch", "slow_down"),
    _endpoint(
        "the ranks that profile wait for each other at its end, and ranks that join do not come. Profile a worker's "
        "process from outside (py-spy, perf, nsys); elasticmoe status shows the pids",
        "start_profile",
        "stop_profile",
    ),
    _endpoint(
        "it takes an equal run of experts for each rank's. elasticmoe status --json shows the placement",
        "start_expert_distribution_record",
        "stop_expert_distribution_record",
        "dump_expert_distribution_record",
    ),
    _endpoint(
        "LoRA adapters are not carried to ranks that join. Merge the adapter into the checkpoint",
        "load_lora_adapter",
        "load_lora_adapter_from_tensors",
        "unload_lora_adapter",
    ),
    _endpoint(
        "a session's state lies on one rank. Send the whole prompt; its prefix is cached",
        "open_session",
        "close_session",
    ),
    Endpoint(
        routes=(
            ("/hicache/storage-backend", ("PUT", "DELETE")),
            ("/hicache/storage-backend/clear", ("POST",)),
        ),
        calls=("attach_hicache_storage", "detach_hicache_storage", "clear_hicache_storage"),
        why="the hierarchical cache is not supported",
    ),
    _endpoint(
        "it is for speculative decoding, which is not supported",
        "add_external_corpus",
        "remove_external_corpus",
    ),
    _endpoint("prefill/decode disaggregation pins requests to ranks", "pd_role_switch"),
    _endpoint(
        "ranks that join would not know of it. Set SGLang's dumper by its environment variables at launch",
        "dumper/{method}",
        calls=("dumper_control",),
    ),
)

REPLAYED: tuple[Endpoint, ...] = (
    _endpoint(
        "the log level is sent to all ranks again after each change; the rest is the main process's",
        "configure_logging",
    ),
)

KEPT: tuple[Endpoint, ...] = (
    _endpoint("a rank that joins has an empty cache", "flush_cache"),
    _endpoint("it saves time alone, and a rank that joins has little to freeze", "freeze_gc"),
    _endpoint("it is the main process's", "set_trace_level", calls=()),
    _endpoint("an abort also reaches requests on their way between two ranks", "abort_request"),
)

_REPLAY = "elasticmoe_replay"


def refuse_calls(tokenizer_manager: Any) -> None:
    """Let the refused methods of a TokenizerManager raise UnsupportedFeature, also for callers in its process."""
    for endpoint in REFUSED:
        for name in endpoint.calls:
            getattr(tokenizer_manager, name)  # one that SGLang renames must not come back unrefused
            setattr(tokenizer_manager, name, _refusing(name, endpoint.why))


def _refusing(name: str, why: str) -> Callable[..., Any]:
    async def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedFeature(refused_sentence(name, why))

    return refuse


def refused_routes() -> list[tuple[str, tuple[str, ...], str]]:
    """(path, HTTP methods, why) of each route that is refused."""
    return [(path, methods, endpoint.why) for endpoint in REFUSED for path, methods in endpoint.routes]


def remember_log_level(tokenizer_manager: Any) -> None:
    """Keep the last log level that /configure_logging sets, for `replay`."""
    configure = tokenizer_manager.configure_logging

    def configure_and_remember(obj: Any) -> None:
        configure(obj)  # raises for a level that does not exist
        if obj.log_level is not None:
            setattr(tokenizer_manager, _REPLAY, copy.copy(obj))

    tokenizer_manager.configure_logging = configure_and_remember


def replay(tokenizer_manager: Any) -> None:
    """Tell all active ranks again what they may not know. To be called when the members of an epoch are known."""
    message = getattr(tokenizer_manager, _REPLAY, None)
    if message is not None:
        tokenizer_manager._dispatch_to_scheduler(message)
