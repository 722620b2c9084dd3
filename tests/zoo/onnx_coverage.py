"""Say in a few numbers what of an exported file can be pruned.

`python -m tests.zoo.onnx_coverage` writes `onnx_coverage.json` anew, and prints a line for each file beside what
`coverage.json` says of the model itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from graphopt.axes.infer import Typing
from graphopt.cost import CostModel
from tests.zoo import ZOO, quiet
from tests.zoo.coverage import COVERAGE as OF_MODULES
from tests.zoo.coverage import coverage
from tests.zoo.onnx_files import EXPORTERS, ExportError, exported

__all__ = ["COVERAGE", "file_coverage"]

COVERAGE = Path(__file__).with_name("onnx_coverage.json")


def file_coverage(typing: Typing) -> dict[str, Any]:
    """Return what `coverage` says, and the share of the multiply-adds that is left where every group is smallest."""
    costs = CostModel(typing)
    smallest = costs.sizes({group.atom: group.least for group in typing.groups})
    return coverage(typing) | {"smallest": round(costs.cost(smallest).macs / costs.cost().macs, 4)}


def main() -> None:
    """Measure the files of the models named, or of all, and update the table."""
    from graphopt.capture import capture
    from graphopt.dialects import infer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = json.loads(COVERAGE.read_text()) if COVERAGE.exists() else {}
    modules = json.loads(OF_MODULES.read_text())
    for name in options.names:
        for exporter in EXPORTERS:
            rows = found.setdefault(exporter, {})
            try:
                with quiet():
                    rows[name] = file_coverage(infer(capture(exported(name, exporter))))
            except ExportError:
                rows.pop(name, None)
                continue
            row = rows[name]
            counts = f"{sum(row['groups'].values())} of {sum(modules[name]['groups'].values())} groups"
            print(name, exporter, counts, f"down to {row['smallest']}", *row["unknown"], flush=True)
            found[exporter] = {each: rows[each] for each in ZOO if each in rows}
            COVERAGE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
