"""`elasticmoe tiny-model`: write a small random MoE model with a tokenizer, for tests and trials."""

from __future__ import annotations

import argparse
import json

from elasticmoe_sglang.cli.exits import OK
from elasticmoe_sglang.models import ARCHITECTURES, CORRECTED

ARCHS = tuple(each.arch for each in ARCHITECTURES.values())
_TEXT = "Write a small random Mixture-of-Experts model with a tokenizer; nothing is downloaded."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `tiny-model` command; its namespace carries `run`."""
    parser = subparsers.add_parser("tiny-model", help=_TEXT, description=_TEXT)
    parser.add_argument("dir", metavar="DIR", help="folder to write to, created if it does not exist")
    parser.add_argument("--arch", choices=ARCHS, default="qwen3_moe", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--experts", type=int, default=16, help="routed experts of a layer (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument("--skew", type=float, help=f"choose the first experts more often ({', '.join(CORRECTED)})")
    parser.add_argument("--quantization", choices=("fp8",), help="block-quantised weights (--hidden a multiple of 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the model and print its path and size."""
    from elasticmoe_sglang.tiny_model import make_tiny_model
    from elasticmoe_sglang.units import format_bytes

    path = make_tiny_model(
        args.dir,
        arch=args.arch,
        layers=args.layers,
        experts=args.experts,
        hidden=args.hidden,
        dtype=args.dtype,
        seed=args.seed,
        skew=args.skew,
        quantization=args.quantization,
    )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if args.json:
        print(json.dumps({"path": str(path), "arch": args.arch, "bytes": size}))
    else:
        print(f"{args.arch} with {args.layers} layers and {args.experts} experts, {format_bytes(size)}: {path}")
        print(f"try it: elasticmoe serve --model-path {path} --ep-size 2 --max-ep-size 4")
    return OK
