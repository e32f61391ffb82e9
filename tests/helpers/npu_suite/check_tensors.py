"""The real torch_npu over memory that the Ascend backend mapped."""

import gc
import weakref

import pytest
import torch

from elasticmoe_sglang.hmm.layout import ColumnLayout
from elasticmoe_sglang.hmm.space import ColumnSpace
from elasticmoe_sglang.hmm.vmm import get_backend
from tests.helpers.tensors import tensor_from_handle

pytestmark = pytest.mark.toolchain

M = 2 << 20
SHAPE = (1024, 1024)  # bfloat16: one granule


@pytest.fixture
def backend():
    backend = get_backend("npu")
    before = backend.usage()
    yield backend
    assert backend.usage() == before


def tensor_over(backend, va: int, nbytes: int, shape: tuple[int, ...], device: int = 0) -> torch.Tensor:
    storage = backend.storage(va, nbytes, device)
    return torch.empty(0, dtype=torch.bfloat16, device=backend.torch_device(device)).set_(storage, 0, shape)


def fill(tensor: torch.Tensor, value: float) -> None:
    tensor.copy_(torch.full(tensor.shape, value, dtype=tensor.dtype))


def test_a_tensor_over_mapped_memory(backend) -> None:
    va, handle = backend.reserve(M), backend.create(M, 0)
    backend.map(va.base, handle)
    tensor = tensor_over(backend, va.base, M, SHAPE)
    assert tensor.device == torch.device("npu:0") and tensor.data_ptr() == va.base
    assert tensor.cpu().eq(0).all()  # new memory is zeroed
    values = torch.randn(SHAPE).bfloat16()
    tensor.copy_(values)
    assert torch.equal(tensor.cpu(), values)
    assert torch.equal(tensor[5:9].cpu(), values[5:9])
    backend.unmap(va.base, M)
    backend.close(handle)
    backend.release_va(va)


def test_slots_are_remapped_under_a_live_tensor(backend) -> None:
    """The step of a commit's preparation: one [slots, ...] tensor stays, the page behind one of its slots changes."""
    slots = 8
    va = backend.reserve(slots * M)
    columns = [backend.create(M, 0) for _ in range(slots + 1)]
    for slot in range(slots):
        backend.map(va.base + slot * M, columns[slot])
    weights = tensor_over(backend, va.base, slots * M, (slots, *SHAPE))
    for slot in range(slots):
        fill(weights[slot], float(slot))

    backend.unmap(va.base + 2 * M, M)
    backend.map(va.base + 2 * M, columns[slots])
    fill(weights[2], 77.0)
    assert [weights[slot, 5, 5].cpu().item() for slot in range(slots)] == [0, 1, 77, 3, 4, 5, 6, 7]

    # The page that left is whole, wherever it is mapped next.
    elsewhere = backend.reserve(M)
    backend.map(elsewhere.base, columns[2])
    assert tensor_over(backend, elsewhere.base, M, SHAPE).cpu().eq(2.0).all()
    # And it can come back.
    backend.unmap(va.base + 2 * M, M)
    backend.unmap(elsewhere.base, M)
    backend.map(va.base + 2 * M, columns[2])
    assert weights[2].cpu().eq(2.0).all()

    for slot in range(slots):
        backend.unmap(va.base + slot * M, M)
    for column in columns:
        backend.close(column)
    backend.release_va(elsewhere)
    backend.release_va(va)


def test_strided_layer_views_of_columns(backend) -> None:
    """Layer l of every column, as [slots, rows, K] with the column pitch as stride; unmapped slots stay alone."""
    slots, layers, rows, depth = 4, 2, 256, 1024  # a layer is a quarter of a column
    va, used = backend.reserve(slots * M), (0, 3)
    columns = {slot: backend.create(M, 0) for slot in used}
    for slot, column in columns.items():
        backend.map(va.base + slot * M, column)
    whole = tensor_over(backend, va.base, slots * M, (slots * M // 2,))
    pitch, layer = M // 2, rows * depth
    views = [whole.as_strided((slots, rows, depth), (pitch, depth, 1), number * layer) for number in range(layers)]
    for slot in used:
        for number, view in enumerate(views):
            fill(view[slot], 10.0 * slot + number)
    assert [[view[slot, -1, -1].cpu().item() for slot in used] for view in views] == [[0.0, 30.0], [1.0, 31.0]]
    for slot in used:
        backend.unmap(va.base + slot * M, M)
        backend.close(columns[slot])
    backend.release_va(va)


def test_a_column_space_and_its_views(backend) -> None:
    """What a rank holds: views over all slots, columns that come by a pull from a peer, and go."""
    layout = ColumnLayout.of([("w13", (64, 512), torch.bfloat16), ("w2", (512, 32), torch.bfloat16)])
    space = ColumnSpace(backend, 6, layout.column_bytes, device=0)
    views = space.views(layout)
    assert views["w13"].device == torch.device("npu:0") and views["w13"].stride(0) * 2 == space.pitch == M
    peer = backend.create(M, 1)
    source = tensor_from_handle(backend, peer, (layout.column_bytes // 2,), "bfloat16")
    source.copy_(torch.arange(layout.column_bytes // 2).bfloat16())
    wanted = source.cpu()
    space.map_column(4, backend.create(M, 0))
    assert space.pull(4, peer).complete
    assert torch.equal(views["w13"][4].cpu().flatten(), wanted[: 64 * 512])
    assert torch.equal(views["w2"][4].cpu().flatten(), wanted[layout.offsets["w2"] // 2 :][: 512 * 32])
    assert torch.ops.npu.get_npu_format(views["w2"][4]) == 2  # ND: plain rows
    space.unmap_column(4)
    del source, views
    gc.collect()
    space.close()


def test_a_storage_tells_when_it_is_gone(backend) -> None:
    va, handle, gone = backend.reserve(M), backend.create(M, 0), []
    backend.map(va.base, handle)
    storage = backend.storage(va.base, M, 0)
    weakref.finalize(storage, gone.append, True)
    tensor = torch.empty(0, dtype=torch.bfloat16, device="npu:0").set_(storage, 0, SHAPE)
    del storage
    gc.collect()
    assert tensor.data_ptr() == va.base
    del tensor
    gc.collect()
    assert gone == [True]
    backend.unmap(va.base, M)
    backend.close(handle)
    backend.release_va(va)


def test_copies_between_devices_keep_torchs_device(backend) -> None:
    ranges, handles = [backend.reserve(M) for _ in range(2)], [backend.create(M, device) for device in range(2)]
    for va, handle in zip(ranges, handles, strict=True):
        backend.map(va.base, handle)
    fill(tensor_over(backend, ranges[1].base, M, SHAPE, device=1), 3.0)
    torch.npu.set_device(1)
    backend.copy(ranges[0].base, ranges[1].base, M)
    assert torch.npu.current_device() == 1
    assert tensor_over(backend, ranges[0].base, M, SHAPE).cpu().eq(3.0).all()
    for va, handle in zip(ranges, handles, strict=True):
        backend.unmap(va.base, M)
        backend.close(handle)
        backend.release_va(va)


def test_compute_fails_loudly(backend) -> None:
    left = torch.empty(4, device="npu:0")
    with pytest.raises(RuntimeError, match="does not compute"):
        left + left
