"""References, made once a session: plain SGLang's answers to the tiny models."""

from __future__ import annotations

from elasticmoe_sglang.tiny_model import Arch, Quantization
from tests.helpers.corpus import Corpus, make_corpus
from tests.helpers.shared import Shared


class Corpora:
    """Makes a model's corpus when it is first asked for."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._made: dict[tuple[Arch, Quantization | None], Corpus] = {}

    def __getitem__(self, arch: Arch) -> Corpus:
        return self.of(arch, None)

    def of(self, arch: Arch, quantization: Quantization | None) -> Corpus:
        model = (arch, quantization)
        if model not in self._made:
            self._made[model] = make_corpus(self._shared.plain(*model))
            # Idle it would take a core from all tests that follow: SGLang's processes poll.
            self._shared.close()
        return self._made[model]
