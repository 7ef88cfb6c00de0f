"""The results table of README from the summaries of many runs.

    python tests/table.py RUNS_FOLDER [--out results/FILE.json]

Runs are grouped by script and method and by the part of the folder's name before "-s<seed>"; each number is a mean over seeds with
a 95 % interval (Student's t), in per cent. --out keeps the summaries themselves, one list, as the raw data behind the table.
"""
import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}   # 97.5 % points, n - 1 degrees


def interval(values):
    """Mean and half-width of the 95 % interval of a few values."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    groups = defaultdict(list)
    for path in sorted(args.runs.glob("*/summary.json")):
        flags = json.loads((path.parent / "args.json").read_text())["args"]
        summary = json.loads(path.read_text())
        for when in ("before", "after"):
            summary[when].pop("sample", None)
        groups[path.parent.name.rpartition("-s")[0]].append(summary | {"run": path.parent.name, "flags": flags})
    for name, runs in groups.items():
        columns = {"before": [r["before"]["accuracy"] for r in runs]}
        columns |= {k: [r["after"][k] for r in runs] for k, v in runs[0]["after"].items() if isinstance(v, float)}
        columns |= {"gain": [r["after"]["accuracy"] - r["before"]["accuracy"] for r in runs]}
        cells = [f"{k} {100 * m:.1f} ± {100 * w:.1f}" for k, (m, w) in ((k, interval(v)) for k, v in columns.items())
                 if k not in ("response_length", "unparsed", "truncated")]
        print(f"{name} ({len(runs)} seeds): " + ", ".join(cells))
    if args.out:
        args.out.write_text(json.dumps(sum(groups.values(), []), indent=0))


if __name__ == "__main__":
    main()
