"""What `elasticmoe doctor` asks of a machine with NVIDIA GPUs: a program, since it makes a CUDA context.

python -m elasticmoe_patches.gpu_probe      prints one line of JSON, see `GpuProbe`
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json

from elasticmoe_patches.device import mps_runs


def probe() -> dict[str, object]:
    """What is here.

    cuda: torch's CUDA; driver: the newest that the driver carries out; error: why torch cannot use a GPU. kernels:
    SGLang's kernel library; kernels_error: why it does not load. mps: whether it answers. devices: bytes free and in
    all, multiprocessors as this process may use them.
    """
    import torch

    report: dict[str, object] = {
        "cuda": torch.version.cuda or "",
        "driver": "",
        "error": "",
        "kernels": "",
        "kernels_error": "",
        "mps": mps_runs(),
        "devices": [],
    }
    try:
        torch.cuda.current_device()  # initialises CUDA, or says why not
        report["driver"] = _driver()
        report["devices"] = [_device(number) for number in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        report["error"] = str(error).splitlines()[0]
    try:
        report["kernels"] = importlib.metadata.version("sglang-kernel")
        importlib.import_module("sgl_kernel")
    except (ImportError, OSError, RuntimeError) as error:
        report["kernels_error"] = str(error).splitlines()[0]
    return report


def _driver() -> str:
    from cuda.bindings import driver

    _, number = driver.cuDriverGetVersion()
    return f"{number // 1000}.{number % 1000 // 10}"


def _device(number: int) -> dict[str, object]:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    known = torch.cuda.get_device_properties(number)
    return {"name": known.name, "free": free, "total": total, "multiprocessors": known.multi_processor_count}


if __name__ == "__main__":
    print(json.dumps(probe()))
