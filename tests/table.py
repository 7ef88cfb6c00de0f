"""The results tables and figures of README from the summaries and logs of many runs.

    python tests/table.py RUNS_FOLDER [--only NAME*] [--show t1,t2 [--minus NAME]] [--out results/FILE.json] [--plot FILE.png]
                          [--plot-pass FILE.png]
    python tests/table.py --claims

Runs whose folders are called the same but for "-s<seed>" form a row; each number is a mean over seeds with a 95 % interval
(Student's t), in per cent; with --minus the differences to the runs NAME, seed by seed. --out keeps the summaries, one list, as
the raw data behind the table; --plot draws dev accuracy over the iterations, the mean over seeds and the range; --plot-pass draws
pass@k against k, before training and after it. `first_...` of a row is of the rollouts before any update, `last_...` the mean over
the last five iterations; but `last_...` among what a row has under "after" is a test of the last checkpoint.

--claims judges the claims of results/claims.json by the raw rows in results/evidence-*.json (made by tests/evidence.py), writes
what was found beside them, and from there README's tables between its marks. A verdict is verdict()'s, never a person's.
"""
import argparse
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from matplotlib.figure import Figure

T = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
                    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
                    2.080, 2.074, 2.069), 2))            # 97.5 % points, by number of values
HIDDEN = ("response_length", "unparsed", "truncated")
MARGIN = 0.03                                            # of a claim that two are equal
TIE = 1e-6                                               # shares of problems that are equal, one of them rounded to fp32
ROOT = Path(__file__).parent.parent


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
    flags |= {k: ",".join(Path(name).name for name in flags[k].split(",")) for k in ("train_data", "eval_data") if k in flags}
    total = {"total_tokens": record["total_tokens"] for record in log if "total_tokens" in record}           # the last one
    sampled = [r for r in log if r["event"] == "iteration" and "accuracy" in r]
    for k in ("accuracy", "contradictions", "stage_accuracy"):
        total |= {f"first_{k}": r[k] for r in sampled[:1] if k in r}
    for k in ("accuracy", "contradictions"):
        total |= {f"last_{k}": statistics.mean(r[k] for r in sampled[-5:]) for r in sampled[:1] if k in r}
    made = {name: info[name] for name in ("commit", "clean", "torch")}
    return summary | {"run": path.parent.name, "args": flags} | made | {"dev": curve} | total


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


# ---- claims ------------------------------------------------------------------------------------------------------------------

def sign_test(differences):
    """Two-sided p of as lopsided a split into above and below 0, if both were equally likely; zeros are left out."""
    above, n = sum(d > TIE for d in differences), sum(abs(d) > TIE for d in differences)
    tail = sum(math.comb(n, k) for k in range(max(above, n - above), n + 1)) / 2 ** n
    return min(1.0, 2 * tail)


def verdict(differences, expect):
    """What paired differences by seed say of a claim that they are above 0 (expect ">"), below ("<"), or less than MARGIN away from
    it ("="): {mean, low, high: the 95 % interval (Student's t), above: how many are above 0, p of the sign test, verdict}. Of a
    side: shown if the whole interval lies there and p <= 0.05, contradicted if both hold of the other side. Of "=": shown if the
    whole interval lies within the margin, contradicted if all of it lies outside, on one side. All else is not shown."""
    n, mean, p = len(differences), statistics.mean(differences), sign_test(differences)
    half = T[n] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    low, high = mean - half, mean + half
    if expect == "=":
        shown, contradicted = -MARGIN < low and high < MARGIN, low > MARGIN or high < -MARGIN
    else:
        above, below = low > 0 and p <= 0.05, high < 0 and p <= 0.05
        shown, contradicted = (above, below) if expect == ">" else (below, above)
    return {"seeds": n, "mean": mean, "low": low, "high": high, "above": sum(d > TIE for d in differences), "p": p,
            "verdict": "shown" if shown else "contradicted" if contradicted else "not shown"}


def value(row, metric):
    """A number of a row: of after training, "before." in front: of the warm-up; "a - b": a difference of two."""
    first, _, second = metric.partition(" - ")
    moment, name = ("before", first[7:]) if first.startswith("before.") else ("after", first)
    return row[moment][name] - value(row, second) if second else row[moment][name]


def frontier(points, low=0.95):
    """The mean, over levels of accuracy from low to 1, of the best coverage that a point (accuracy, coverage) of at least this
    accuracy has; 0 where there is none. So a form of regularisation is judged by all its settings at once."""
    area, best, level = 0.0, 0.0, 1.0
    for accuracy, coverage in sorted(points, reverse=True):          # the best of those that reach it, from the top down
        area, level = area + best * (level - max(accuracy, low)), max(accuracy, low)
        best = max(best, coverage)
    return (area + best * (level - low)) / (1 - low)


def differences(claim, rows):
    """{seed: claim["metric"] of arm "a" minus that of arm "b"} over the seeds that have both; without "b" the metric itself, and
    with "a2" and "b2" minus the same difference of those. A list of arms has one number, the frontier of two metrics."""
    by_arm = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    sides = [(claim[key] if isinstance(claim[key], list) else [claim[key]], sign)
             for key, sign in (("a", 1), ("b", -1), ("a2", -1), ("b2", 1)) if key in claim]
    seeds = set.intersection(*(set(by_arm[arm]) for arms, _ in sides for arm in arms))

    def number(arms, seed):
        found = [by_arm[arm][seed] for arm in arms]
        if claim["metric"].startswith("frontier "):
            metrics = claim["metric"].removeprefix("frontier ").split(", ")
            return frontier([[value(row, metric) for metric in metrics] for row in found])
        return value(*found, claim["metric"])

    return {seed: sum(sign * number(arms, seed) for arms, sign in sides) for seed in sorted(seeds)}


def holds(gate, x):
    """Whether a number that a gate looks at lies within it; None, of no cases, does not."""
    return x is not None and gate["low"] <= x <= gate["high"]


def judge(claims, evidence):
    """Fills in what the rows {script: [...]} say of each claim and each gate. A claim without arms was not tried; one without
    rows was not run. `comparisons`: how many claims the rows of its script are asked about."""
    for claim in claims["claims"]:
        script = claim["script"]
        claim["found"] = {"verdict": "not tried"}
        if "a" in claim:
            found = differences(claim, evidence.get(script, []))
            claim["found"] = verdict(list(found.values()), claim["expect"]) if found else {"verdict": "not run"}
            claim["found"]["comparisons"] = sum(c["script"] == script and "a" in c for c in claims["claims"])
    for gate in claims["gates"]:
        rows = [row for row in evidence.get(gate["script"], []) if row["arm"] == gate["arm"]]
        if "b" in gate:
            found = differences(gate, evidence.get(gate["script"], []))
        else:
            found = {row["seed"]: value(row, gate["metric"]) for row in rows}
        gate["found"] = {"seeds": len(found), "failed": sorted(seed for seed, x in found.items() if not holds(gate, x))}
    return claims


def registered(claim):
    """How many seeds are registered for a claim: as many as the fewest of its arms."""
    from evidence import ARMS                                        # which imports this file
    sides = [claim[key] for key in ("a", "b", "a2", "b2") if key in claim]
    return min(ARMS[claim["script"]][arm][0] for side in sides for arm in (side if isinstance(side, list) else [side]))


def claim_rows(claims):
    """README's table of claims and the line of its gates, in Markdown. A verdict on a part of the registered seeds says so."""
    def number(claim, name):
        return f"{100 * claim['found'][name]:.1f}"

    lines = ["| paper | claim | the paper's number | ours, points (95 %) | seeds above 0, p | verdict | comparisons |",
             "|---" * 7 + "|"]
    for claim in claims["claims"]:
        ours, signs, judged = "-", "-", claim["found"]["verdict"]
        if "mean" in claim["found"]:
            ours = f"{claim['compared']}: {number(claim, 'mean')} ({number(claim, 'low')} to {number(claim, 'high')})"
            signs = f"{claim['found']['above']} of {claim['found']['seeds']}, {claim['found']['p']:.2g}"
            if claim["found"]["seeds"] < registered(claim):
                judged += f" on {claim['found']['seeds']} of {registered(claim)} seeds"
        lines.append(f"| {claim['paper']} {claim['id']} | {claim['claim']} | {claim['paper_number']} | {ours} | {signs} | "
                     f"{judged} | {claim['found'].get('comparisons', '-')} |")
    failed = [f"{gate['name']}: {len(gate['found']['failed'])} of {gate['found']['seeds']} seeds "
              f"({', '.join(map(str, gate['found']['failed']))})"
              for gate in claims["gates"] if gate["found"]["failed"]]
    tried = sum(gate["found"]["seeds"] > 0 for gate in claims["gates"])
    part = sum(0 < gate["found"]["seeds"] < registered({"a": gate["arm"]} | gate) for gate in claims["gates"])
    verdicts = Counter(claim["found"]["verdict"] for claim in claims["claims"])
    counted = ", ".join(f"{verdicts[name]} {name}" for name in ("shown", "not shown", "contradicted", "not run", "not tried"))
    gates = (f"Gates: {tried} of {len(claims['gates'])} looked at, {part} of them on a part of the seeds; "
             f"failed: {len(failed) or 'none'}.")
    return "\n".join([*lines, "", f"Verdicts: {counted}.", "", gates, ""] + [f"- {text}" for text in failed])


def evidence():
    """{script: rows} of results/evidence-*.json."""
    return {path.stem.removeprefix("evidence-"): json.loads(path.read_text())
            for path in sorted(ROOT.glob("results/evidence-*.json"))}


# what README's table of a script's arms shows: {heading: metric of a row}
COLUMNS = {
    "ppo_reft": {"warm-up": "before.accuracy", "after": "accuracy", "last checkpoint": "last_accuracy", "vote of 16": "vote_16",
                 "reranked, of 16": "rerank_16"},
    "r3": {"warm-up": "before.accuracy", "after": "accuracy", "last checkpoint": "last_accuracy"},
    "score": {"t1": "t1", "t2": "t2", "delta": "delta", "c->i": "c->i", "changed": "changed", "t2 on the base's y1": "fixed_t2",
              "t2, y1 of another question": "swapped_t2", "mended, shown": "mended_shown", "last t1": "last_t1",
              "last t2": "last_t2"},
    "prl": {"avg@64": "last_avg@64", "hard avg@64": "last_hard_avg@64", "hard pass@8": "last_hard_pass@8",
            "hard pass@64": "last_hard_pass@64", "chosen: avg@64": "avg@64", "hard pass@8 of it": "hard_pass@8"},
}
DECIDES = {"ppo_reft": "accuracy", "r3": "accuracy", "score": "t2", "prl": "last_hard_pass@8"}       # shown seed by seed as well


def cell(rows, metric):
    """Mean and interval over the seeds in per cent; the range of the seeds where that would leave 0 to 100, where a seed is above
    98, which an interval of means would hide, or of fewer than 3."""
    moment, name = ("before", metric[7:]) if metric.startswith("before.") else ("after", metric)
    found = [row[moment][name] for row in rows if row[moment].get(name) is not None]
    if not found:
        return "-"
    mean, signed = statistics.mean(found), min(found) < 0
    half = T[len(found)] * statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 2 else math.inf
    if signed or 0 <= mean - half and mean + half <= 1 and max(found) <= 0.98:
        return interval(found)
    return f"{100 * mean:.1f} ({100 * min(found):.1f} to {100 * max(found):.1f})" if len(found) > 1 else f"{100 * mean:.1f}"


def arm_rows(script, rows):
    """README's table of the arms of a script, in Markdown."""
    name, arms = script.partition("-")[0], dict.fromkeys(row["arm"] for row in rows)
    columns = COLUMNS[name]
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        lines.append(f"| {arm} | {len(mine)} | " + " | ".join(cell(mine, metric) for metric in columns.values()) + " |")
    return "\n".join(lines + mean_frontiers(rows) * (script == "prl") + seed_rows(rows, DECIDES[name]))


def seed_rows(rows, metric):
    """Below that table, folded: one number of each arm, seed by seed, in per cent."""
    seeds, found = sorted({row["seed"] for row in rows}), defaultdict(dict)
    for row in rows:
        found[row["arm"]][row["seed"]] = f"{100 * row['after'][metric]:.1f}"
    lines = [f"| {arm} | " + " | ".join(of.get(seed, "-") for seed in seeds) + " |" for arm, of in found.items()]
    return ["", f"<details><summary>{metric} of each seed</summary>", "", f"| arm | {' | '.join(map(str, seeds))} |",
            "|---" * (len(seeds) + 1) + "|", *lines, "", "</details>"]


def mean_frontiers(rows):
    """Below the table of prl.py's arms: the frontiers of the settings' means over seeds, which no best of noisy settings lifts."""
    found = []
    for form in "prl", "loss", "reward":
        arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm.startswith(form + "-")]
        means = [{metric: statistics.mean(row["after"][metric] for row in rows if row["arm"] == arm)
                  for metric in ("last_avg@64", "last_hard_pass@8", "last_hard_pass@64")} for arm in arms]
        numbers = [100 * frontier([(mean["last_avg@64"], mean[f"last_hard_pass@{k}"]) for mean in means]) for k in (8, 64)]
        found.append(f"{form} ({len(arms)} settings) {numbers[0]:.1f} and {numbers[1]:.1f}")
    return ["", "Frontiers of the means over seeds, of hard pass@8 and pass@64, not registered:", "; ".join(found) + "."]


def marks(name):
    """What stands before and behind a table in README that `write_claims` makes."""
    return f"<!-- {name}: by `python tests/table.py --claims` -->\n", f"\n<!-- end of {name} -->"


def write_claims():
    """results/claims.json, the figures of the registered runs, and README's tables of claims and of arms, anew."""
    path, readme = ROOT / "results/claims.json", ROOT / "README.md"
    rows, text = evidence(), readme.read_text()
    claims = judge(json.loads(path.read_text()), rows)
    path.write_text(json.dumps(claims, indent=1) + "\n")
    made = {"claims": claim_rows(claims)} | {script: arm_rows(script, found) for script, found in rows.items()}
    for name, table in made.items():
        first, last = marks(name)
        before, after = text.partition(first)[0], text.partition(last)[2]
        text = before + first + table + last + after
    readme.write_text(text)
    for script, found in rows.items():
        picture = ROOT / f"results/evidence-{script}.png"
        arms = list(dict.fromkeys(row["arm"] for row in found if len(row["dev"]) > 1))[:8]
        if script == "prl":
            plot_frontier(found, picture)
        elif arms:                                                   # a file may hold bases only, which have no curve
            plot_curves({arm: [row for row in found if row["arm"] == arm] for arm in arms}, picture)


# ---- figures -----------------------------------------------------------------------------------------------------------------

def plot_curves(groups, path):
    """A panel for each group of runs: each seed, for a mean of seeds that learn and seeds that do not is neither, the mean, the
    range."""
    groups = {name: runs for name, runs in groups.items() if runs[0]["dev"]}
    columns = min(4, len(groups))
    figure = Figure(figsize=(1 + 2.6 * columns, 2.5 * math.ceil(len(groups) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(groups) / columns), columns, sharey=True, squeeze=False).flatten()
    for axes, (name, runs) in zip(panels, groups.items()):
        xs, curves = [x for x, _ in runs[0]["dev"]], [[100 * y for _, y in run["dev"]] for run in runs]
        at = list(zip(*curves))
        axes.plot(xs, list(zip(*curves)), color="C0", linewidth=0.5)
        axes.plot(xs, [statistics.mean(values) for values in at], color="C0", linewidth=2)
        axes.fill_between(xs, list(map(min, at)), list(map(max, at)), alpha=0.15)
        axes.set(title=f"{name}: {len(runs)} seeds", ylim=(0, 102))
    for axes in panels[len(groups):]:
        axes.set_axis_off()
    figure.supxlabel("iteration")
    figure.supylabel("dev accuracy, %")
    figure.savefig(path, dpi=100)


def plot_frontier(rows, path):
    """Accuracy against coverage of the last checkpoints, per cent, with their 95 % intervals over the seeds: a line for each form
    of the KL through its settings, from the weakest to the strongest."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for i, k in enumerate((8, 64)):
        axes = figure.add_subplot(1, 2, i + 1, xlabel="avg@64 on problems like the training's, %", ylabel=f"hard pass@{k}, %")
        for form in "base", "grpo", "raft", "prl", "loss", "reward":
            arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm.partition("-")[0] == form]
            arms.sort(key=lambda arm: float(arm.partition("-")[2] or 0), reverse=form != "loss")
            found = [[verdict([100 * row["after"][metric] for row in rows if row["arm"] == arm], ">")
                      for metric in ("last_avg@64", f"last_hard_pass@{k}")] for arm in arms]
            if arms:
                x, y = [[point["mean"] for point in axis] for axis in zip(*found)]
                errors = [[point["mean"] - point["low"] for point in axis] for axis in zip(*found)]
                line, *_ = axes.errorbar(x, y, errors[1], errors[0], marker="o", label=form, elinewidth=0.5)
                for arm, point in zip(arms, zip(x, y)):
                    axes.annotate(arm.partition("-")[2], point, (4, 4), textcoords="offset points", fontsize="small",
                                  color=line.get_color())
        axes.set(xlim=(None, 100), ylim=(0, 102))
        axes.legend(loc="lower left")
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
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--claims", action="store_true",
                        help="judge the claims, and write them into results/claims.json and README")
    parser.add_argument("--only", default="*", help="runs whose folders match this pattern")
    parser.add_argument("--show", help="metrics after training, joined by commas, as the columns; else all")
    parser.add_argument("--seeds", help="only these, joined by commas")
    parser.add_argument("--minus", help="with --show: the runs to subtract, by name without the seed")
    for flag in ("--out", "--plot", "--plot-pass"):
        parser.add_argument(flag, type=Path)
    args = parser.parse_args()
    if args.claims:
        return write_claims()
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
