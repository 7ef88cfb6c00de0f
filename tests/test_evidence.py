"""The claims: the rule for a verdict, the registered arms, the driver that runs them, and README against the files."""
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import evidence
import table
from processes import ROOT, fork, run_script

CLAIMS = json.loads((ROOT / "results/claims.json").read_text())


# ---- the verdict -------------------------------------------------------------------------------------------------------------

def test_sign_test():
    assert table.sign_test([1] * 5) == 2 / 32 and table.sign_test([-1] * 5) == 2 / 32
    assert table.sign_test([1] * 13 + [-1] * 3) == pytest.approx(0.021271, abs=1e-6)           # by hand: 2 * 697 / 2^16
    assert table.sign_test([1] * 8 + [-1] * 8) == 1 and table.sign_test([0, 0, 0]) == 1
    assert table.sign_test([0] * 9 + [1] * 5) == 2 / 32                                        # zeros say nothing
    fp32 = torch.tensor(0.995).item() - 0.995                        # as of vote_16, a mean in fp32, and accuracy, one of Python
    assert fp32 > 0 and table.sign_test([fp32] * 9 + [1] * 5) == 2 / 32 and table.verdict([fp32, 0.1], ">")["above"] == 1


def test_the_interval_is_students():
    found = table.verdict([0.1, 0.2, 0.3, 0.4], ">")
    half = 3.182 * 0.129099 / 2                                                                # t of 3 degrees, s, root of n
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=1e-5)
    assert found["seeds"] == found["above"] == 4 and found["p"] == 2 / 16


@pytest.mark.parametrize("values, expect, verdict", [
    ([0.1, 0.2] * 4, ">", "shown"), ([0.1, 0.2] * 4, "<", "contradicted"), ([-0.1, -0.2] * 4, ">", "contradicted"),
    ([-0.1, -0.2] * 4, "<", "shown"), ([0.1, -0.1] * 4, ">", "not shown"), ([0.1, -0.1] * 4, "<", "not shown"),
    ([0.1, 0.2, 0.1, 0.2], ">", "not shown"),                        # four seeds: an interval above 0, and p = 0.125
    ([0.01] * 5 + [0.011] * 5 + [-0.001] * 6, ">", "not shown"),     # ten of sixteen: p = 0.45
    ([0.02] * 14 + [-0.9, -0.9], ">", "not shown"),                  # fourteen of sixteen, and an interval around 0
    ([0.3], ">", "not shown"), ([0.0] * 8, ">", "not shown"),
    ([0.01, -0.01] * 4, "=", "shown"), ([0.0] * 8, "=", "shown"), ([0.1, 0.2] * 4, "=", "contradicted"),
    ([-0.1, -0.2] * 4, "=", "contradicted"), ([0.02, 0.05] * 4, "=", "not shown"), ([0.2, -0.2] * 4, "=", "not shown")])
def test_verdicts(values, expect, verdict):
    assert table.verdict(values, expect)["verdict"] == verdict


def rows_of(**arms):
    return [{"arm": arm.replace("_", "-"), "seed": seed, "before": {"accuracy": 0.1}, "after": {"accuracy": x, "t1": 0.5}}
            for arm, xs in arms.items() for seed, x in xs.items()]


def test_differences_are_paired_by_seed():
    rows = rows_of(a={1: 0.9, 2: 0.8, 3: 0.5}, b={3: 0.1, 2: 0.2, 9: 0.7}, c={2: 0.6, 3: 0.5}, d={2: 0.5, 3: 0.6})
    close = lambda claim, expected: table.differences(claim, rows) == pytest.approx(expected)
    assert close({"a": "a", "b": "b", "metric": "accuracy"}, {2: 0.6, 3: 0.4})
    assert close({"a": "a", "b": "b", "a2": "c", "b2": "d", "metric": "accuracy"}, {2: 0.5, 3: 0.5})
    assert close({"a": "a", "metric": "accuracy - t1"}, {1: 0.4, 2: 0.3, 3: 0.0})
    assert close({"a": "a", "metric": "before.accuracy"}, {1: 0.1, 2: 0.1, 3: 0.1})


def test_the_frontier_by_hand():
    points = [(0.99, 0.3), (0.97, 0.5), (0.98, 0.2), (0.9, 0.8)]     # the third is below another, the fourth off the scale
    assert table.frontier(points) == pytest.approx((0.3 * 0.02 + 0.5 * 0.02) / 0.05)
    assert table.frontier([(1.0, 0.4), (1.0, 0.6)]) == pytest.approx(0.6) and table.frontier([(0.94, 1.0)]) == 0
    levels = [0.95 + 0.05 * (i + 0.5) / 10000 for i in range(10000)]
    best = [max((cover for accuracy, cover in points if accuracy >= level), default=0) for level in levels]
    assert table.frontier(points) == pytest.approx(sum(best) / len(best), abs=1e-4)


def test_frontiers_of_means_by_hand():
    points = {"prl-1": ((0.96, 0.4), (0.98, 0.6)), "prl-3": ((0.99, 0.2), (1.0, 0.4)),
              "loss-1": ((0.9, 0.9),), "reward-1": ((1.0, 1.0),)}
    rows = [{"arm": arm, "seed": seed, "after": {"last_avg@64": x, "last_hard_pass@8": y, "last_hard_pass@64": y / 2}}
            for arm, found in points.items() for seed, (x, y) in enumerate(found)]
    by_hand = 100 * (0.3 * 0.025 + 0.5 * 0.02) / 0.05                # prl-1: 97, 50; prl-3: 99.5, 30
    assert table.mean_frontiers(rows)[-1] == (
        f"prl (2 settings) {by_hand:.1f} and {by_hand / 2:.1f}; loss (1 settings) 0.0 and 0.0; reward (1 settings) 100.0 and 50.0.")


def test_frontiers_are_paired_by_seed():
    rows = [{"arm": arm, "seed": seed, "before": {}, "after": {"x": x, "y": y + seed / 100}}
            for arm, x, y in (("p", 0.99, 0.3), ("q", 0.96, 0.5), ("r", 0.98, 0.4)) for seed in range(3 if arm == "q" else 4)]
    claim = {"a": ["p", "q"], "b": ["r"], "metric": "frontier x, y", "expect": ">"}
    expected = (0.3 * 0.03 + 0.5 * 0.01 - 0.4 * 0.03) / 0.05         # the seed adds to both up to the level 0.98, then to p
    assert table.differences(claim, rows) == pytest.approx({seed: expected + seed / 100 * 0.01 / 0.05 for seed in range(3)})


def test_judging_counts_comparisons_and_names_seeds_that_fail_a_gate():
    claim = lambda script, **arms: {"script": script, **arms, "metric": "accuracy", "expect": ">"}
    gate = {"script": "r3", "arm": "a", "metric": "accuracy", "low": 0.5, "high": 1}
    claims = {"claims": [claim("r3", a="a", b="b"), claim("r3", a="b", b="a"), {"script": "r3"}, claim("prl", a="a")],
              "gates": [gate, gate | {"a": "a", "b": "b", "low": 0.3}]}
    rows = rows_of(a={seed: 0.9 - seed / 10 for seed in range(8)}, b={seed: 0.1 for seed in range(8)})
    judged = table.judge(claims, {"r3": rows})
    assert [c["found"]["verdict"] for c in judged["claims"]] == ["shown", "contradicted", "not tried", "not run"]
    assert [c["found"].get("comparisons") for c in judged["claims"]] == [2, 2, None, 1]
    assert judged["gates"][0]["found"] == {"seeds": 8, "failed": [5, 6, 7]}
    assert judged["gates"][1]["found"] == {"seeds": 8, "failed": [6, 7]}


def test_seeds_that_pass_all_gates_of_their_base_go_on():
    row = lambda seed, changed, mended, delta=0.0, arm="base": {
        "arm": arm, "seed": seed, "before": {"sampled_changed": changed, "sampled_mended": mended}, "after": {"delta": delta}}
    rows = [row(9, 0.1, 0.2), row(3, 0.1, 0.2), row(4, 0.2, 0.2), row(5, 0.1, None), row(6, 0.1, 0.2, 0.02),
            row(7, 0.1, 0.2, arm="star")]
    assert evidence.passing("score-2", rows) == [3, 9] and evidence.passing("score-2", rows[2:]) == []


def test_a_verdict_on_a_part_of_the_seeds_says_so():
    claim = {"script": "r3", "paper": "R3", "id": "C1", "claim": "c", "paper_number": "-", "compared": "d",
             "a": "r3-8", "b": "rl-12", "metric": "accuracy", "expect": ">"}
    gate = {"script": "r3", "name": "g", "arm": "r3-8", "metric": "accuracy", "low": 0, "high": 0.5}

    def made(seeds):
        rows = rows_of(r3_8={seed: 0.9 for seed in range(seeds)}, rl_12={seed: 0.1 for seed in range(seeds)})
        return table.claim_rows(table.judge({"claims": [dict(claim)], "gates": [dict(gate)]}, {"r3": rows}))

    assert "| shown on 6 of 8 seeds | 1 |" in made(6) and "g: 6 of 6 seeds (0, 1, 2, 3, 4, 5)" in made(6)
    assert "\nVerdicts: 1 shown, 0 not shown, 0 contradicted, 0 not run, 0 not tried.\n" in made(6)
    assert "| shown | 1 |" in made(8)                                # so many are registered for rl-12


# ---- what is written down ----------------------------------------------------------------------------------------------------

def test_claims_name_registered_arms_and_cover_the_four_pages():
    for entry in CLAIMS["claims"] + CLAIMS["gates"]:
        arms = evidence.ARMS.get(entry["script"], {})
        named = [entry[key] for key in ("a", "b", "a2", "b2", "arm") if key in entry]
        assert arms.keys() >= set(sum([x if isinstance(x, list) else [x] for x in named], [])), entry
    ids = {paper: {c["id"] for c in CLAIMS["claims"] if c["paper"] == paper} for paper in ("ReFT", "R3", "SCoRe", "PRL")}
    assert ids == {paper: {f"C{i}" for i in range(1, n + 1)} for paper, n in (("ReFT", 10), ("R3", 8), ("SCoRe", 12), ("PRL", 8))}


def test_the_registration_lists_every_arm_comparison_and_gate():
    text = (ROOT / "results/PREREGISTRATION.md").read_text()
    for script, arms in evidence.ARMS.items():
        section = text.partition(f"\n## {script}" + (":" if "-" in script else ".py\n"))[2].partition("\n## ")[0]
        listed = dict((arm, (int(seeds), flags))
                      for arm, seeds, flags in re.findall(r"^\| `([\w.-]+)` \| (\d+) \| `([^`]*)`", section, re.M))
        assert listed == {arm: (seeds, flags or "-") for arm, (seeds, flags) in arms.items()}, script
        for claim in CLAIMS["claims"]:
            if claim["script"] == script and "a" in claim:
                margin = ", within 3 points" if claim["expect"] == "=" else ""
                line = f"| {claim['id']} | {claim['compared']} {claim['expect']} 0{margin} | `{claim['metric']}` |\n"
                assert section.count(line) == 1, line
        for gate in CLAIMS["gates"]:
            if gate["script"] == script:
                name = gate["name"].partition(": ")[2]
                assert f"- {name} (`{gate['arm']}`, `{gate['metric']}`)\n" in section, gate
                how, least, most = re.search(r"(?:(at most|within|in) )?(?:(\d+) to )?(\d+) (?:%|points?\b)", name).groups()
                low = least or {"at most": 0, "within": "-" + most, "in": most}[how]
                bounds = int(low), 100 if how == "in" else int(most)
                assert bounds == (round(100 * gate["low"]), round(100 * gate["high"])), gate


def test_readme_and_claims_say_what_the_rows_say():
    judged = table.judge(json.loads(json.dumps(CLAIMS)), table.evidence())
    assert judged == CLAIMS                                          # else run python tests/table.py --claims
    text, rows = (ROOT / "README.md").read_text(), table.evidence()
    tables = {"claims": table.claim_rows(CLAIMS)} | {script: table.arm_rows(script, found) for script, found in rows.items()}
    for name, made in tables.items():
        first, last = table.marks(name)
        assert text.count(first) == text.count(last) == 1
        assert text.partition(first)[2].partition(last)[0] == made


def test_a_cell_near_0_or_100_gives_the_range_of_the_seeds():
    rows = lambda *values: [{"before": {"accuracy": 0.5}, "after": {"x": x}} for x in values]
    assert table.cell(rows(0.5, 0.6, 0.7), "x") == "60.0 ± 24.8"                               # t 4.303, s 10, root of 3
    assert table.cell(rows(0.9, 1.0, 0.2), "x") == "70.0 (20.0 to 100.0)"
    assert table.cell(rows(*[1.0] * 12, *[0.1] * 4), "x") == "77.5 (10.0 to 100.0)"            # 77.5 ± 21.5 would be no seed's
    assert table.cell(rows(0.5, 0.6), "x") == "55.0 (50.0 to 60.0)" and table.cell(rows(0.5), "x") == "50.0"
    assert table.cell(rows(-0.1, 0.0, 0.1), "x") == "0.0 ± 24.8"
    assert table.cell(rows(None, None), "x") == table.cell(rows(1), "y") == "-" and table.cell(rows(1), "before.accuracy") == "50.0"


def test_each_seed_has_its_column():
    made = table.seed_rows(rows_of(a={101: 0.25, 100: 0.9}, b={101: 1.0}), "accuracy")
    assert made[3:7] == ["| arm | 100 | 101 |", "|---|---|---|", "| a | 90.0 | 25.0 |", "| b | - | 100.0 |"]
    assert made[1] == "<details><summary>accuracy of each seed</summary>" and made[-1] == "</details>"


def test_rows_that_count_are_of_one_clean_commit():
    for script, rows in table.evidence().items():
        assert len({(row["commit"], row["code"], row["torch"]) for row in rows}) == 1 and all(row["commit"] for row in rows), script
        assert len({(row["arm"], row["seed"]) for row in rows}) == len(rows), script
        assert all(row["clean"] is not False for row in rows), script          # None: made from a copy without .git
        assert digest_at(script, rows[0]["commit"]) in (rows[0]["code"], None), script
        for row in rows:
            count, flags = evidence.ARMS[script][row["arm"]]
            flags = [*flags.split(), "--device", "cpu"]
            if row["arm"] != "base" and "--warmup-epochs" not in flags:
                flags += ["--model", "x", "--warmup-epochs", "0"]                  # the base's
            if row["args"]["train_data"]:
                flags += ["--model", "x", "--train-data", row["args"]["train_data"], "--eval-data", row["args"]["eval_data"]]
            asked = vars(__import__(script.partition("-")[0]).parse_args(flags))
            other = {name: x for name, x in row["args"].items() if asked.get(name, x) != x}.keys() - {"seed", "resume", "device"}
            first = evidence.FIRST.get(script, 100)
            seeds = (evidence.passing(script, rows) if script in evidence.GATED and row["arm"] != "base"
                     else range(first, first + count))
            assert not other and row["seed"] in seeds[:count], (script, row["arm"], row["seed"], other)


def digest_at(script, commit):
    """evidence.digest() of the code of a commit; None where git is not there or does not know it."""
    git = lambda *argv: subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, check=True).stdout
    try:
        kernels = sorted(name for name in git("ls-tree", "--name-only", commit, "kernels/").decode().split()
                         if name.endswith(".py"))
        texts = [git("show", f"{commit}:{name}") for name in (f"{script.partition('-')[0]}.py", "model.py", *kernels)]
    except (OSError, subprocess.CalledProcessError):
        return None
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def test_the_digest_is_that_of_the_commit():
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=ROOT).returncode
    assert changed or digest_at("r3", "HEAD") == evidence.digest("r3") != evidence.digest("prl")


# ---- the driver --------------------------------------------------------------------------------------------------------------

TINY = ("--train-size 64 --warmup-batch-size 8 --batch-size 8 --minibatch-size 8 --micro-batch-size 4 --max-new-tokens 12 "
        "--eval-size 4 --n-layer 1 --n-embd 16 --n-head 2")


class Forked:
    """What subprocess.Popen of a script gives, as a fork; when one of those named in STOP_AT logs an iteration the driver gets a
    SIGTERM."""
    STOP_AT = []

    def __init__(self, argv, stdout, stderr, cwd, env):
        assert argv[0] == sys.executable and stdout is stderr and cwd == ROOT and env["OMP_NUM_THREADS"] == "1"
        self.log = Path(argv[argv.index("--out") + 1]) / "log.jsonl"
        self.process = fork(run_script, Path(argv[1]).stem, argv[2:], cwd, env, [stdout.name] * 2, False)
        self.process.start()

    def poll(self):
        if self.log.parent.name in self.STOP_AT and self.log.exists() and '"iteration"' in self.log.read_text():
            self.STOP_AT.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return self.process.exitcode

    returncode = property(lambda self: self.process.exitcode)
    terminate = property(lambda self: self.process.terminate)
    wait = property(lambda self: self.process.join)


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """A function that runs the driver with some flags, and returns how it exits."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(subprocess, "Popen", Forked)

    def driven(*flags):
        argv = ["evidence.py", "r3", "--out", tmp_path / "rows.json", "--runs", tmp_path / "runs", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as ended:
            evidence.main()
        return ended.value.code
    yield driven
    signal.signal(signal.SIGTERM, handler)


def test_the_driver_keeps_what_is_done_and_goes_on_after_sigterm(drive, tmp_path, monkeypatch):
    wanted = ["--seeds", "300", "--only", "base,r3-8", "--jobs", "2",
              "--also", TINY + " --iterations 30 --eval-every 30 --save-every 500"]
    rows_in = lambda: json.loads((tmp_path / "rows.json").read_text())
    printed = tmp_path / "runs/r3-8-s300.txt"
    monkeypatch.setattr(Forked, "STOP_AT", ["r3-8-s300"])
    assert drive(*wanted) == 128 + signal.SIGTERM
    assert [(row["arm"], row["seed"]) for row in rows_in()] == [("base", 300)]
    stopped = printed.read_text()
    assert "stopped; saved" in stopped and f"--model {tmp_path}/runs/base-s300/warmup --warmup-epochs 0" in stopped

    assert drive(*wanted) == 0
    rows = rows_in()
    assert [(row["arm"], row["seed"]) for row in rows] == [("base", 300), ("r3-8", 300)]
    assert {row["code"] for row in rows} == {evidence.digest("r3")}
    assert all({"commit", "clean", "args", "after"} <= row.keys() for row in rows)
    assert rows[0]["before"] == rows[1]["before"]                    # one warm-up
    assert "--resume" in printed.read_text().rpartition("stopped; saved")[2]

    monkeypatch.setattr(evidence, "start", None)                     # nothing is left to do
    with FileLock(tmp_path / "rows.lock"):
        assert "another process is filling it" in drive(*wanted)
    assert drive(*wanted) == 0 and rows_in() == rows
    (tmp_path / "rows.json").write_text(json.dumps([rows[0] | {"code": "other"}]))
    assert "another state of the code" in drive(*wanted)


def test_only_registered_seeds_are_run(drive, monkeypatch):
    """Of an arm with eight seeds not those behind, which other arms have; a gated design's only with --gated."""
    asked = []
    monkeypatch.setattr(evidence, "run_all", lambda args, todo, *_: asked.extend(todo))
    assert drive("--seeds", "106-109", "--only", "sft-8-twice,rl-8") == 0
    assert asked == [("sft-8-twice", 106), ("sft-8-twice", 107), *[("rl-8", seed) for seed in (106, 107, 108, 109)]]
    monkeypatch.setattr(evidence, "GATED", ("r3",))
    assert "--gated" in drive("--only", "base,r3-8") and "bases" in drive("--only", "r3-8", "--gated")


def test_arms_are_accepted_by_their_script():
    for script, arms in evidence.ARMS.items():
        module = __import__(script.partition("-")[0])
        for flags in [flags for _, flags in arms.values()]:
            module.parse_args([*flags.split(), "--device", "cpu"])
