"""Tables of the kernels beside plain torch, torch.compile and other libraries: time, memory, error against float64.

    python -m kernels.logprob [--out FILE] [--seconds S]        also kernels.kl and kernels.linear

On a GPU: medians of rounds in which all take turns, on fresh copies of the inputs, the L2 cache flushed; 30 rounds, and
fewer of what would take more than its share of S seconds a table. Rates count the bytes or operations that ours moves or
does, the same number for all; beside them the rates of a large copy and of a large bfloat16 product, measured in the
same run. torch.compile compiles once for all sizes. A rival that is not installed, or fails, is a line with its reason.
On a CPU: small shapes, and ours is the plain torch path.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 30
LEAST = 5                   # rounds of a call that is slower than its share of the time
SECONDS = 2.5 if CUDA else 1
ROWS = 32                   # rows that are compared with float64
MiB = 2 ** 20


def peaked(N, V, dtype=torch.float32, seed=0):
    """Logits like a language model's: mean entropy 2 to 4, the largest near 22."""
    z = torch.randn(N, V, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))
    return (2 * z + 14 * (z > 3.5)).to(dtype)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).to(dtype)


def tokens(N, V):
    return torch.randint(0, V, (N,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))


def flush():
    if CUDA:
        torch.empty(256 * MiB, dtype=torch.uint8, device=DEVICE).zero_()


def milliseconds(call):
    flush()
    if not CUDA:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def both_passes(call, trained, fixed, g):
    """Outputs and gradients, for upstream gradients g that are not the all-equal ones of a sum."""
    out = call(*trained, *fixed)
    out = out if isinstance(out, (tuple, list)) else (out,)
    return out, torch.autograd.grad(sum((o * i).sum() for o, i in zip(out, g)), trained)


def fresh(trained):
    return [x.detach().clone().requires_grad_() for x in trained]       # some libraries write into their inputs


def one_round(call, trained, fixed, g):
    """Milliseconds of the forward, and of both passes."""
    x = [x.detach() for x in fresh(trained)]                # the same for a frozen head: compiled once
    with torch.no_grad():
        forward = milliseconds(lambda: call(*x, *fixed))
    x = fresh(trained)
    return forward, milliseconds(lambda: both_passes(call, x, fixed, g))


def prepare(call, trained, fixed, g, seconds):
    """Two passes that are not timed, the first compiles: peak MiB (None on a CPU), rounds that fit into the seconds."""
    one_round(call, trained, fixed, g)
    x = fresh(trained)
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    both_passes(call, x, fixed, g)
    peak = (torch.cuda.max_memory_allocated() - before) / MiB if CUDA else None
    start = time.perf_counter()
    one_round(call, trained, fixed, g)
    return peak, min(ROUNDS, max(LEAST, int(seconds / (time.perf_counter() - start))))


def errors(call, truth, trained, fixed, g):
    """Largest error of each output, and the relative error of the first gradient, over a few rows."""
    N = len(trained[0])
    part = [[x[:ROWS] if len(x) == N else x for x in tensors] for tensors in (trained, fixed)]
    doubles = [[x.double() if x.is_floating_point() else x for x in tensors] for tensors in part]
    out, grads = both_passes(call, fresh(trained), fixed, g)
    g = g.double()[:len(out), :ROWS]
    exact, exact_grads = both_passes(lambda *x: truth(*x)[:len(out)], fresh(doubles[0]), doubles[1], g)
    values = [(o[:ROWS] - e).abs().max().item() for o, e in zip(out, exact)]
    return values, ((grads[0][:ROWS] - exact_grads[0]).norm() / exact_grads[0].norm()).item()


def ceilings():
    """GB/s of a copy and TFLOP/s of a bfloat16 product on this machine, now."""
    x, a = torch.empty(2048 * MiB, dtype=torch.uint8, device=DEVICE), normal(8192, 8192, dtype=torch.bfloat16)
    y, b = torch.empty_like(x), normal(8192, 8192, dtype=torch.bfloat16, seed=1)
    copy = statistics.median(milliseconds(lambda: y.copy_(x)) for _ in range(ROUNDS))
    product = statistics.median(milliseconds(lambda: a @ b) for _ in range(ROUNDS))
    return {"GB/s": 2 * x.nbytes / copy / 1e6, "TFLOP/s": 2 * 8192 ** 3 / product / 1e9}


def table(title, calls, truth, trained, fixed, unit, work, seconds=SECONDS):
    """Prints and returns one line for each call(*trained, *fixed) -> outputs, log-prob first or KL alone.

    work: GB or TFLOP of the forward and of both passes. truth: the same in plain torch, run in float64. What any call
    but "ours" raises, when it imports its library or later, is its line; what ours raises ends the run.
    """
    g, failed = normal(3, len(trained[0]), seed=9), {}

    def attempt(name, action, *more):
        if name in failed:
            return None
        try:
            return action(calls[name], *more)
        except Exception as e:
            if name == "ours":
                raise
            failed[name] = " ".join(f"{type(e).__name__}: {e}".split())
        if CUDA:
            torch.cuda.empty_cache()            # the error is gone by now, and with it what its frames held
        return None

    print(f"\n{title}\n{'':26}  forward ms    both ms   {unit + ' forward, both':>22}  peak MiB   errors; of gradient")
    prepared = {name: attempt(name, prepare, trained, fixed, g, seconds / len(calls)) for name in calls}
    times = {name: [] for name in calls}
    for i in range(ROUNDS):
        for name in calls:
            rounds = prepared[name][1] if prepared[name] else 0
            if i * rounds % ROUNDS < rounds:    # spread evenly: `rounds` of the ROUNDS
                times[name].append(attempt(name, one_round, trained, fixed, g))
    lines = []
    for name in calls:
        found = attempt(name, errors, truth, trained, fixed, g)
        if name in failed:
            lines.append(dict(table=title, name=name, failed=failed[name]))
            print(f"{name:26} {failed[name][:104]}", flush=True)
            continue
        (values, gradient), (peak, rounds) = found, prepared[name]
        (low, forward, high), (_, both, _) = (statistics.quantiles(t, n=10)[1:8:3] for t in zip(*times[name]))
        rates = [1e3 * w / ms for w, ms in zip(work, (forward, both))]
        lines.append(dict(table=title, name=name, rounds=rounds, forward_ms=forward, forward_ms_20_80=[low, high],
                          both_ms=both, unit=unit, rates=rates, peak_MiB=peak, errors=values, gradient_error=gradient))
        memory = f"{peak:9.0f}" if CUDA else "        -"
        print(f"{name:26} {forward:11.3f} {both:10.3f}   {rates[0]:11.3g} {rates[1]:10.3g} {memory}   "
              + " ".join(f"{v:.0e}" for v in values) + f"; {gradient:.0e}", flush=True)
    return lines


def main(name, tables):
    """Runs the tables of one file, a function that yields the arguments of each; --out keeps each as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; the tables of the other kernels in it are kept")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for the rounds of a table, default {SECONDS}")
    args = parser.parse_args()
    packages = [d for d in ("torch", "triton", "trl", "liger-kernel") if importlib.util.find_spec(d.replace("-", "_"))]
    versions = {p: importlib.metadata.version(p) for p in packages} | {"torch": torch.__version__}
    machine = torch.cuda.get_device_name() if CUDA else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    print(machine, versions)
    limits = ceilings() if CUDA else {}
    print("measured ceilings:", {k: round(v) for k, v in limits.items()} if CUDA else
          "no GPU here: small shapes, and the path timed is plain torch, not the kernels")
    command = " ".join([f"python -m kernels.{name}", *sys.argv[1:]])
    report = dict(machine=machine, versions=versions, command=command, path=kernels.PATH or "default", ceilings=limits,
                  complete=False, lines=[])
    for case in tables():
        report["lines"] += table(*case, seconds=args.seconds)
        save(args.out, name, report)
    save(args.out, name, report | {"complete": True})


def save(path, name, report):
    """One file's report into the JSON file, which is whole at every moment: written beside it, then renamed."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(found | {name: report}, indent=1) + "\n")
    os.replace(beside, path)
