"""send and recv of the elastic process group."""

from __future__ import annotations

from torch import Tensor

from elasticmoe_sglang.comm.engine import GroupEngine
from elasticmoe_sglang.comm.header import Op, dtype_field, pack_header
from elasticmoe_sglang.comm.mailbox import Mailbox, Transfer
from elasticmoe_sglang.comm.work import PendingWork
from elasticmoe_sglang.errors import UserInputError


class PointToPoint:
    """Mixed into the group. A send of up to `mailbox.BOX_BYTES` to an idle pair is over at once; larger ones go on
    whenever this process waits for, sends or receives a message in the same group."""

    engine: GroupEngine

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> PendingWork:
        (tensor,) = tensors
        data = tensor.contiguous()
        mailbox = self._mailbox(dst)
        transfer = self._transfer(data, data, dst, tag)
        mailbox.send(transfer)
        return self._pending(mailbox, transfer, tensors)

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> PendingWork:
        return self._receive(tensors, src, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> PendingWork:
        return self._receive(tensors, None, tag)

    def _receive(self, tensors: list[Tensor], src: int | None, tag: int) -> PendingWork:
        (tensor,) = tensors
        mailbox = self._mailbox(src)
        data = tensor if tensor.is_contiguous() else tensor.contiguous()
        transfer = self._transfer(data, (tensor, data), src, tag)
        if data is not tensor:

            def copy_back() -> None:
                tensor.copy_(data)

            transfer.on_done = copy_back
        mailbox.receive(transfer)
        return self._pending(mailbox, transfer, tensors)

    def _mailbox(self, rank: int | None) -> Mailbox:
        engine = self.engine
        engine.refresh()
        if rank is not None:
            engine.require_present(rank, Op.SEND)
        if engine.channel_index is None or rank == engine.rank or engine.local:
            raise UserInputError("a message needs two different ranks")
        mailbox = engine.region.mailbox(engine.channel_index)
        mailbox.enter(tuple(engine.ranks[present] for present in engine.present), engine.region.epoch)
        return mailbox

    def _transfer(self, data: Tensor, keep: object, rank: int | None, tag: int) -> Transfer:
        return Transfer(
            peer=None if rank is None else self.engine.ranks[rank],
            address=data.data_ptr(),
            nbytes=data.nbytes,
            header=pack_header(Op.SEND, dtype_field=dtype_field(data), nbytes=data.nbytes),
            tag=tag,
            keep=keep,
        )

    def _pending(self, mailbox: Mailbox, transfer: Transfer, tensors: list[Tensor]) -> PendingWork:
        engine = self.engine

        def finish(timeout_s: float | None) -> None:
            mailbox.wait(transfer, engine.timeout_s if timeout_s is None else timeout_s)

        def source() -> int:
            return engine.ranks.index(transfer.peer) if transfer.peer is not None else -1

        return PendingWork(finish, lambda: transfer.done, source, tensors)
