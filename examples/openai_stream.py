"""Chat completions with OpenAI's own client, streamed while the server changes its EP size.

elasticmoe serve --model-path DIR --ep-size 2 --max-ep-size 4
python examples/openai_stream.py --url http://127.0.0.1:30000 --sizes 4,1,2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from background_scaling import BackgroundScaling
from openai import AsyncOpenAI

QUESTIONS = ("What does range(3) give?", "import os", "Write a loop.", "class Point:")
TOKENS = 96


async def ask(client: AsyncOpenAI, question: str, *, show: bool = False) -> str:
    """One streamed answer of a fixed length, greedy so that it is the same every time."""
    stream = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    parts = []
    finish = None
    async for chunk in stream:
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
            if show:
                print(parts[-1], end="", flush=True)
    if finish != "length":
        raise RuntimeError(f"the answer to {question!r} ended with {finish!r}")
    return "".join(parts)


async def run_once(client: AsyncOpenAI, *, show: bool = False) -> list[str]:
    """All questions at the same time."""
    return list(await asyncio.gather(*(ask(client, q, show=show and q == QUESTIONS[0]) for q in QUESTIONS)))


async def run(args: argparse.Namespace) -> int:
    different, runs = 0, 0
    # No retries: an answer that breaks must be visible.
    async with AsyncOpenAI(base_url=f"{args.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        expected = await run_once(client, show=not args.json)
        with BackgroundScaling(args.url, [int(size) for size in args.sizes.split(",") if size]) as scaling:
            while scaling.running:
                different += await run_once(client) != expected
                runs += 1
    if args.json:
        print(json.dumps({"results": expected, "runs": runs, "different": different, "changes": scaling.operations}))
    else:
        print(f"\n{scaling.summary()}\n{runs} runs meanwhile, {different} of them with a different result")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--sizes", default="4,1,2", help="EP sizes to change to meanwhile (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
