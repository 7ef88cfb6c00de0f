"""Runs the registered arms of a script (results/PREREGISTRATION.md), and keeps a row of each in results/evidence-SCRIPT.json.

    python tests/evidence.py r3 --jobs 2                               all arms, seeds 100 to 115, two runs side by side
    python tests/evidence.py score --jobs 16 --minutes 9 --commit ID   on another machine, from a copy of the tree without .git
    python tests/evidence.py r3 --seeds 300 --only base,r3-8 --out pilot.json --runs runs/pilot

A name behind the script's, as in score-2, is that of another design for it, registered apart. Arms run in the order of ARMS, the
most telling first, each for all seeds before the next. All arms of a seed start from the warm-up of its run "base", those with
--warmup-epochs of their own excepted. A run is one process with one thread. A row is that of tests/table.py, with the arm and a
digest of the code. After each run the file is whole: what it holds already is skipped, and what was stopped (Ctrl-C, SIGTERM,
--minutes) goes on from the run's folder the next time. Rows of two states of the code are not put into one file.
"""
import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from table import holds, read, value

ROOT = Path(__file__).parent.parent

# Of ppo_reft-svamp, for a GPU: what sft and reft have in common, then 216 iterations of 512 rows, 40 epochs, and 100 of rollouts
SVAMP = "--batch-size 256 --micro-batch-size 64 --max-new-tokens 128 --save-every 1000"
SFT = f"{SVAMP} --method sft --minibatch-size 64 --iterations 216 --eval-every 18"
REFT = f"{SVAMP} --minibatch-size 256 --iterations 100 --eval-every 10 --vf-coef 1"

FIRST = {"ppo_reft-2": 400, "r3-2": 400, "score-2": 400}             # the first seed of a script or design; else 100
FOUR = "--look-ups 4 --max-new-tokens 122"                            # of r3-2
GATED = ("r3-2",)                                                    # whose arms have the seeds of the bases that pass

# {script, or script-design: {arm: (how many seeds, flags)}}
ARMS = {
    "ppo_reft": {
        "base": (16, "--iterations 0"),
        "reft": (16, "--vote-k 16 --rerank"),
        "sft-480": (16, "--method sft --iterations 480 --eval-every 60 --vote-k 16 --rerank"),
        "online-st": (16, "--method online-st"),
        "offline-st": (16, "--method offline-st --warmup-epochs 8"),         # starts from nothing
        "kl-0": (16, "--kl-coef 0"),
        "partial-0": (16, "--partial-reward 0"),
        "separate": (8, "--value separate"),
        "sft-960": (8, "--method sft --iterations 960 --eval-every 120"),
    },
    "r3": {
        "base": (16, "--iterations 0"),
        "r3-8": (16, ""),
        "rl-8": (16, "--method rl"),
        "staged-8": (16, "--method staged"),
        "rl-8-authors": (16, "--method rl --lam 0.95 --vf-coef 5"),
        "sft-8": (16, "--method sft --iterations 150 --eval-every 50"),      # warm-up and 150: four times its steps
        "r3-4": (16, "--operations-low 4 --operations-high 4"),
        "rl-4": (16, "--operations-low 4 --operations-high 4 --method rl"),
        "r3-6": (16, "--operations-low 6 --operations-high 6"),
        "rl-6": (16, "--operations-low 6 --operations-high 6 --method rl"),
        "no-k0": (16, "--stage-weights 0,1,1,1,1"),
        "no-k4": (16, "--stage-weights 1,1,1,1,0"),
        "r3-12": (8, "--operations-low 12 --operations-high 12 --iterations 60 --eval-every 10"),
        "rl-12": (8, "--operations-low 12 --operations-high 12 --iterations 60 --eval-every 10 --method rl"),
        "sft-8-twice": (8, "--method sft --iterations 50 --eval-every 50"),
    },
    "score": {
        "base": (16, "--method base"),
        "score": (16, ""),
        "multi-turn": (16, "--method multi-turn"),
        "star": (16, "--method star"),
        "pair-sft": (16, "--method pair-sft"),
        "no-stage1": (16, "--method no-stage1"),
        "no-shaping": (16, "--method no-shaping"),
        "single-turn": (16, "--method single-turn"),
        "star-plus": (16, "--method star-plus"),
        "pair-sft-plus": (16, "--method pair-sft-plus"),
        "star-stage2": (16, "--method star-stage2"),
        "multi-turn-twice": (16, "--method multi-turn --iterations 160"),
        "collapse": (8, "--gamma 0.8 --alpha 1"),
        "self-refine": (8, "--method self-refine"),
    },
    "prl": {
        "base": (16, "--method base"),
        "grpo": (16, "--method grpo"),
        "prl-3": (16, "--eta 3"),
        "loss-0.1": (16, "--method grpo-kl-loss --kl-coef 0.1"),
        "reward-3": (16, "--method grpo-kl-reward --eta 3"),
        "prl-1": (16, "--eta 1"),
        "loss-0.3": (16, "--method grpo-kl-loss --kl-coef 0.3"),
        "reward-1": (16, "--method grpo-kl-reward --eta 1"),
        "prl-10": (16, "--eta 10"),
        "loss-0.03": (16, "--method grpo-kl-loss --kl-coef 0.03"),
        "reward-10": (16, "--method grpo-kl-reward --eta 10"),
        "prl-0.3": (16, "--eta 0.3"),
        "loss-1": (16, "--method grpo-kl-loss --kl-coef 1"),
        "reward-0.3": (16, "--method grpo-kl-reward --eta 0.3"),
        "prl-30": (16, "--eta 30"),
        "loss-0.01": (16, "--method grpo-kl-loss --kl-coef 0.01"),
        "reward-30": (16, "--method grpo-kl-reward --eta 30"),
        "token": (8, "--eta 3 --steps token"),
        "whole": (8, "--eta 3 --steps length --step-len 64"),
        "end": (8, "--eta 3 --anchor end"),
        "raft": (8, "--method raft"),
    },
    "ppo_reft-svamp": {
        "base": (6, f"{SVAMP} --warmup-epochs 3 --warmup-batch-size 32 --warmup-lr 2e-4 --iterations 0"),
        "sft-1e-4": (6, f"{SFT} --lr 1e-4"),
        "sft-2e-5": (6, f"{SFT} --lr 2e-5"),
        "reft-1e-5": (6, f"{REFT} --lr 1e-5"),
        "reft-3e-6": (6, f"{REFT} --lr 3e-6"),
        "kl-0-1e-5": (6, f"{REFT} --lr 1e-5 --kl-coef 0"),
        "kl-0-3e-6": (6, f"{REFT} --lr 3e-6 --kl-coef 0"),
    },
    "ppo_reft-2": {
        "base": (16, "--train-size 3000 --warmup-epochs 11 --iterations 0"),
        "reft": (16, "--train-size 3000"),
        "sft-480": (16, "--train-size 3000 --method sft --iterations 480 --eval-every 60"),
        "sft-960": (16, "--train-size 3000 --method sft --iterations 960 --eval-every 120"),
    },
    "r3-2": {
        "base": (24, f"{FOUR} --iterations 0"),                       # of which sixteen that pass their gates go on: --gated
        "r3-8": (16, FOUR),
        "rl-8": (16, f"{FOUR} --method rl"),
        "rl-8-120": (16, f"{FOUR} --method rl --iterations 120 --eval-every 20"),
        "sft-8": (16, f"{FOUR} --method sft --iterations 150 --eval-every 50"),
        "rl-6": (16, f"{FOUR} --operations-low 6 --operations-high 6 --method rl"),
        "r3-4": (16, f"{FOUR} --operations-low 4 --operations-high 4"),
        "rl-4": (16, f"{FOUR} --operations-low 4 --operations-high 4 --method rl"),
    },
    "score-2": {
        "base": (16, "--warmup-epochs 8 --method base"),
        "score": (16, ""),
        "multi-turn": (16, "--method multi-turn"),
        "star": (16, "--method star"),
        "pair-sft": (16, "--method pair-sft"),
    },
}


def file_of(script):
    """The file of a script, or of a design for it."""
    return ROOT / f"{script.partition('-')[0]}.py"


def digest(script):
    """A hash of the code that makes a run; a test compares it with that of the row's commit."""
    files = [file_of(script), ROOT / "model.py", *sorted((ROOT / "kernels").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def command(script, arm, seed, device, also, runs):
    """The command of a run, whose folder may hold a part of it."""
    out, flags = runs / f"{arm}-s{seed}", [*ARMS[script][arm][1].split(), *shlex.split(also)]
    if arm != "base" and "--warmup-epochs" not in ARMS[script][arm][1]:
        flags += ["--model", runs / f"base-s{seed}/warmup", "--warmup-epochs", "0"]
    flags += ["--resume"] if (out / "state.pt").exists() else []
    return [sys.executable, file_of(script), "--seed", seed, "--device", device, "--out", out, *flags]


def start(script, arm, seed, device, also, runs):
    """The process of a run; what it prints goes to a file beside its folder."""
    argv = list(map(str, command(script, arm, seed, device, also, runs)))
    with open(runs / f"{arm}-s{seed}.txt", "a") as printed:
        print(shlex.join(argv), file=printed, flush=True)
        return subprocess.Popen(argv, stdout=printed, stderr=printed, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def passing(script, rows):
    """The seeds, in order, whose base passes all gates of results/claims.json that look at it."""
    gates = [gate for gate in json.loads((ROOT / "results/claims.json").read_text())["gates"]
             if gate["script"] == script and gate["arm"] == "base"]
    return sorted(row["seed"] for row in rows if row["arm"] == "base"
                  and all(holds(gate, value(row, gate["metric"])) for gate in gates))


def keep(rows, path):
    """Writes the rows, a line each."""
    path.with_suffix(".tmp").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    os.replace(path.with_suffix(".tmp"), path)


def run_all(args, todo, rows, code):
    """Runs what is to do, args.jobs at a time, and returns what failed. A run waits for the warm-up of its seed."""
    running, failed, ends = {}, [], time.time() + 60 * args.minutes
    try:
        while todo or running:
            warm = {row["seed"] for row in rows if row["arm"] == "base"}
            ready = [job for job in todo if job[0] == "base" or job[1] in warm]
            while ready and len(running) < args.jobs:
                todo.remove(job := ready.pop(0))
                running[job] = start(args.script, *job, args.device, args.also, args.runs)
            if not running or time.time() > ends:
                break
            time.sleep(0.2)
            for (arm, seed), process in list(running.items()):
                if process.poll() is not None:
                    del running[arm, seed]
                    if process.returncode:
                        failed.append((arm, seed))
                        continue
                    row = read(args.runs / f"{arm}-s{seed}/summary.json")
                    rows.append({"arm": arm} | row | {"code": code}
                                | ({"commit": args.commit, "clean": None} if args.commit else {}))
                    keep(rows, args.out)
                    print(f"{arm} seed {seed}: {row['before']['accuracy']:.3f} -> {row['after']['accuracy']:.3f}", flush=True)
    finally:                                                         # they save, so that they can go on
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed + todo + list(running)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=ARMS)
    parser.add_argument("--seeds", help="first and last, or one; an arm of 8 takes the first 8; default: those registered")
    parser.add_argument("--gated", action="store_true", help="instead: the seeds whose base, in --out, passes its gates")
    parser.add_argument("--only", help="arms, joined by commas; base, which the others need, among them unless --out has its row")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--also", default="", help="flags for all runs: a checkpoint and data for the arms of a pretrained model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--commit", help="where the tree is a copy without .git: the commit that it is a copy of")
    parser.add_argument("--out", type=Path, help="default: results/evidence-SCRIPT.json")
    parser.add_argument("--runs", type=Path, help="folder of the runs, default: runs/evidence-SCRIPT")
    args = parser.parse_args()
    args.out = args.out or ROOT / f"results/evidence-{args.script}.json"
    args.runs = args.runs or ROOT / f"runs/evidence-{args.script}"
    args.runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.out.with_suffix(".lock"), timeout=0):     # another driver would write its own rows over these
            fill(args)
    except Timeout:
        sys.exit(f"{args.out}: another process is filling it")


def fill(args):
    """Runs what --out lacks of what is asked for, and exits."""
    registered, code = FIRST.get(args.script, 100), digest(args.script)
    first, _, last = (args.seeds or f"{registered}-{registered + 99}").partition("-")        # an arm takes as many as it has
    seeds = range(int(first), int(last or first) + 1)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    if any(row["code"] != code for row in rows):
        sys.exit(f"{args.out}: holds rows of another state of the code than {code}")
    arms = args.only.split(",") if args.only else list(ARMS[args.script])
    if args.script in GATED and not args.gated and arms != ["base"]:
        sys.exit(f"{args.script}: first --only base, then the other arms with --gated")
    if args.out == ROOT / f"results/evidence-{args.script}.json" and not registered <= seeds[0] <= seeds[-1] < registered + 100:
        sys.exit(f"--seeds {args.seeds}: not registered; trials have an --out of their own")
    if args.gated:
        missing, seeds = ARMS[args.script]["base"][0] - sum(row["arm"] == "base" for row in rows), passing(args.script, rows)
        if missing:
            sys.exit(f"{args.out}: --gated goes by all bases, and {missing} are not there yet")
    done = {(row["arm"], row["seed"]) for row in rows}
    longer = lambda arm, seed: not args.gated and registered + ARMS[args.script][arm][0] <= seed < registered + 100
    todo = [(arm, seed) for arm in arms for seed in seeds[:ARMS[args.script][arm][0]]
            if (arm, seed) not in done and not longer(arm, seed)]                        # a seed of arms with more only
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    left = run_all(args, todo, rows, code)
    print(f"{args.out}: {len(rows)} rows" + (f"; without a row: {left}, see {args.runs}/*.txt" if left else ""))
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
