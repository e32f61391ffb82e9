"""The settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.streams import Ask
from elasticmoe_sglang.cpu_bind import OFF, resolve, usable_cores

# The tiny model's tokenizer was trained on Python code.
PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n",
    "class Stack:\n    def push(self, item):\n",
    "for line in open(path):\n",
    "with socket.socket() as probe:\n",
    "return sorted(values, key=",
    "try:\n    import json\nexcept ImportError:\n",
    'if __name__ == "__main__":\n',
)
_SHORTER = 15


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one run.

    Attributes:
        sizes: EP sizes in order; the server starts with the first one.
        streams: requests that decode at the same time.
        tokens: of the longest requests; others are up to 7 * 15 tokens shorter, so that they do not end together.
        steady_s: seconds of decoding before, between and after the changes.
        device: SGLang's name of the kind of device.
    """

    out: Path
    sizes: tuple[int, ...] = (2, 4, 1, 3)
    ranks: int = 4
    streams: int = 8
    tokens: int = 240
    steady_s: float = 5.0
    experts: int = 32
    layers: int = 4
    port: int | None = None
    device: str = "cpu"

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def log(self) -> Path:
        return self.out / "server.log"

    @property
    def cpu_bind(self) -> str:
        """Cores of each rank, `off` where this machine has fewer cores than ranks, and on other devices."""
        if self.device != "cpu":
            return OFF
        return resolve("auto", usable_cores(), ranks=self.ranks, devices=self.ranks)

    def serve_args(self) -> list[str]:
        """Arguments of `elasticmoe serve`."""
        size = ["--ep-size", str(self.sizes[0]), "--max-ep-size", str(self.ranks), "--cpu-bind", self.cpu_bind]
        # On an accelerator SGLang takes a float32 checkpoint for half precision unless told not to.
        device = ["--device", self.device, *(["--dtype", "float32"] if self.device != "cpu" else [])]
        return ["--model-path", str(self.model), *size, *device, "--max-total-tokens", "16384"]

    def reference_asks(self) -> list[Ask]:
        """Every prompt once, at full length."""
        return [_ask(index, self.tokens) for index in range(len(PROMPTS))]

    def choose(self, lane: int, number: int) -> Ask:
        """Request number `number` of a lane. Lanes cycle through the prompts, with different lengths."""
        shorter = _SHORTER * ((lane + 3 * number) % 8)
        return _ask((lane + number) % len(PROMPTS), max(self.tokens - shorter, self.tokens // 2))


def _ask(prompt: int, tokens: int) -> Ask:
    return Ask(key=f"prompt {prompt}", prompt=PROMPTS[prompt], tokens=tokens)
