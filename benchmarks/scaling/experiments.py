"""What each command measures: the cases of one experiment, each a method under a workload and a schedule."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.scaling.ablation import ABLATIONS
from benchmarks.scaling.figures import Slo
from benchmarks.scaling.runner import RunPlan
from benchmarks.scaling.schedule import Schedule
from benchmarks.scaling.servers import ServerSettings
from benchmarks.scaling.workload import Lengths, Workload


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. `label` is its row in the report."""

    label: str
    method: str
    plan: RunPlan
    settings: ServerSettings


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Arguments of `elasticmoe tiny-model`, used when no model is given."""

    layers: int = 4
    hidden: int = 256
    experts: int = 16


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """A command's settings at CPU size; flags override them.

    Attributes:
        changes: as `Schedule.parse` reads them.
        window_s: before and after a change.
    """

    title: str
    paper: str
    start: int = 2
    changes: str = "20:4"
    methods: tuple[str, ...] = ("elastic", "cold-restart", "replica", "colocated", "static")
    rate: float = 3.0
    even: bool = True
    burst_rate: float | None = None
    burst_at: float = 0.0
    burst_s: float = 0.0
    rates: tuple[float, ...] = ()
    prompt: str = "8-32"
    output: str = "16"
    duration_s: float = 60.0
    settle_s: float = 20.0
    window_s: float = 15.0
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=1.0, tpot_s=0.2))
    tiny: TinyModel = field(default_factory=TinyModel)
    ablations: tuple[str, ...] = ()


COMMANDS: dict[str, Defaults] = {
    "scaling": Defaults(
        title="Throughput while the size changes, all methods",
        paper="ElasticMoE (arXiv 2510.02613), scale-up: latency, downtime, peak memory, throughput",
    ),
    "table1": Defaults(
        title="Scale-up with one mechanism disabled at a time",
        paper="ElasticMoE, Table 1",
        methods=("elastic",),
        ablations=("", *ABLATIONS),
        rate=2.0,
        duration_s=20.0,
        changes="8:4",
        settle_s=8.0,
        window_s=8.0,
        # Large enough that copying and reading its weights are visible next to the boot of a process.
        tiny=TinyModel(layers=8, hidden=512, experts=32),
    ),
    "table3": Defaults(
        title="Scale-down",
        paper="ElasticMoE, Table 3",
        start=4,
        changes="20:2",
        methods=("elastic", "cold-restart", "colocated"),
    ),
    "throughput": Defaults(
        title="Throughput before, during and after, up and down",
        paper="ElasticMoE: 6.002 / 3.943 / 7.818 requests/s for a scale-up",
        changes="20:4,90:2",
        duration_s=130.0,
        methods=("elastic", "cold-restart"),
        rate=6.0,
    ),
    "slo": Defaults(
        title="SLO attainment against the request rate, with a change in each run",
        paper="ElasticMoE: SLO attainment against request rate",
        methods=("elastic", "cold-restart"),
        even=False,
        rates=(1.0, 3.0, 6.0),
        changes="10:4",
        duration_s=40.0,
        settle_s=10.0,
        window_s=10.0,
    ),
    "burst": Defaults(
        title="A burst of requests, answered by a scale-up two seconds after it begins",
        paper="ElasticMoE: burst replay",
        methods=("elastic", "cold-restart", "static"),
        even=False,
        rate=1.0,
        burst_rate=5.0,
        burst_at=20.0,
        burst_s=30.0,
        changes="22:4,60:2",
        duration_s=80.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Settings after flags, and where servers come from."""

    defaults: Defaults
    model: Path
    device: str
    kv_tokens: int
    seed: int
    trace: Path | None
    server_args: tuple[str, ...]
    log_dir: Path
    boot_limit_s: float = 150.0

    def cases(self) -> list[Case]:
        """In the order in which they are run."""
        d = self.defaults
        cases = []
        for rate in d.rates or (d.rate,):
            for method in d.methods:
                for ablation in d.ablations if d.ablations and method == "elastic" else ("",):
                    words = [method, f"without {ablation}" if ablation else "", f"at {rate:g}/s" if d.rates else ""]
                    label = " ".join(filter(None, words))
                    cases.append(
                        Case(label=label, method=method, plan=self._plan(rate), settings=self._settings(ablation))
                    )
        return cases

    def _plan(self, rate: float) -> RunPlan:
        d = self.defaults
        workload = Workload(
            rate=rate,
            even=d.even,
            burst_rate=d.burst_rate,
            burst_at=d.burst_at,
            burst_s=d.burst_s,
            prompt=Lengths.parse(d.prompt),
            output=Lengths.parse(d.output),
            trace=self.trace,
            seed=self.seed,
        )
        return RunPlan(
            workload=workload,
            schedule=Schedule.parse(d.start, d.changes),
            duration_s=d.duration_s,
            settle_s=d.settle_s,
        )

    def _settings(self, ablation: str) -> ServerSettings:
        settings = ServerSettings(
            model=str(self.model),
            device=self.device,
            kv_tokens=self.kv_tokens,
            log_dir=self.log_dir,
            boot_limit_s=self.boot_limit_s,
            args=self.server_args,
        )
        return replace(settings, without=(ablation,)) if ablation else settings
