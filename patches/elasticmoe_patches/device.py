"""The server's devices: the HMM's memory backend, memory, whether ranks can share a device, and cores on the CPU."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elasticmoe_sglang import cpu_bind
from elasticmoe_sglang.config import AUTO, ElasticConfig, flag
from elasticmoe_sglang.errors import HmmTaken, UserInputError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm import acl_probe

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SERVER_ENDS_S = 10.0
"""A server that is started in the place of one that is ending waits so long for the HMM."""
_LEFT_FREE = 10 << 30
_STATIC_SHARE = 0.88  # about what SGLang takes for itself on a large GPU
_OF_A_PROCESS_GIB = 2  # context, libraries' workspaces, graphs: 1.7 to 1.8 GiB of a rank on an H100
_FP8_SINCE = (8, 9)
_MPS_CONTROL = "nvidia-cuda-mps-control"
_MPS_FOLDERS = ("/usr/bin", "/usr/local/nvidia/bin")
_START_MPS = (
    f"Start it: `export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps; mkdir -p /tmp/mps; "
    f"{_MPS_CONTROL} -d`, and start the server with the same variables; `echo quit | {_MPS_CONTROL}` ends it"
)


def on_cuda() -> bool:
    """Whether SGLang computes on NVIDIA GPUs. Asks NVML: creates no context."""
    import torch

    return torch.version.cuda is not None and torch.cuda.device_count() > 0


def on_npu() -> bool:
    """Whether SGLang computes on Ascend NPUs: torch_npu is loaded and sees one, and there is no NVIDIA GPU. Creates no
    context."""
    return _npu_count() > 0 and not on_cuda()


def _npu_count() -> int:
    import torch

    npu = getattr(torch, "npu", None)  # there once torch_npu is loaded
    return 0 if npu is None else int(npu.device_count())


def memory_backend() -> str:
    """The name of the HMM's memory backend."""
    if on_cuda():
        return "cuda"
    return "npu" if on_npu() else "cpu"


def survives_fork(backend: str) -> bool:
    """Whether a process that has imported SGLang can be forked: elsewhere imports initialise CUDA or ACL, and neither
    survives that."""
    return backend == "cpu"


def torch_device(kind: str, number: int) -> torch.device:
    """Where a rank's tensors are: `kind` with the number of its device, but on the CPU, which has none.

    With "npu" alone SGLang takes a parameter on npu:1 for one on another device: after loading it copies it there and
    back, slots without memory included.
    """
    import torch

    return torch.device(kind) if kind == "cpu" else torch.device(kind, number)


def budgets(config: ElasticConfig) -> list[int]:
    """Bytes of each device for the HMM: what was asked for, else all that the device has. On the CPU a device is an
    equal share of the machine's memory."""
    devices = range(config.num_devices)
    if config.device_budget:
        return [config.device_budget for _ in devices]
    if on_cuda():
        import torch

        return [torch.cuda.get_device_properties(device).total_memory for device in devices]
    if on_npu():
        return list(acl_probe.total_memory()[: config.num_devices])
    import psutil

    return [psutil.virtual_memory().total // config.num_devices for _ in devices]


def static_fraction(memory: int) -> float:
    """SGLang's --mem-fraction-static for an NPU of so many bytes: what weights and KV may take of it.

    10 GiB are left for activations and columns of experts that arrive later, half of a device smaller than 20 GiB.
    SGLang's own rule takes gigabytes from a small device for the prefill alone, and arrives at a negative fraction.
    """
    return round(1 - min(_LEFT_FREE, memory // 2) / memory, 3)


def check_device_flag(device: str | None) -> None:
    """Looks at SGLang's --device, None where it was not given.

    Raises:
        UserInputError: it names NPUs where there are none that torch can use, with the reason, or another kind of
            device than the memory of this server will be on.
    """
    kind = (device or "").partition(":")[0]
    acl_probe.visible_devices()
    if kind == "npu" and not on_npu():
        raise UserInputError(f"--device npu, and {_why_no_npu()}", hint="`elasticmoe doctor` names what is missing")
    found = memory_backend()
    if kind in ("cpu", "cuda", "npu") and kind != found:
        hide = {"cuda": "CUDA_VISIBLE_DEVICES=", "npu": f"{acl_probe.VISIBLE}="}.get(found)
        raise UserInputError(
            f"--device {kind} contradicts this machine, whose {found} devices an elastic server would use",
            hint=f"Leave --device out{f', or hide them: export {hide}' if hide else ''}",
        )


def _why_no_npu() -> str:
    if on_cuda():
        return "this machine has NVIDIA GPUs, which come first"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if acl_probe.visible_devices() == ():
        return f"{acl_probe.VISIBLE} is empty, which hides every NPU"
    return acl_probe.probe().error or "CANN finds no NPU"


def check_fp8_devices(config: ElasticConfig) -> None:
    """Raises UserInputError: no kernel of these devices computes with block-quantised fp8 weights."""
    if on_npu():
        raise UserInputError(
            "block-quantised fp8 weights are not supported on NPUs: the grouped product of experts there takes "
            "unquantised weights",
            hint="Serve the model's unquantised checkpoint",
        )
    if not on_cuda():
        return
    import torch

    for device in range(min(config.num_devices, torch.cuda.device_count())):
        if (capability := torch.cuda.get_device_capability(device)) < _FP8_SINCE:
            raise UserInputError(
                f"GPU {device} has compute capability {capability[0]}.{capability[1]}, whose tensor cores know no fp8",
                hint="Use Ada, Hopper or newer GPUs, or the model's unquantised checkpoint",
            )


def check_biased_devices() -> None:
    """Raises UserInputError: these devices' grouped product of experts takes no biases and no clamped SwiGLU."""
    if on_npu():
        raise UserInputError(
            "gpt-oss is not supported on NPUs: the grouped product of experts there takes no biases and no clamped "
            "SwiGLU",
            hint="Serve it on GPUs or on the CPU platform",
        )


def check_redundancy(config: ElasticConfig) -> None:
    """Raises UserInputError: columns may have copies, and these devices cannot share a column's rows among ranks."""
    if config.redundant_experts and on_npu():
        raise UserInputError(
            f"{flag('redundant_experts')} {config.redundant_experts} is not supported on NPUs: rows are sorted by "
            "expert there before they are looked up, so ranks with a copy could not take turns",
            hint="Leave it out: `elasticmoe rebalance` moves columns without it",
        )


def check_devices(config: ElasticConfig) -> None:
    """Raises UserInputError: too few GPUs or NPUs for the ranks, several ranks a GPU without MPS, several an NPU."""
    if on_npu():
        _check_npus(config)
    if not on_cuda():
        return
    import torch

    found = torch.cuda.device_count()
    if found < config.num_devices:
        raise UserInputError(
            f"{config.max_ep_size} ranks, {config.ranks_per_device} a GPU, need {config.num_devices} GPUs, not {found}",
            hint="Lower --elasticmoe-max-ep-size, or put more ranks on a GPU: --elasticmoe-ranks-per-device",
        )
    if config.ranks_per_device > 1 and not mps_runs():
        raise UserInputError(
            f"{config.ranks_per_device} ranks a GPU need NVIDIA's MPS, which is not running: the ranks' kernels would "
            "run in turns, each waiting for the others' time slices",
            hint=_START_MPS,
        )


def _check_npus(config: ElasticConfig) -> None:
    if config.ranks_per_device > 1:
        raise UserInputError(
            f"{config.ranks_per_device} ranks an NPU are not supported: nothing divides its cores between processes",
            hint="Leave --elasticmoe-ranks-per-device out",
        )
    found = _npu_count()
    if found < config.num_devices:
        named = os.environ.get(acl_probe.VISIBLE)
        raise UserInputError(
            f"{config.max_ep_size} ranks need {config.num_devices} NPUs, not {found}"
            + (f" ({acl_probe.VISIBLE}={named})" if named is not None else ""),
            hint=f"Lower --elasticmoe-max-ep-size, or let the server see more NPUs by {acl_probe.VISIBLE}",
        )


def settle_cores(config: ElasticConfig) -> ElasticConfig:
    """The settings with the cores of each device of this machine.

    Raises:
        UserInputError: cores that this process may not run on, or any for GPUs or NPUs.
    """
    setting = config.cpu_bind
    if memory_backend() != "cpu":
        if setting not in (cpu_bind.OFF, cpu_bind.AUTO):
            raise UserInputError(
                f"--elasticmoe-cpu-bind {setting} is for ranks that compute on the CPU", hint="Leave the flag out"
            )
        return replace(config, cpu_bind=cpu_bind.OFF)
    usable, ranks = cpu_bind.usable_cores(), config.max_ep_size
    settled = cpu_bind.resolve(setting, usable, ranks=ranks, devices=config.num_devices)
    if setting == cpu_bind.AUTO and settled == cpu_bind.OFF:
        logger.warning("workers are not bound to cores: %d ranks, %d cores", ranks, len(usable))
    return replace(config, cpu_bind=settled)


def settle_headroom(config: ElasticConfig, static_share: float | None) -> ElasticConfig:
    """The settings with what KV caches leave unused of a GPU or NPU: activations, graphs and contexts take it.

    Args:
        static_share: SGLang's --mem-fraction-static, what weights and KV of one process may take of a device.
    """
    if config.headroom != AUTO or memory_backend() == "cpu":
        return config
    share = 1 - (static_share or _STATIC_SHARE)
    # What a batch needs is divided among a device's ranks, as SGLang divides the batch; what a process needs is not.
    further = config.ranks_per_device - 1
    headroom = f"{share:.3f}" + (f"+{further * _OF_A_PROCESS_GIB}GiB" if further else "")
    logger.info("KV caches leave %s of each device's memory to what its ranks compute with", headroom)
    return replace(config, headroom=headroom)


def leave_cores_to_ranks(config: ElasticConfig) -> None:
    """This process, and what it starts from here on, runs on the cores that no device has, if there are any."""
    if config.cpu_bind == cpu_bind.OFF:
        return
    taken = {core for cores in cpu_bind.parse_core_sets(config.cpu_bind) for core in cores}
    if rest := set(cpu_bind.usable_cores()) - taken:
        cpu_bind.bind_process(rest)


def bind_rank(config: ElasticConfig, rank: int) -> None:
    """This process is a rank's worker: it runs on the cores of its device, with as many threads as are its share.

    To be called before it computes. A smaller OMP_NUM_THREADS of the user's is kept.
    """
    cores = config.cores_of(rank)
    if cores is None:
        return
    import torch

    cpu_bind.bind_process(cores)
    threads = max(1, len(cores) // config.ranks_per_device)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(min(threads, int(limit)) if limit.isdecimal() and int(limit) else threads)
    logger.info("rank %d: bound to cores %s, threads: %d", rank, cpu_bind.format_cores(cores), torch.get_num_threads())


def take_device(config: ElasticConfig, rank: int) -> None:
    """This process is a rank's worker: make the context of its NPU. To be called before anything else calls ACL.

    torch_npu keeps a record of the contexts that it makes, and takes a device that is current already as one that it
    has made: after a first aclrtSetDevice of somebody else's, its allocator aborts the process at the first block that
    two streams have used.
    """
    if on_npu():
        import torch

        torch.get_device_module("npu").set_device(config.device_of(rank))


def check_hmm(config: ElasticConfig) -> None:
    """Looks at an HMM that was started apart.

    Raises:
        UserInputError: it has another kind of memory than the server computes on, or fewer devices than the ranks take.
        HmmUnavailable: nobody answers there. HmmTaken: it serves another server, which does not end soon.
    """
    if config.hmm_endpoint is None:
        return
    with HmmClient(config.hmm_endpoint, name="launch", server=True) as client:
        try:
            backend = client.connect().backend
        except HmmTaken:
            backend = client.connect(wait_s=SERVER_ENDS_S).backend
        found = len(client.status().devices)
    if backend != memory_backend():
        raise UserInputError(
            f"the HMM at {config.hmm_endpoint} has memory of kind {backend}, and the server needs {memory_backend()}",
            hint=f"Start the HMM with --backend {memory_backend()}",
        )
    if found < config.num_devices:
        raise UserInputError(
            f"{config.max_ep_size} ranks, {config.ranks_per_device} a device, need {config.num_devices} devices, and "
            f"the HMM at {config.hmm_endpoint} has {found}",
            hint=f"Start the HMM with --devices {config.num_devices}, or put more ranks on a device: "
            "--elasticmoe-ranks-per-device",
        )


def mps_runs() -> bool:
    """Whether the MPS daemon that the environment names answers."""
    control = shutil.which(_MPS_CONTROL) or next(
        (str(path) for folder in _MPS_FOLDERS if (path := Path(folder) / _MPS_CONTROL).exists()), None
    )
    if control is None:
        return False
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if not pipes.is_dir():
        return False
    asked = subprocess.run(
        [control], input="get_default_active_thread_percentage\n", capture_output=True, text=True, timeout=20
    )
    return asked.returncode == 0
