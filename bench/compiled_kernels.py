"""What Triton's compiler makes of every kernel for devices that are not here, at the shapes of Llama-3.1-8B in bfloat16.

    python bench/compiled_kernels.py [--output bench/results/compiled_kernels.json]

Prints a table, writes the figures as JSON, and ends with 1 if a kernel is beyond its bounds. Needs triton, and no device.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path

from kernel_figures import CAPABILITIES, all_figures, as_row, faults, missing_tool
from kernel_launches import EXAMPLES, example_launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    output = parser.parse_args().output
    if reason := missing_tool():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    wanted = [(name, launch, each) for name in EXAMPLES for launch in example_launches(name) for each in CAPABILITIES]
    found = all_figures([(launch, capability) for _, launch, capability in wanted])
    rows = [{"example": name, **as_row(each)} for (name, _, _), each in zip(wanted, found, strict=True)]
    texts = [[column.replace("_", " ") for column in rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip())
    wrong = [
        fault for (name, launch, _), each in zip(wanted, found, strict=True)
        for fault in faults(each, EXAMPLES[name].bounds[launch.name])
    ]
    for fault in wrong:
        print(f"error: {fault}", file=sys.stderr)
    if output is not None:
        output.write_text(json.dumps({
            "device": "none: compiled only", "date": datetime.date.today().isoformat(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
            "command": f"python {shlex.join(sys.argv)}", "shapes": "Llama-3.1-8B, bfloat16", "results": rows,
        }, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
