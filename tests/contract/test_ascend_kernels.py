"""Every Ascend kernel is lowered by triton-ascend 3.2.0 to Linalg, and that Linalg is run on the CPU through LLVM 19.

What is compared is therefore what Ascend's own compiler would be handed. Reference: the float64 layer of
`elasticmoe_kernels.reference`. Nothing here ran on an NPU.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch

from elasticmoe_kernels.ascend import moe
from elasticmoe_kernels.ascend.routing import route
from elasticmoe_kernels.ascend.tiles import UB, Tiles, tiles_for
from elasticmoe_kernels.errors import NoBackend, ShapeError
from elasticmoe_kernels.reference.moe import moe_experts as reference
from elasticmoe_kernels.registry import BACKENDS
from tests.helpers.triton_ascend.execute import TYPES, Job, ToolMissing, lower, tool, triton_ascend_python
from tests.helpers.triton_ascend.launch import LinalgKernel, job_for

pytestmark = pytest.mark.toolchain

NAMES = ("gather_rows", "grouped_gemm", "swiglu", "combine")
SMALL = Tiles(block_m=16, block_n=32, block_k=32, block_h=64, block_i=32)
CORES = moe.Cores(cube=3, vector=5)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative to the largest output: input rounding dominates, one more rounding for each of the stored intermediates.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-6}


@pytest.fixture(scope="module")
def toolchain() -> None:
    try:
        triton_ascend_python()
        for name in ("mlir-opt", "mlir-translate", "clang"):
            tool(name)
    except ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture
def kernels(toolchain: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, LinalgKernel]]:
    replaced = {name: LinalgKernel(name) for name in NAMES}
    for name, kernel in replaced.items():
        monkeypatch.setattr(moe, name, kernel)
    yield replaced


def jobs(dtype: torch.dtype, tiles: Tiles, top_k: int) -> list[Job]:
    p = "*" + TYPES[dtype]
    gemm_constants = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    gemm = [p, p, p, "*i32", "*i32", "i32", "i32", "i32", "i32", "i64", "i32"]
    combine = [p, "*i32", "*fp32", p, "i32", "i32", "i32", "i32"]
    return [
        job_for("gather_rows", [p, "*i32", p, "i32", "i32", "i32", "i32", "i32"], {"BLOCK_H": tiles.block_h}),
        job_for("grouped_gemm", gemm, gemm_constants),
        job_for("swiglu", [p, p, "*i32", "i32", "i32", "i32", "i32"], {"BLOCK_I": tiles.block_i}),
        job_for("combine", combine, {"TOP_K": top_k, "BLOCK_H": tiles.block_h}),
    ]


PRODUCTION = [
    (dtype, tiles_for(rows, 64, dtype.itemsize), top_k)
    for (dtype, rows), top_k in zip(itertools.product(DTYPES, (64, 64 * 24, 64 * 1000)), itertools.cycle((6, 8)))
]


def test_every_kernel_lowers_in_the_sizes_used(toolchain: None) -> None:
    wanted = [job for dtype, tiles, top_k in PRODUCTION for job in jobs(dtype, tiles, top_k)]
    for job, path in lower(wanted).items():
        text = path.read_text()
        assert "func.func" in text, job
        # How triton-ascend marks an access it could not turn into a block move: one scalar at a time.
        assert "ExtractedLoadOrStore" not in text, f"{job.kernel} loads or stores element by element"
        assert "linalg.matmul" in text or job.kernel != "grouped_gemm"


def test_a_scattered_access_would_be_seen(toolchain: None, tmp_path) -> None:
    source = tmp_path / "scattered.py"
    source.write_text(
        "import triton\nimport triton.language as tl\n"
        "@triton.jit\n"
        "def scattered(x, index, out, BLOCK: tl.constexpr):\n"
        "    at = tl.arange(0, BLOCK)\n"
        "    tl.store(out + at, tl.load(x + tl.load(index + at)))\n"
    )
    signature = (("x", "*fp32"), ("index", "*i32"), ("out", "*fp32"))
    job = Job(kernel="scattered", signature=signature, constants=(("BLOCK", 64),), file=source)
    assert "ExtractedLoadOrStore" in lower([job])[job].read_text()


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_kernels_fit_the_unified_buffer(toolchain: None, dtype: torch.dtype) -> None:
    """All buffers the Linalg allocates, doubled as triton-ascend does, as if none were ever reused."""
    for rows in (64, 64_000):
        for job, path in lower(jobs(dtype, tiles_for(rows, 64, dtype.itemsize), 8)).items():
            if job.kernel == "grouped_gemm":
                continue
            held = 0
            for shape, kind in re.findall(
                r"(?:memref\.alloc\(\)|tensor\.empty\(\)) : \w+<([\dx]+)x([a-z]+\d+)>", path.read_text()
            ):
                count = 1
                for extent in shape.split("x"):
                    count *= int(extent)
                held += count * int(re.sub(r"\D", "", kind)) // 8
            assert 0 < held * 2 <= UB, f"{job.kernel} {job.constants} {dtype}: {held} bytes, twice"


def test_tiles_refuse_what_does_not_fit() -> None:
    for rows, itemsize in itertools.product((1, 100, 10_000, 10_000_000), (2, 4)):
        tiles_for(rows, 64, itemsize).check(itemsize)
    big = {"block_m": 128, "block_n": 128, "block_k": 128, "block_h": 2048, "block_i": 1024}
    for change in ({"block_k": 512}, {"block_n": 512}, {"block_h": 65536}, {"block_i": 16384}, {"block_k": 8}):
        with pytest.raises(ShapeError):
            Tiles(**{**big, **change}).check(2)


# ---- the whole layer, through the lowered Linalg ----


def layer(seed: int, tokens: int, hidden: int, inter: int, slots: int, top_k: int, dtype: torch.dtype):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=random).to(dtype)
    # A pitch larger than a slot, as in an expert column that holds all layers; what lies between is poison.
    pitch13, pitch2 = 2 * inter * hidden + 96, hidden * inter + 160
    w13 = torch.full((slots * pitch13,), float("nan"), dtype=dtype).as_strided(
        (slots, 2 * inter, hidden), (pitch13, hidden, 1)
    )
    w2 = torch.full((slots * pitch2,), float("nan"), dtype=dtype).as_strided((slots, hidden, inter), (pitch2, inter, 1))
    w13.copy_(torch.randn(w13.shape, generator=random) / hidden**0.5)
    w2.copy_(torch.randn(w2.shape, generator=random) / inter**0.5)
    weights = torch.rand(tokens, top_k, generator=random)
    return x, w13, w2, weights, random


def compare(out: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and torch.isfinite(out).all()
    error = (out.double() - wanted).abs().max().item() if out.numel() else 0.0
    assert error <= TOLERANCE[dtype] * max(wanted.abs().max().item() if out.numel() else 0.0, 1e-3), error


ROUTINGS = {
    "uniform": lambda t, k, s, g: torch.rand(t, s, generator=g).argsort(1)[:, :k],
    "all to one expert": lambda t, k, s, g: torch.full((t, k), -1).index_fill(1, torch.tensor([0]), s - 1),
    "half absent": lambda t, k, s, g: torch.where(
        torch.rand(t, k, generator=g) < 0.5, torch.rand(t, s, generator=g).argsort(1)[:, :k], -1
    ),
    "none here": lambda t, k, s, g: torch.full((t, k), -1),
    "two experts only": lambda t, k, s, g: torch.randint(0, 2, (t, k), generator=g) * (s - 1),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "inter"), [(1, 64, 32), (5, 96, 40), (33, 130, 50), (70, 33, 7), (0, 64, 32)]
)
def test_the_layer(kernels, tokens: int, hidden: int, inter: int, dtype: torch.dtype, routing: str) -> None:
    slots, top_k = 6, 3
    x, w13, w2, weights, random = layer(tokens, tokens, hidden, inter, slots, top_k, dtype)
    ids = ROUTINGS[routing](tokens, top_k, slots, random).to(torch.int32)
    for slot in set(range(slots)) - set(ids.flatten().tolist()):
        w13[slot], w2[slot] = float("nan"), float("nan")  # not named: must not be read
    out = moe.moe_experts(x, w13, w2, ids, weights, cores=CORES, tiles=SMALL)
    compare(out, reference(x, w13, w2, ids, weights), dtype)
    for name, launched in ((name, launch) for name, kernel in kernels.items() for launch in kernel.launches):
        assert launched[0] <= (CORES.cube if name == "grouped_gemm" else CORES.vector)


def test_the_layer_in_production_tiles(kernels) -> None:
    x, w13, w2, weights, random = layer(7, 300, 272, 136, 4, 2, torch.bfloat16)
    ids = ROUTINGS["uniform"](300, 2, 4, random)
    tiles = tiles_for(300 * 2, 4, 2)
    assert tiles.block_m == 128
    out = moe.moe_experts(x, w13, w2, ids, weights, cores=moe.Cores(cube=20, vector=40), tiles=tiles)
    compare(out, reference(x, w13, w2, ids, weights), torch.bfloat16)


@pytest.mark.parametrize("cores", [1, 2, 7, 20])
def test_the_number_of_cores_changes_nothing(kernels, cores: int) -> None:
    x, w13, w2, weights, random = layer(3, 41, 64, 48, 5, 2, torch.float32)
    ids = ROUTINGS["half absent"](41, 2, 5, random)
    out = moe.moe_experts(x, w13, w2, ids, weights, cores=moe.Cores(cube=cores, vector=cores), tiles=SMALL)
    compare(out, reference(x, w13, w2, ids, weights), torch.float32)


def test_rows_of_absent_groups_stay(kernels) -> None:
    """expert_mlp on SGLang's layout: rows of all experts, sorted; those of other ranks keep what `out` held."""
    _, w13, w2, _, random = layer(5, 1, 64, 32, 8, 1, torch.float32)
    counts = torch.tensor([3, 0, 17, 1, 30, 9])
    slots = torch.tensor([7, 2, -1, 0, 5, -1], dtype=torch.int32)
    w13[[1, 3, 4, 6]] = float("nan")
    rows = torch.randn(64, 64, generator=random)  # the last four belong to nobody
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    out = torch.full_like(rows, 5.0)
    moe.expert_mlp(rows, w13, w2, offsets, slots, cores=CORES, tiles=SMALL, out=out)
    expert = torch.repeat_interleave(slots, counts)
    ids = torch.cat([expert, torch.full((4,), -1)])[:, None]
    wanted = reference(rows, w13, w2, ids, torch.ones(64, 1))
    wanted[ids[:, 0] < 0] = 5.0
    compare(out, wanted, torch.float32)


def test_a_pitch_beyond_32_bits(kernels) -> None:
    """Two slots 2^31 elements apart, as large columns are; only the pages written take memory."""
    _, w13, w2, _, random = layer(9, 1, 64, 32, 2, 1, torch.float16)
    pitch = 2**31
    far = torch.empty(pitch + w13[0].numel(), dtype=torch.float16).as_strided(w13.shape, (pitch, 64, 1))
    far[0], far[1] = w13[0], w13[1]
    x = torch.randn(20, 64, generator=random).half()
    ids = torch.randint(0, 2, (20, 1), generator=random)
    out = moe.moe_experts(x, far, w2, ids, torch.ones(20, 1), cores=CORES, tiles=SMALL)
    compare(out, reference(x, w13, w2, ids, torch.ones(20, 1)), torch.float16)


def test_routing_is_a_permutation() -> None:
    ids = torch.randint(-1, 9, (50, 4), generator=torch.Generator().manual_seed(0))
    routing = route(ids, 9)
    here = ids >= 0
    rows = routing.row[here].long()
    assert rows.unique().numel() == int(here.sum()) == int(routing.offsets[-1])
    assert (routing.row[~here] == -1).all()
    assert (routing.token[rows] == torch.arange(50)[:, None].expand(50, 4)[here]).all()
    of_row = torch.searchsorted(routing.offsets.long(), rows, right=True) - 1
    assert (of_row == ids[here]).all()


def test_wrong_inputs_are_named() -> None:
    x, w13, w2, weights, _ = layer(1, 4, 64, 32, 2, 1, torch.float32)
    offsets, slots = torch.tensor([0, 4, 4], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ShapeError, match="do not belong together"):
        moe.expert_mlp(x, w13, w2.transpose(1, 2), offsets, slots, cores=CORES, tiles=SMALL)
    with pytest.raises(ShapeError, match="contiguous within a slot"):
        moe.expert_mlp(
            x, w13.transpose(1, 2).contiguous().transpose(1, 2), w2, offsets, slots, cores=CORES, tiles=SMALL
        )
    with pytest.raises(NoBackend, match="not on cpu"):
        moe.moe_experts(x, w13, w2, torch.zeros(4, 1, dtype=torch.int32), weights)


def test_the_registry_loads_it() -> None:
    backend = BACKENDS["ascend"]
    assert backend.devices == ("npu",) and backend.dtypes == (torch.float32, torch.bfloat16, torch.float16)
    assert backend.load() is moe.moe_experts
    assert "not run on an NPU" in backend.proven
