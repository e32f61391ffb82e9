"""A program in SGLang's frontend language, repeated while the server changes its EP size.

    elasticmoe serve --model-path DIR --ep-size 2 --max-ep-size 4
    python examples/frontend_program.py --url http://127.0.0.1:30000 --sizes 4,1,2

It uses gen, select, fork and a regular expression; the results must not depend on what the server does meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import sglang as sgl
from background_scaling import BackgroundScaling

SNIPPETS = ("def area(w, h):\n    return w * h", "import os\nprint(os.getcwd())", "for i in range(3):\n    pass")
ASPECTS = ("style", "speed", "errors")


@sgl.function  # type: ignore[untyped-decorator, unused-ignore]
def review(s: Any, snippet: str) -> None:
    """A summary, a verdict out of three, a remark on each aspect in parallel, and a version number."""
    s += "Review of\n" + snippet + "\nSummary: "
    s += sgl.gen("summary", max_tokens=48, temperature=0, ignore_eos=True)
    s += "\nVerdict: " + sgl.select("verdict", choices=["keep it", "rewrite it", "remove it"])
    branches = s.fork(len(ASPECTS))
    for aspect, branch in zip(ASPECTS, branches, strict=True):
        branch += f"\nAbout its {aspect}: " + sgl.gen("remark", max_tokens=24, temperature=0, ignore_eos=True)
    branches.join()
    for aspect, branch in zip(ASPECTS, branches, strict=True):
        s.set_var(aspect, branch["remark"])
        s += f"\n{aspect}: " + branch["remark"]
    s += "\nVersion: " + sgl.gen("version", max_tokens=16, temperature=0, regex=r"v[0-9]\.[0-9]{1,3}-(alpha|beta)")


def run_once() -> list[dict[str, str]]:
    """All snippets at the same time; what was generated for each, by name."""
    states = review.run_batch([{"snippet": snippet} for snippet in SNIPPETS], num_threads=len(SNIPPETS))
    names = ("summary", "verdict", *ASPECTS, "version")
    for state in states:
        if state.error() is not None:
            raise RuntimeError(f"the program failed: {state.error()}")
    return [{name: state[name] for name in names} for state in states]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--sizes", default="4,1,2", help="EP sizes to change to meanwhile (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    args = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url))
    expected = run_once()
    different, runs = 0, 0
    with BackgroundScaling(args.url, [int(size) for size in args.sizes.split(",") if size]) as scaling:
        while scaling.running:
            different += run_once() != expected
            runs += 1
    if args.json:
        print(json.dumps({"results": expected, "runs": runs, "different": different, "changes": scaling.operations}))
    else:
        print(json.dumps(expected[0], indent=2), scaling.summary(), sep="\n")
        print(f"{runs} runs meanwhile, {different} of them with a different result")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
