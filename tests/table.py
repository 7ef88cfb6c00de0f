"""The results tables and figures of README from the summaries and logs of many runs.

    python tests/table.py RUNS_FOLDER [--out results/FILE.json] [--plot results/FILE.png]

Runs whose folders are called the same but for "-s<seed>" form a row; each number is a mean over seeds with a 95 % interval
(Student's t), in per cent. --out keeps the summaries, one list, as the raw data behind the table; --plot draws dev accuracy over the
iterations, the mean over seeds and the range.
"""
import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}   # 97.5 % points by n
HIDDEN = ("response_length", "unparsed", "truncated")


def interval(values):
    """Mean and half-width of the 95 % interval of a few values, in per cent."""
    half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    groups = defaultdict(list)
    for path in sorted(args.runs.glob("*/summary.json")):
        info, summary = json.loads((path.parent / "args.json").read_text()), json.loads(path.read_text())
        for when in ("before", "after"):
            summary[when].pop("sample", None)
        log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        curve = [(r["iteration"], r["dev_accuracy"]) for r in log if "dev_accuracy" in r]
        info["args"] = {k: v for k, v in info["args"].items() if k not in ("out", "model")}      # folders of one machine
        summary |= {"run": path.parent.name, "args": info["args"], "commit": info["commit"], "torch": info["torch"], "dev": curve}
        groups[path.parent.name.rpartition("-s")[0]].append(summary)

    for name, runs in groups.items():
        columns = {"before": [r["before"]["accuracy"] for r in runs]}
        columns |= {k: [r["after"][k] for r in runs] for k, v in runs[0]["after"].items()
                    if isinstance(v, float) and k not in HIDDEN and any(r["after"][k] for r in runs)}
        columns |= {"gain": [r["after"]["accuracy"] - r["before"]["accuracy"] for r in runs]}
        print(f"| {name} | {len(runs)} | " + " | ".join(f"{k} {interval(v)}" for k, v in columns.items()) + " |")
    if args.out:
        args.out.write_text("[\n" + ",\n".join(json.dumps(r) for r in sum(groups.values(), [])) + "\n]\n")
    if args.plot:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="iteration", ylabel="greedy accuracy on the dev split", ylim=(0, 1))
        for name, runs in groups.items():
            xs = [x for x, _ in runs[0]["dev"]]
            columns = list(zip(*([y for _, y in r["dev"]] for r in runs)))
            line, = axes.plot(xs, [statistics.mean(c) for c in columns], label=f"{name} ({len(runs)} seeds)")
            axes.fill_between(xs, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.2)
        axes.legend()
        figure.savefig(args.plot, dpi=100)


if __name__ == "__main__":
    main()
