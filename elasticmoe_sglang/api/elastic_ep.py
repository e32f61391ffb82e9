"""What callers may do with a running server, whether they come by HTTP, SGLang's tokenizer manager or an Engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from elasticmoe_sglang.api.types import (
    RebalanceAnswer,
    RebalanceRequest,
    ScaleAnswer,
    ScaleRequest,
    ScalingState,
    ServerStatus,
    VllmAnswer,
    VllmScalingState,
    target_of,
)
from elasticmoe_sglang.coordinator.coordinator import Coordinator, check_operation_id
from elasticmoe_sglang.coordinator.status import Operation, Phase, RankInfo, RankState
from elasticmoe_sglang.errors import StaleRequest, UserInputError
from elasticmoe_sglang.event_loop import run_in
from elasticmoe_sglang.planner import Rebalance, TransitionPlan, View, imbalance, plan_target, rank_loads
from elasticmoe_sglang.policy.controller import PolicyController
from elasticmoe_sglang.policy.view import PolicyView

_ResultT = TypeVar("_ResultT")

# Phases in the terms of SGLang's elastic EP; scaling down ends in serving_shrunk, scaling up in serving_expanded.
_SGLANG_PHASES = {
    Phase.PLANNED: "waiting_for_cohort",
    Phase.PREPARING: "waiting_for_cohort",
    Phase.COMMITTING: "syncing_new_world",
    Phase.FINISHING: "syncing_new_world",
    Phase.FAILED: "failed",
    Phase.ROLLED_BACK: "failed",
}
_VLLM_PHASES = {
    Phase.PLANNED: "preparing",
    Phase.PREPARING: "preparing",
    Phase.COMMITTING: "committing",
    Phase.FINISHING: "committing",
    Phase.DONE: "completed",
    Phase.FAILED: "failed",
    Phase.ROLLED_BACK: "failed",
}
_AT_REST = (RankState.HOT, RankState.STANDBY, RankState.STARTING, RankState.INACTIVE)


class ElasticEp:
    """The operations of one server. Coroutines may be awaited in any event loop, other methods called in any thread.

    Args:
        instance_id: names this start of the server.
        loop: the coordinator's event loop, which runs in another thread; None: the loop of the caller.
        policy: asks for changes by itself; manual requests go through it. None: there is none.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        instance_id: str,
        loop: asyncio.AbstractEventLoop | None = None,
        policy: PolicyController | None = None,
    ) -> None:
        self.instance_id = instance_id
        self._coordinator = coordinator
        self._policy = policy
        self._loop = loop

    def policy_view(self, limit: int) -> PolicyView:
        """The policy's settings, state, figures and latest decisions. Raises UserInputError: there is no policy."""
        return self._require_policy().view(limit)

    async def set_policy(self, values: dict[str, Any]) -> PolicyView:
        """Replace some of the policy's settings. Raises UserInputError: one is wrong, or there is no policy."""
        policy = self._require_policy()

        async def replace() -> PolicyView:
            return policy.set(values)

        return await self._call(replace())

    def _require_policy(self) -> PolicyController:
        if self._policy is None:
            raise UserInputError("this server has no policy")
        return self._policy

    async def _call(self, coroutine: Coroutine[Any, Any, _ResultT]) -> _ResultT:
        return await (coroutine if self._loop is None else run_in(self._loop, coroutine))

    async def submit(self, request: ScaleRequest) -> Operation:
        """Start a change, or find the operation that already has this id; it has ended only if nothing had to change.

        Raises:
            StaleRequest: the server or its membership is not the expected one.
            ElasticMoEError: as `Coordinator.submit`.
        """
        return await self._call(self._submit(request))

    async def _submit(self, request: ScaleRequest) -> Operation:
        operation_id = None if request.operation_id is msgspec.UNSET else request.operation_id
        expected = request.expected_instance_id
        if expected is not msgspec.UNSET and expected != self.instance_id:
            raise StaleRequest(
                f"the request is for the instance {expected[:128]!r}, this one is {self.instance_id!r}",
                hint="The server was restarted: read its status before the next request",
            )
        generation = None if request.expected_generation is msgspec.UNSET else request.expected_generation
        submit = self._coordinator.submit if self._policy is None else self._policy.submit
        return await submit(target_of(request), operation_id, expected_epoch=generation)

    async def wait(self, operation: Operation, timeout_s: float | None = None) -> Operation:
        """The operation once it has ended, or as it is after `timeout_s` seconds; it goes on then."""
        if operation.phase.ended:
            return operation
        return await self._call(self._wait(operation.operation_id, timeout_s))

    async def _wait(self, operation_id: str, timeout_s: float | None) -> Operation:
        try:
            return await asyncio.wait_for(self._coordinator.wait(operation_id), timeout_s)
        except asyncio.TimeoutError:
            operation = self._coordinator.get(operation_id)
            assert operation is not None, "an operation that runs was forgotten"
            return operation

    async def scale(self, request: ScaleRequest, warnings: Sequence[str] = ()) -> ScaleAnswer:
        """The operation at once or, with `wait`, once it has ended; its phase tells how. Raises as `submit`."""
        operation = await self.submit(request)
        if request.wait:
            operation = await self.wait(operation)
        return self.answer(operation, warnings)

    async def rebalance(self, request: RebalanceRequest) -> RebalanceAnswer:
        """Observe routing, then move columns so that ranks get equal shares of it; the same ranks stay active.

        Raises:
            RoutingUnknown: it could not be observed.
            ElasticMoEError: as `Coordinator.submit`.
        """
        answer = await self._call(self._rebalance(request))
        if answer.operation is None or not request.wait:
            return answer
        ended = await self.wait(answer.operation)
        return msgspec.structs.replace(answer, operation=self.answer(ended))

    async def _rebalance(self, request: RebalanceRequest) -> RebalanceAnswer:
        name = request.operation_id
        check_operation_id(name)
        if name is not None and self._coordinator.get(name) is not None:
            # It was observed then. Submitting it again finds it, or says that the id is taken.
            operation = await self._coordinator.submit(Rebalance(load=()), name)
            return self._rebalanced(*self._coordinator.rebalance_of(name), self.answer(operation))
        redundant = self._redundant(request)
        load = await self._coordinator.observe_routing(request.observe_s)
        target = Rebalance(load=load, redundant=redundant)
        plan = plan_target(self._coordinator.view, target)
        expected = self._rebalanced(target, plan)
        gain = expected.imbalance - expected.expected_imbalance
        dropped = request.copies is not None and request.copies < len(plan.before.placement.copies)
        if plan.is_noop or (gain < request.least_gain and not dropped):
            note = f"the fullest rank's load would fall by {gain:.3f} of the mean only"
            if plan.is_noop:
                note = "no swap and no copy of columns helps" if redundant else "no swap of columns helps"
            return msgspec.structs.replace(expected, note=note)
        if request.dry_run:
            return msgspec.structs.replace(expected, note="a dry run")
        return msgspec.structs.replace(expected, operation=self.answer(await self._coordinator.submit(target, name)))

    def _redundant(self, request: RebalanceRequest) -> int:
        """The most copies of columns that the request may end with. Raises UserInputError."""
        most = self._coordinator.redundant_experts
        if request.copies is not None and request.copies > most:
            raise UserInputError(
                f"copies must be at most {most} on this server, not {request.copies}",
                hint="It was started with so many --elasticmoe-redundant-experts",
            )
        return most if request.copies is None else request.copies

    def _rebalanced(
        self, target: Rebalance, plan: TransitionPlan, operation: ScaleAnswer | None = None
    ) -> RebalanceAnswer:
        before, after = plan.before, plan.after
        return RebalanceAnswer(
            instance_id=self.instance_id,
            topology_generation=self._coordinator.view.epoch,
            observed_tokens=int(sum(target.load)),
            imbalance=imbalance(before.placement, before.ranks, target.load),
            expected_imbalance=imbalance(after.placement, after.ranks, target.load),
            rank_loads=_shares(before, target.load),
            expected_rank_loads=_shares(after, target.load),
            columns=len(plan.moves),
            copies=len(before.placement.copies),
            expected_copies=len(after.placement.copies),
            operation=operation,
        )

    def answer(self, operation: Operation, warnings: Sequence[str] = ()) -> ScaleAnswer:
        """An operation with what the response to its request adds."""
        fields = {name: getattr(operation, name) for name in Operation.__struct_fields__}
        return ScaleAnswer(
            **fields,
            instance_id=self.instance_id,
            topology_generation=self._coordinator.view.membership.epoch,
            pending_ep_size=None if operation.phase.ended else operation.new_ep_size,
            scale_phase=sglang_phase(operation),
            warnings=list(warnings),
        )

    def vllm_answer(self, operation: Operation, warnings: Sequence[str] = ()) -> VllmAnswer:
        """The response to vLLM's request whose operation is done."""
        return VllmAnswer(
            **msgspec.structs.asdict(self._vllm_state(operation)),
            message=f"Scaled to {operation.new_ep_size} data parallel engines",
            warnings=list(warnings),
        )

    async def status(self) -> ServerStatus:
        """Ranks, membership, epoch, placement, memory, HMM, the running and the last ended operation."""
        status = await self._call(self._coordinator.status())
        joining = status.running.joining if status.running is not None else []
        return ServerStatus(
            **msgspec.structs.asdict(status),
            instance_id=self.instance_id,
            topology_generation=status.epoch,
            safe_to_terminate_ranks=safe_to_terminate(status.ranks, joining),
        )

    def operations(self) -> list[Operation]:
        """The latest operations, newest first."""
        return self._coordinator.operations()

    def operation(self, operation_id: str) -> Operation | None:
        """One of them, None if there is none with this id."""
        return self._coordinator.get(operation_id)

    @property
    def running(self) -> Operation | None:
        """The operation that has not ended yet."""
        return self._coordinator.running

    @property
    def generation(self) -> int:
        """The epoch of the membership."""
        return self._coordinator.view.membership.epoch

    def scaling_state(self) -> ScalingState:
        """Whether a change is running, as SGLang's own endpoint reports it."""
        running = self._coordinator.running
        latest = running or self._coordinator.last
        membership = self._coordinator.view.membership
        joining = running.joining if running is not None else []
        return ScalingState(
            is_scaling_elastic_ep=running is not None,
            effective_ep_size=len(membership.ranks),
            pending_ep_size=running.new_ep_size if running else None,
            scale_phase=sglang_phase(latest),
            last_error=latest.error if latest else None,
            instance_id=self.instance_id,
            topology_generation=membership.epoch,
            operation_id=latest.operation_id if latest else None,
            target_ep_size=latest.new_ep_size if latest else None,
            operation_succeeded=latest.phase is Phase.DONE if latest and latest.phase.ended else None,
            active_ranks=list(membership.ranks),
            safe_to_terminate_ranks=safe_to_terminate(self._coordinator.ranks(), joining),
        )

    def vllm_state(self) -> VllmScalingState:
        """Whether a change is running, as vLLM's own endpoint reports it."""
        return self._vllm_state(self._coordinator.running or self._coordinator.last)

    def _vllm_state(self, latest: Operation | None) -> VllmScalingState:
        membership = self._coordinator.view.membership
        return VllmScalingState(
            is_scaling_elastic_ep=latest is not None and not latest.phase.ended,
            phase=_VLLM_PHASES[latest.phase] if latest is not None else "idle",
            epoch=membership.epoch,
            error=latest.error if latest is not None else None,
            requested_data_parallel_size=latest.new_ep_size if latest is not None else None,
            effective_data_parallel_size=len(membership.ranks),
            operation_id=latest.operation_id if latest is not None else None,
            instance_id=self.instance_id,
            topology_generation=membership.epoch,
        )


def _shares(view: View, load: Sequence[float]) -> dict[int, float]:
    total = sum(load) or 1.0
    return {rank: found / total for rank, found in rank_loads(view.placement, view.ranks, load).items()}


def sglang_phase(operation: Operation | None) -> str:
    """The phase of the running or the latest operation in SGLang's terms."""
    if operation is None:
        return "idle"
    if operation.phase is Phase.DONE:
        return "serving_shrunk" if operation.new_ep_size < operation.old_ep_size else "serving_expanded"
    return _SGLANG_PHASES[operation.phase]


def safe_to_terminate(ranks: Sequence[RankInfo], joining: Sequence[int]) -> list[int]:
    """Ranks that are no members and take part in no change; `joining`: those of the operation that runs."""
    return [rank.rank for rank in ranks if rank.state in _AT_REST and rank.rank not in joining]
