"""Run by .venv-ascend's Python: lowers Triton kernels to Linalg with triton-ascend's own passes, no CANN, no torch.

    python lower.py JOBS.json

JOBS.json: [{"file", "kernel", "signature": {argument: type}, "constants": {argument: value}, "output"}, ...]
The jobs are lowered in order; a failure names the job and ends the run.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from triton._C.libtriton import ir
from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("npu", "Ascend910B3", 0)


def lower(job):
    spec = importlib.util.spec_from_file_location(job["kernel"], job["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend = AscendBackend(TARGET)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(getattr(module, job["kernel"]), job["signature"], constants=job["constants"])
    ttir = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"target": TARGET, **options.__dict__}
    linalg = ttir_to_linalg(make_ttir(ttir, metadata, options), metadata, options, named_ops=True)
    # Whole or not at all: another test process may wait for the same file.
    partial = Path(f"{job['output']}.{os.getpid()}")
    partial.write_text(linalg)
    partial.rename(job["output"])


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            lower(job)
        except Exception as error:
            detail = getattr(error, "stderr", None)
            raise SystemExit(f"{job['kernel']} {job['constants']} does not lower: {error}\n{detail!r}") from error
