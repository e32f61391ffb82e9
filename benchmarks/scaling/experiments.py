"""The experiments as data: which methods, at which sizes, under which load. `runner` carries them out."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.scaling.ablation import ABLATIONS
from benchmarks.scaling.figures import Slo
from elasticmoe_sglang.tiny_model import Arch


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stretch of load.

    Attributes:
        sizes: the first one, then those to change to. The same size twice is a moment at which nothing is changed: its
            figures are what a change's would be without one.
        share: open loop at this share of the capacity of the first size; None: a closed loop.
        lanes: of the closed loop; None: the experiment's.
        rebalance: a change is one of the placement, by the routing of the load; the sizes say how often.
        seconds: before the first change, between changes, and after the last; None: the experiment's.
    """

    name: str
    sizes: tuple[int, ...]
    share: float | None = None
    lanes: int | None = None
    seconds: float | None = None
    rebalance: bool = False

    @property
    def measures_capacity(self) -> bool:
        """Later open loops of the same arm are sized by it, so it comes first."""
        return self.share is None and len(self.sizes) == 1


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method and what its servers go through, one run after the other, from one start.

    Attributes:
        largest: size that the servers are prepared for (`--max-ep-size`); other methods do not know it.
        without: mechanisms that joining ranks do without.
    """

    name: str
    method: str
    runs: tuple[Run, ...]
    largest: int = 2
    without: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Arguments of `elasticmoe tiny-model`, used when no model is given."""

    layers: int = 4
    hidden: int = 256
    experts: int = 16
    arch: Arch = "qwen3_moe"
    skew: float | None = None

    @property
    def about(self) -> str:
        """In words, for the figures."""
        skew = "" if self.skew is None else f", experts chosen with a skew of {self.skew:g}"
        return f"tiny {self.arch}, {self.layers} layers, {self.experts} experts, hidden {self.hidden}, float32{skew}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms under the same workload, at CPU size.

    Attributes:
        prompt, output: words and tokens, as `Lengths.parse` reads them.
        lanes: clients of a closed loop.
        window_s: before and after a change, at most.
        seconds: of load before a change and after it; a closed loop without a change also lasts until each lane has had
            some requests.
        flags: further SGLang flags of all servers.
    """

    title: str
    paper: str
    arms: tuple[Arm, ...]
    repetitions: int = 5
    prompt: str = "4-24"
    output: str = "160"
    lanes: int = 6
    seconds: float = 8.0
    window_s: float = 10.0
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=1.0, tpot_s=0.2))
    tiny: TinyModel = TinyModel()
    flags: tuple[str, ...] = ()


def _capacity(*sizes: int) -> tuple[Run, ...]:
    return tuple(Run(name=f"closed loop at {size}", sizes=(size,)) for size in sizes)


def _fixed(size: int) -> Run:
    return Run(name=f"no change at {size}", sizes=(size, size), share=0.8)


_UP = Run(name="up at 0.8", sizes=(1, 2), share=0.8)

EXPERIMENTS: dict[str, Experiment] = {
    "scale": Experiment(
        title="One rank more and one less under load, all methods",
        paper="ElasticMoE (arXiv 2510.02613): latency, downtime, peak memory, throughput, SLO attainment; Table 3",
        arms=(
            Arm(
                name="elastic",
                method="elastic",
                runs=(
                    *_capacity(1, 2),
                    *(Run(name=f"up at {share}", sizes=(1, 2), share=share) for share in (0.5, 0.8, 1.2)),
                    Run(name="down at 0.5", sizes=(2, 1), share=0.5),
                    _fixed(1),
                    _fixed(2),
                ),
            ),
            Arm(name="plain 1", method="plain", runs=(*_capacity(1), _fixed(1))),
            Arm(name="plain 2", method="plain", runs=(*_capacity(2), _fixed(2))),
            Arm(name="cold-restart", method="cold-restart", runs=(*_capacity(1), _UP)),
            Arm(name="replica", method="replica", runs=(*_capacity(1), _UP)),
            Arm(name="colocated", method="colocated", runs=(*_capacity(1), _UP)),
        ),
        # Large enough that computing dominates: on two cores a second rank is worth having. Small enough that a run
        # has tens of requests.
        tiny=TinyModel(layers=4, hidden=512, experts=16),
        seconds=15.0,
        window_s=15.0,
        prompt="lognormal:16-1300",
        output="24-48",
        lanes=16,
        # A prompt must not hold up decoding streams: without mixed chunks SGLang computes all of a prompt's chunks, and
        # of those that wait, before the next decode step, which is a gap of seconds on any server here. The chunk is
        # shared by all ranks that there may be.
        flags=("--chunked-prefill-size", "256", "--enable-mixed-chunk"),
    ),
    "timing": Experiment(
        title="Changes of one rank under closed loops, four ranks on the same cores",
        paper="",
        arms=(
            Arm(
                name="elastic, 2 of 4",
                method="elastic",
                largest=4,
                runs=(*_capacity(2), Run(name="changes", sizes=(2, 3, 2, 1, 2, 3, 2, 1, 2), seconds=2.0)),
            ),
            Arm(name="elastic, 2 of 2", method="elastic", runs=_capacity(2)),
            Arm(name="plain 2", method="plain", runs=_capacity(2)),
        ),
    ),
    "reserve": Experiment(
        title="One active rank with room for more, against plain SGLang without",
        paper="",
        arms=tuple(
            Arm(
                name=name,
                method=method,
                largest=largest,
                runs=tuple(Run(name=f"{lanes} at a time", sizes=(1,), lanes=lanes, seconds=8.0) for lanes in (1, 8)),
            )
            for name, method, largest in (
                ("plain 1", "plain", 1), ("elastic, 1 of 2", "elastic", 2), ("elastic, 1 of 4", "elastic", 4),
                ("elastic, 1 of 8", "elastic", 8),
            )
        ),
    ),
    "rebalance": Experiment(
        title="Expert columns placed by load, with routing that prefers some experts",
        paper="",
        arms=tuple(
            Arm(
                name=name,
                method="elastic",
                runs=(Run(name="closed loop", sizes=(2, 2), lanes=16, rebalance=rebalance),),
            )
            for name, rebalance in (("rebalanced", True), ("left alone", False))
        ),
        # Prefill fills the experts: what a step costs is then the fullest rank's share of the tokens. Requests are
        # alike, so that a rate of few of them says something.
        tiny=TinyModel(layers=6, hidden=512, experts=16, arch="glm4_moe", skew=1.5),
        prompt="192",
        output="4",
        seconds=25.0,
        window_s=25.0,
        flags=("--chunked-prefill-size", "512"),
    ),
    "ablation": Experiment(
        title="Scale-up with one mechanism disabled at a time",
        paper="ElasticMoE, Table 1",
        arms=tuple(
            Arm(
                name=f"without {name}" if name else "elastic",
                method="elastic",
                largest=4,
                without=(name,) if name else (),
                runs=(Run(name="up", sizes=(2, 4), lanes=4),),
            )
            for name in ("", *ABLATIONS)
        ),
        # Large enough that copying and reading its weights are visible next to the boot of a process.
        tiny=TinyModel(layers=8, hidden=512, experts=32),
    ),
}  # fmt: skip
