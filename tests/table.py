"""The results tables and figures of README from the summaries and logs of many runs.

    python tests/table.py RUNS_FOLDER [--only NAME*] [--show t1,t2 [--minus NAME]] [--out results/FILE.json] [--plot FILE.png]
                          [--plot-pass FILE.png]

Runs whose folders are called the same but for "-s<seed>" form a row; each number is a mean over seeds with a 95 % interval
(Student's t), in per cent; with --minus the differences to the runs NAME, seed by seed. --out keeps the summaries, one list, as
the raw data behind the table; --plot draws dev accuracy over the iterations, the mean over seeds and the range; --plot-pass draws
pass@k against k, before training and after it. `first_...` of a row is of the rollouts before any update, `last_...` the mean over
the last five iterations.
"""
import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

T = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131), 2))   # 97.5 % points
HIDDEN = ("response_length", "unparsed", "truncated")


def interval(values):
    """Mean and half-width of the 95 % interval of a few values, in per cent."""
    half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def read(path):
    """The summary of a run with its flags and dev curve, without texts and without folders of one machine."""
    info, summary = json.loads((path.parent / "args.json").read_text()), json.loads(path.read_text())
    for when in ("before", "after"):
        summary[when].pop("sample", None)
    log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
    curve = [(r["iteration"], r["dev_accuracy"]) for r in log if "dev_accuracy" in r]
    flags = {k: v for k, v in info["args"].items() if k not in ("out", "model")}
    total = {"total_tokens": record["total_tokens"] for record in log if "total_tokens" in record}           # the last one
    sampled = [r for r in log if r["event"] == "iteration" and "accuracy" in r]
    for k in ("accuracy", "contradictions", "stage_accuracy"):
        total |= {f"first_{k}": r[k] for r in sampled[:1] if k in r}
    for k in ("accuracy", "contradictions"):
        total |= {f"last_{k}": statistics.mean(r[k] for r in sampled[-5:]) for r in sampled[:1] if k in r}
    return summary | {"run": path.parent.name, "args": flags, "commit": info["commit"], "torch": info["torch"], "dev": curve} | total


def row(name, runs, show, minus):
    """A line of a table in Markdown."""
    if show:
        columns = {k: [r["after"][k] for r in runs] for k in show.split(",")}
        for other in minus:                                          # the same seeds in the same order
            assert [r["seed"] for r in runs] == [r["seed"] for r in other]
            columns = {k: [a - r["after"][k] for a, r in zip(v, other)] for k, v in columns.items()}
    else:
        columns = {"before": [r["before"]["accuracy"] for r in runs]}
        columns |= {k: [r["after"][k] for r in runs] for k, v in runs[0]["after"].items()
                    if isinstance(v, float) and k not in HIDDEN and all(k in r["after"] for r in runs)}
        columns |= {"gain": [r["after"]["accuracy"] - r["before"]["accuracy"] for r in runs]}
    return f"| {name} | {len(runs)} | " + " | ".join(f"{'' if show else k + ' '}{interval(v)}" for k, v in columns.items()) + " |"


def plot_curves(groups, path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="accuracy on the dev split", ylim=(0, 1))
    for name, runs in groups.items():
        if runs[0]["dev"]:
            xs = [x for x, _ in runs[0]["dev"]]
            columns = list(zip(*([y for _, y in r["dev"]] for r in runs)))
            line, = axes.plot(xs, [statistics.mean(c) for c in columns], label=f"{name} ({len(runs)} seeds)")
            axes.fill_between(xs, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=100)


def plot_pass(groups, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    for i, prefix in enumerate(("", "hard_")):
        title = f"{prefix.replace('_', ' ')}test problems, mean of seeds"
        axes = figure.add_subplot(1, 2, i + 1, title=title, xlabel="k", ylabel="pass@k")
        for name, runs in groups.items():
            found = {int(k.rpartition("@")[2]): k for k in runs[0]["after"] if re.fullmatch(rf"{prefix}pass@\d+", k)}
            axes.plot(list(found), [statistics.mean(r["after"][k] for r in runs) for k in found.values()], ".-", label=name)
        axes.set_xscale("log", base=2)
        axes.legend()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", default="*", help="runs whose folders match this pattern")
    parser.add_argument("--show", help="metrics after training, joined by commas, as the columns; else all")
    parser.add_argument("--seeds", help="only these, joined by commas")
    parser.add_argument("--minus", help="with --show: the runs to subtract, by name without the seed")
    for flag in ("--out", "--plot", "--plot-pass"):
        parser.add_argument(flag, type=Path)
    args = parser.parse_args()
    groups = defaultdict(list)
    for path in sorted(args.runs.glob(f"{args.only}/summary.json")):
        name, _, seed = path.parent.name.rpartition("-s")
        if not args.seeds or seed in args.seeds.split(","):
            groups[name].append(read(path))
    if args.show:
        print("| runs | seeds | " + args.show.replace(",", " | ") + " |\n" + "|---" * (args.show.count(",") + 3) + "|")
    for name, runs in groups.items():
        if name != args.minus:
            print(row(name, runs, args.show, [groups[args.minus]] if args.minus else []))
    if args.out:
        args.out.write_text("[\n" + ",\n".join(json.dumps(r) for r in sum(groups.values(), [])) + "\n]\n")
    if args.plot:
        plot_curves(groups, args.plot)
    if args.plot_pass:
        plot_pass(groups, args.plot_pass)


if __name__ == "__main__":
    main()
