"""The tables in docs/operations.md of request features and of what can be told to a running server.

python -m elasticmoe_patches.featuredocs docs/operations.md           write them
python -m elasticmoe_patches.featuredocs --check docs/operations.md   exit status 1 where they differ
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from elasticmoe_patches.features import FEATURES, Feature
from elasticmoe_patches.runtime_state import KEPT, REFUSED, REPLAYED, Endpoint

_MOVES = "`test_scale_tokens.py::test_features_through_changes`"
_DEATHS = "`test_feature_deaths.py::test_features_through_deaths`"
_REFUSALS = "`test_features.py::test_a_request_with_a_refused_field_is_refused_with_its_reason`"
_BEAMS = "`test_features.py::test_a_beam_is_refused_and_a_width_of_one_is_none`"
_LAUNCHES = "`test_launch.py::test_what_cannot_be_is_refused_with_its_reason`"
_PENALTIES = "`test_moved_penalties.py::test_as_if_there_was_no_break`"
_HEADS = {
    "features": "| Feature | Rank retires | Rank dies | | Tests |\n|---|---|---|---|---|\n",
    "endpoints": "| Endpoint | | Why, and what to do |\n|---|---|---|\n",
}


def render(table: str) -> str:
    """The table `features` or `endpoints` as Markdown."""
    if table == "features":
        rows = [_feature_row(feature) for feature in FEATURES]
    else:
        rows = [
            _endpoint_row(endpoint, what)
            for endpoints, what in ((KEPT, "carried out"), (REPLAYED, "carried out, and again"), (REFUSED, "refused"))
            for endpoint in endpoints
        ]
    return _HEADS[table] + "".join(f"{row}\n" for row in rows)


def _feature_row(feature: Feature) -> str:
    where = []
    if feature.refused:
        where += [f"requests: {_REFUSALS}"] if feature.fields else []
        where += [f"requests: {_BEAMS}"] if feature.sampling else []
        where += [f"launch: {_LAUNCHES}"] if feature.flags else []
    else:
        where = [f"{_MOVES} and {_DEATHS}: {', '.join(feature.cases)}"]
        where += [f"these in `make soak`, without overlap; {_PENALTIES}"] if feature.exact_without_overlap else []
    return f"| {feature.name} | {feature.moved} | {feature.died} | {feature.note} | {'; '.join(where)} |"


def _endpoint_row(endpoint: Endpoint, what: str) -> str:
    paths = dict.fromkeys(path for path, _ in endpoint.routes)
    methods = {method for _, methods in endpoint.routes for method in methods}
    # Only there the method matters: another one is a read.
    which = " (PUT, DELETE)" if "DELETE" in methods else ""
    return f"| {', '.join(f'`{path}`' for path in paths)}{which} | {what} | {endpoint.why} |"


def fill(page: str) -> str:
    """The page with both tables between their marks. Raises ValueError where a mark is missing."""
    for table in _HEADS:
        marks = f"<!-- {table} -->", f"<!-- end of {table} -->"
        if any(page.count(mark) != 1 for mark in marks):
            raise ValueError(f"the page needs the lines {' and '.join(marks)} once")
        between = re.compile(f"(?<={marks[0]}\n).*?(?={marks[1]})", re.DOTALL)
        page = between.sub(lambda _, table=table: f"\n{render(table)}\n", page)  # type: ignore[misc]
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elasticmoe_patches.featuredocs", description="Fill in the tables.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("path", type=Path)
    args = parser.parse_args(argv)
    found = args.path.read_text(encoding="utf-8")
    wanted = fill(found)
    if found == wanted:
        return 0
    if args.check:
        print(f"{args.path} differs from the tables in the code: run `make hooks-doc`", file=sys.stderr)
        return 1
    args.path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
