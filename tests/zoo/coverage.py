"""Say in a few numbers what of a model can be pruned: `python -m tests.zoo.coverage` writes `coverage.json` anew."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from graphopt.axes.infer import Typing

__all__ = ["COVERAGE", "coverage"]

COVERAGE = Path(__file__).with_name("coverage.json")


def coverage(typing: Typing) -> dict[str, Any]:
    """Return the free groups by role, those of them normalised over, frozen dimensions by reason, unknown operators."""
    frozen = Counter(reason.text for _, reason in typing.frozen())
    return {
        "groups": dict(sorted(Counter(group.role for group in typing.groups).items())),
        "normalised": sum(bool(group.normalised) for group in typing.groups),
        "frozen": dict(sorted(frozen.items())),
        "unknown": sorted({str(node.target) for node in typing.unknown}),
    }


def main(names: list[str]) -> None:
    """Measure the named models, or all, and update the file."""
    from graphopt.capture import capture
    from graphopt.dialects.aten import infer
    from tests.zoo import ZOO

    found = json.loads(COVERAGE.read_text()) if COVERAGE.exists() else {}
    for name in names or ZOO:
        found[name] = coverage(infer(capture(ZOO[name].build(), ZOO[name].inputs())))
        print(name, found[name], flush=True)
        COVERAGE.write_text(json.dumps({n: found[n] for n in ZOO if n in found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
