# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<2.14", "triton>=3.6; platform_system == 'Linux'", "numpy", "safetensors", "tiktoken", "regex",
#                 "tqdm", "matplotlib", "pytest", "pytest-xdist", "filelock", "pydantic-monty>=1.4", "rapidfuzz",
#                 "math-verify", "huggingface_hub", "jinja2>=3.1.6"]
# ///
"""SCoRe: Training Language Models to Self-Correct via Reinforcement Learning
Aviral Kumar, Vincent Zhuang, Rishabh Agarwal, Yi Su and others; ICLR 2025, arXiv 2409.12917v2.

A model answers twice: y1 to the question x1, then y2 to x2 = x1 | y1 | p1, with p1 a fixed text, "there might be an error".
Trained for both answers at once, it gives a good first one and leaves it alone. So stage I rewards y2 only and holds y1 close to
the base model by a strong KL; stage II rewards both, and y2 gets a bonus for a wrong answer made right, a malus for the opposite.

    what         formula                                                                          number  function
    goal         maximise E[r1 + r2],   r = 1 for a right answer (code: all tests pass), else 0   S1      reward()
    SFT          L = -mean_t log pi(a_t | s_t)                                                    Eq. 1   sft_loss()
    stage I      R1 = 0,   R2 = r2                                                                S3      turn_returns()
    stage II     R1 = r1,   R2 = r2                                                               S4      turn_returns()
    bonus        R2 += alpha (r2 - r1),   stage II only                                           S5      turn_returns()
    credit       G2 = R2,   G1 = R1, in stage II + gamma R2; gamma = 0: y1 earns nothing by y2    S6      turn_returns()
    baseline     A_i = G_i - mean of the G_j, j != i, of the same question, each turn by itself   S7      leave_one_out()
    policy loss  -mean over episodes of sum_t A_t log pi(a_t | s_t)                               S2      loss_fn()
    KL loss      mean over episodes of sum_t c KL(pi || pi_ref)(s_t),   c = beta2 or beta1        S8      loss_fn()
    edit ratio   Levenshtein distance of y1 and y2 / (length of y1 + length of y2)                S10     edit_ratio()

Eq. 1 is ReFT's; the paper's own Eq. 1 to 5 are S1 to S5, its text has S6 and S10. Not disclosed there and chosen here: baseline
(S7), exact KL summed over a turn (S8), share of stage I, samples per question. The reference is the base in both stages. In
expectation and with gamma = 0 the bonus is a factor 1 + alpha on the gradient of r2: r1 is part of x2, so it acts as a baseline.
Programs are asked for without worked examples (paper: three for MBPP). No code of the authors is known. Below: the flags, the
paper, its loop (main), its baselines, and last what all four scripts have in common.

    python score.py                                               built-in problems, a small GPT from nothing, a few CPU minutes
    python score.py --method star --model runs/score-score-s0/warmup --warmup-epochs 0        a baseline, from the same warm-up
    python score.py --model FOLDER --train-data train.jsonl --eval-data test.jsonl
                                                                  a pretrained checkpoint on GSM8K's files or ReFT's
    python score.py --task code --model FOLDER --train-data mbpp.jsonl --eval-data HumanEval.jsonl --lr 1e-5 --beta2 0.25
                                                                  programs instead of answers
"""
import argparse
import datetime
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import symtable
import sys
import textwrap
import threading
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

from kernels import linear_logprobs, linear_stats
from model import (GPT, GPTConfig, InputError, Tokenizer, free_memory, generate, load_checkpoint, save_checkpoint,
                   training_memory, whole)

METHODS = Literal["score", "multi-turn", "single-turn", "no-stage1", "no-shaping", "star-stage2",
                  "base", "self-refine", "star", "star-plus", "pair-sft", "pair-sft-plus"]


@dataclass
class Args:
    # a pair of defaults: for the built-in problems, and the paper's with --train-data
    # run
    method: METHODS = "score"        # the paper's own; five ablations; base, self-refine: untrained; the last four: supervised
    task: Literal["math", "code"] = "math"    # an answer; a program that passes tests, from files only
    model: str = ""                  # folder of a pretrained checkpoint, or its hub id; empty: a small GPT from nothing
    train_data: str = ""             # GSM8K's or MATH's JSON lines, ReFT's list; code: MBPP's; empty: the built-in problems
    eval_data: str = ""              # test set in the same form, code: or HumanEval's; several: a,b; needed with --train-data
    cot: Literal["text", "program"] = "text"    # rationales in words (N-CoT); Python programs (P-CoT), from files only
    prompt: str = "paper"            # requests as the paper's; chat: the checkpoint's chat template; or a text with {question}, \n
    system: str = ""                 # system message of --prompt chat
    out: str = ""                    # run folder; empty: runs/<script>-<method, or evaluate>-s<seed>
    seed: int = 0                    # of everything random, the built-in test problems too; the dev problems are always the same
    device: Literal["auto", "cpu", "cuda"] = "auto"    # auto: cuda if there is a GPU that computes in bf16
    compile: bool = True             # on a GPU, with --model: torch.compile of a layer, once for all of them
    checkpoint_activations: bool = False    # keep only the input of each layer for the backward pass: less memory, more time
    shard: bool = False              # under torchrun: spread weights, gradients and optimiser over its processes (FSDP2)
    resume: bool = False             # go on with the run in --out exactly where it was saved
    evaluate_only: bool = False      # test --model as it is: numbers, no training, no weights; needs no --train-data
    # model from nothing, used without --model (small and many steps beats large and few)
    n_layer: int = 2                 # layers
    n_head: int = 4                  # attention heads
    n_embd: int = 64                 # width
    # problems
    train_size: int = (14000, 0)     # problems to train on; of a file so many rows, 0: all
    operations_low: int = 3          # fewest operations of a built-in dev or test problem
    operations_high: int = 4         # most
    operations_train: int = 4        # most of a built-in training problem, the fewest is 1
    # warm-up, on a linear schedule with 10 % warm-up steps
    warmup_epochs: int = (4, 0)      # passes over the demonstrations; 0 with --model: take the checkpoint as it is (paper)
    warmup_batch_size: int = 16      # demonstrations an optimiser step, and kept traces one of the supervised baselines
    warmup_lr: float = (2e-3, 1e-5)  # peak; 1e-5 for a pretrained model
    copies: float = 0.88             # share of built-in demonstrations of two turns whose y2 repeats y1
    wrong: float = 0.5               # share of their first attempts that announce a wrong answer
    wrong_again: float = 0.7         # share of their second ones, where they are no copy
    # reinforcement learning
    iterations: int = (80, 3000)     # rollouts, each with its update, of both stages; paper: 3000 (MATH), 1500 (MBPP)
    stage1: float = 0.5              # share of the iterations that are stage I; not disclosed
    batch_size: int = (64, 128)      # questions an iteration
    group_size: int = 4              # K, episodes of each; not disclosed. 64 * 4 = 256; paper: 512 (MATH), 128 (MBPP)
    minibatch_size: int = (256, 512)  # rows an optimiser step, at least the whole rollout: used once, so there is no ratio
    micro_batch_size: int = (64, 8)  # rows a forward pass: changes memory and speed, never the result
    max_new_tokens: int = (36, 400)  # longest attempt, in each turn; not disclosed
    lr: float = (2e-4, 5e-6)         # constant; supervised baselines: peak; paper: 5e-6 (MATH), 1e-5 (MBPP)
    alpha: float = 10.0              # of the bonus; paper: 10
    beta1: float = 0.01              # KL weight of both turns, in stage I of the second; paper: 0.01
    beta2: float = (0.5, 0.1)        # KL weight of the first turn in stage I; paper: 0.1 (MATH), 0.25 (MBPP)
    gamma: float = 0.0               # share of R2 that y1 gets in stage II; paper: 0 (0.8 with alpha 1 collapsed)
    turn2_weight: float = 1.0        # factor on y2's advantages in stage II; with no-shaping, 11 is like alpha = 10 on average
    kl_mode: Literal["loss", "reward"] = "loss"    # exact KL in the loss; sampled log-ratio in the reward; not disclosed
    norm_std: Literal["none", "turn", "joint"] = "none"    # what divides advantages: std of a turn's returns, of both turns'
    offline_fraction: float = 0.0    # q, share of first attempts in stage II that the base writes; paper: in "some experiments"
    grad_clip: float = 1.0           # norm of the gradient; not disclosed
    # supervised baselines
    rounds: int = 3                  # of star, each samples from the newest model and starts from the base; paper: 3
    sft_epochs: int = 1              # passes over the kept traces in a round; paper: 1 (pair-sft)
    # reports
    vote_k: int = 0                  # vote among 2, 4, 8 .. 2 * so many first attempts, or half as many corrections; paper: 16
    strict: bool = False             # read answers as ReFT's authors do: a bare float() of all that follows "the answer is:"
    strip_annotations: bool = False  # remove GSM8K's <<48/2=24>> from the demonstrations
    eval_every: int = (10, 50)       # iterations between greedy evaluations on the dev split; t1 + t2 (single-turn: t1) chooses
    eval_size: int = (1000, 0)       # at most so many dev problems, and of each test set; 0: all in the files
    save_every: int = 10             # iterations between saved states
    tensorboard: bool = False        # write the log as TensorBoard's events, too, into the run folder's events/

    def __post_init__(self):
        settle(self)
        self.iterations = 0 if self.method in ("base", "self-refine") else self.iterations
        rows, programs = self.batch_size * self.group_size, (self.task == "code") + (self.cot == "program")
        conflicts = {f"--{name.replace('_', '-')} {getattr(self, name)}: is a share, at most 1": getattr(self, name) > 1
                     for name in ("stage1", "offline_fraction", "copies", "wrong", "wrong_again")} | {
            f"--group-size {self.group_size}: must be at least 2, episodes of a question are compared": self.group_size < 2,
            f"--minibatch-size {self.minibatch_size}: must hold all {rows} rows of a rollout": self.minibatch_size < rows,
            "--task code, --cot program: each needs --train-data or --eval-data, and goes without the other":
                programs > bool(self.train_data or self.eval_data),
            "--turn2-weight would weigh the KL too in --kl-mode reward": self.turn2_weight != 1 and self.kl_mode == "reward",
            "--method single-turn trains its own first attempts on r1 alone: no --offline-fraction, --gamma or --norm-std joint":
                self.method == "single-turn" and (self.offline_fraction or self.gamma or self.norm_std == "joint")}
        for message, wrong in conflicts.items():
            if wrong:
                raise InputError(message)
        if programs:
            run_programs([])                 # InputError where none can be run


# ==== the paper ===============================================================================================================

def reward(answers, problems, args):
    """Outcome of each attempt (B,): 1 for the right answer, or for a program that passes all tests, 0 for anything else."""
    if args.task == "code":
        return passes(answers, problems)
    return torch.tensor(list(map(float, agree(answers, problems))))                                                  # S1


def one_turn(policy, problems, tokenizer, args, temperature=1.0):
    """An attempt at each problem, {"ids", "logprobs", "text", "answer", "outcome", "ended"}; no answer if it ran out of room."""
    if not problems:
        return []
    data, texts, answers = respond(policy, problems, tokenizer, args, temperature)
    logprobs = [row[chosen].tolist() for row, chosen in zip(data["sampled_logprobs"].cpu(), data["response_mask"].cpu())]
    columns = [data[name].tolist() for name in ("outcomes", "strict", "ended")]
    return [{"ids": ids, "logprobs": logprobs, "text": text, "answer": answer if ended else None,
             "outcome": outcome if ended else 0.0, "strict": strict and ended, "ended": ended}
            for ids, logprobs, text, answer, outcome, strict, ended in zip(response_ids(data), logprobs, texts, answers, *columns)]


def two_turns(policy, problems, tokenizer, args, temperature=1.0):
    """Attempts y1 and y2 at each problem: y1 in its context x1, y2 in x2 = x1 | y1 | p1, which says nothing of whether y1 is
    right. A problem may bring the "first" attempt, written by another model; it is taken instead of a new one."""
    written = iter(one_turn(policy, [p for p in problems if "first" not in p], tokenizer, args, temperature))
    first = [p["first"] if "first" in p else next(written) for p in problems]
    corrected = [p | {"prompt": p["prompt"] + y1["ids"] + between(p, y1)} for p, y1 in zip(problems, first)]
    return first, one_turn(policy, corrected, tokenizer, args, temperature)


def between(problem, y1):
    """What stands between the two attempts: p1, after the end of a turn that y1 had no room for."""
    return ([] if y1["ended"] else problem["close"]) + problem["again"]


def turn_rows(policy, problems, first, second):
    """Episodes as rows [x1 | y1 | p1 | y2 | pad]: tokens (B, T), turn1_mask and turn2_mask (B, T-1), the tokens of y1 and of y2."""
    parts = [(p["prompt"], y1["ids"], between(p, y1), y2["ids"]) for p, y1, y2 in zip(problems, first, second)]
    marked = lambda row, turn: [i == turn for i, part in enumerate(row) for _ in part]
    turn1, turn2 = [pack([(sum(row, []), marked(row, turn)) for row in parts], policy) for turn in (1, 3)]
    return turn1["tokens"], turn1["response_mask"], turn2["response_mask"]


def stage_of(iteration, args):
    """1 or 2: a function of the iteration alone, so a resumed run is where it was."""
    staged = args.method in ("score", "no-shaping", "star-stage2")
    return 1 if staged and iteration <= round(args.stage1 * args.iterations) else 2


def turn_returns(outcomes1, outcomes2, kl1, kl2, stage, args):
    """G1 and G2 (B,), what the tokens of y1 and of y2 are credited with; kl1, kl2: penalties of --kl-mode reward, else 0."""
    R1, R2 = torch.zeros_like(outcomes1), outcomes2                                                                  # S3
    if stage == 2:
        R1 = outcomes1                                                                                               # S4
        if args.method in ("score", "no-stage1"):
            R2 = R2 + args.alpha * (outcomes2 - outcomes1)                                                           # S5
    R1, R2 = R1 - kl1, R2 - kl2
    return R1 + args.gamma * R2 if stage == 2 else R1, R2                                                            # S6


def leave_one_out(returns, counted, group_size):
    """A (B,): each return minus the mean of the others of its question, among the counted rows; 0 where there is no other."""
    returns, counted = returns.view(-1, group_size), counted.view(-1, group_size)                            # (Q, K)
    n = counted.sum(1, keepdim=True)
    others = (torch.where(counted, returns, 0).sum(1, keepdim=True) - returns) / (n - 1).clamp(min=1)
    return torch.where(counted & (n > 1), returns - others, 0).flatten()                                             # S7


def turn_advantages(G1, G2, on1, stage, args):
    """A1 and A2 (B,) of the two turns; on1 (B,): rows whose first attempt is the policy's own."""
    A1, A2 = leave_one_out(G1, on1, args.group_size), leave_one_out(G2, torch.ones_like(on1), args.group_size)
    if args.norm_std != "none":
        A1, A2 = over_std(A1, A2, on1, args)
    return A1, args.turn2_weight * A2 if stage == 2 else A2


def edit_ratio(first, second):
    """Edit distance over the lengths' sum: 0 if equal, 1 if one is empty."""
    from rapidfuzz.distance import Levenshtein
    return Levenshtein.distance(first, second) / max(len(first) + len(second), 1)                                    # S10


@torch.no_grad()
def rollout(policy, ref, problems, stage, tokenizer, args):
    """args.group_size episodes per problem, checked and scored: a dict of (B, T-1) tensors for the update, and a dict to log."""
    problems = [p for p in problems for _ in range(args.group_size)]
    if stage == 2 and args.offline_fraction:
        problems = offline_first(ref, problems, tokenizer, args)
    first, second = two_turns(policy, problems, tokenizer, args)
    tokens, turn1_mask, turn2_mask = turn_rows(policy, problems, first, second)
    sampled_logprobs = place(torch.tensor([x for pair in zip(first, second) for y in pair for x in y["logprobs"]],
                                          device=tokens.device), turn1_mask | turn2_mask)
    column = functools.partial(torch.tensor, device=tokens.device)                       # (B,)
    outcomes1, outcomes2 = [column([y["outcome"] for y in turn]) for turn in (first, second)]
    own = column(["first" not in p for p in problems])
    turn1_mask = turn1_mask & own[:, None]                           # what another model wrote is context
    trained = turn1_mask if args.method == "single-turn" else turn1_mask | turn2_mask
    c1, c2 = args.beta2 if stage == 1 else args.beta1, args.beta1
    kl_weight = torch.where(trained, c1 * turn1_mask + c2 * turn2_mask, 0)
    data = {"tokens": tokens, "response_mask": trained, "turn1_mask": turn1_mask, "kl_weight": kl_weight,
            "sampled_logprobs": sampled_logprobs}
    kl_k1 = torch.zeros_like(kl_weight)
    if args.kl_mode == "reward":                                     # in the returns, and not in the loss
        stats, data["kl_weight"] = token_stats(policy, ref, data, args), torch.zeros_like(kl_weight)
        kl_k1 = stats["old_logprobs"] - stats["ref_logprobs"]        # one-sample estimate of the KL
    kl1, kl2 = [c * torch.where(mask, kl_k1, 0).sum(1) for c, mask in ((c1, turn1_mask), (c2, turn2_mask))]
    A1, A2 = turn_advantages(*turn_returns(outcomes1, outcomes2, kl1, kl2, stage, args), own, stage, args)
    data["advantages"] = torch.where(trained, A1[:, None] * turn1_mask + A2[:, None] * turn2_mask, 0)
    found = turn_measures(first, second)
    return data, {"stage": stage} | means(found) | {
        "no_signal": float(not data["advantages"].any()), "rollouts": len(first), "tokens": sum(found["response_length"]),
        "sample": f"{first[0]['text']}\n---\n{second[0]['text']}"}


def loss_fn(policy, ref, micro, minibatch):
    """A micro-batch's share of the minibatch's loss: REINFORCE, and the exact KL with its turn's weight. Both are sums over the
    tokens of an episode and means over the episodes of the minibatch; so are the other KLs, which are for the log alone."""
    mask, turn1_mask, rows = micro["response_mask"], micro["turn1_mask"], len(minibatch["tokens"])
    hidden, targets = sampled(policy, micro)
    with torch.no_grad():
        ref_hidden, _ = sampled(ref, micro)
    stats = linear_stats(hidden, policy.head_weight, targets, ref_hidden, ref.head_weight)
    logprobs, entropy, kl, ref_logprobs = [place(x, mask) for x in stats]
    policy_loss = -(micro["advantages"] * logprobs).sum() / rows                                                     # S2
    kl_loss = (micro["kl_weight"] * kl).sum() / rows                                                                 # S8
    gap = torch.where(mask, logprobs.detach() - micro["sampled_logprobs"], 0).abs()      # generation rounds in another order
    return policy_loss + kl_loss, {
        "policy_loss": policy_loss, "kl_loss": kl_loss, "kl": kl.sum() / rows, "kl_k1": (logprobs - ref_logprobs).sum() / rows,
        "kl_1": torch.where(turn1_mask, kl, 0).sum() / rows, "kl_2": torch.where(turn1_mask, 0, kl).sum() / rows,
        "entropy": entropy.sum() / minibatch["response_mask"].sum(),
        "sampler_gap": gap.sum() / minibatch["response_mask"].sum(), "sampler_gap_max": gap.max()}


# ==== the loop ================================================================================================================

def main(args):
    policy, tokenizer, train, dev, test = prepare(args)
    print_ids("second turn's prompt", test[0]["again"], tokenizer)
    if args.evaluate_only:
        return evaluated(functools.partial(voted_report, policy, test, tokenizer, args), len(test), args)
    state = open_run(args)                                           # of a new run, or with --resume of the one in args.out

    policy = warm_up(policy, warmup_rows(train, tokenizer, args), tokenizer, state, args)
    if "before" not in state:
        with located("after the warm-up", args):
            tell("before", turn_report(policy, test, tokenizer, args) | sampled_report(policy, test, tokenizer, args), state, args)

    # the warm-up model is the base: the initial policy and, in both stages, the frozen reference
    ref = policy.frozen()
    spread([policy, ref], args)
    loss_of = functools.partial(loss_fn, policy, ref)
    modules, optimizer = {"policy": policy}, adamw([policy], args.lr)
    by = "t1" if args.method == "single-turn" else "outcome"         # outcome: t1 + t2
    if "best" not in state:
        keep_best(policy, dev, tokenizer, 0, state, args, by=by)

    for iteration in resumable(args.iterations, args.save_every, modules, optimizer, state, args):
        stage = stage_of(iteration, args)
        with located(f"iteration {iteration}", args):
            if stage == 2 and args.method.startswith(("star", "pair")):
                log = trace_update(policy, ref, train, optimizer, iteration, state, tokenizer, args)
            else:
                batch = draw(train, args.batch_size, iteration, args.seed)
                data, log = rollout(policy, ref, batch, stage, tokenizer, args)
                log |= optimiser_step(loss_of, data, optimizer, args)
            if iteration == 1 and "sample" in log:
                print_ids("first sample", response_ids(data)[0], tokenizer)
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                log |= keep_best(policy, dev, tokenizer, iteration, state, args, by=by)
        finish_iteration(log, iteration, state, args)

    # the checkpoint that was best on the dev split, tested once, and the last one
    if "after" not in state:
        best = load_checkpoint(Path(args.out) / "model")[0].to(resting(args))
        tell("after", final_report(best, policy, ref, test, tokenizer, args), state, args)
        save_run(modules, optimizer, state, args)
    plot_turns(state, args)
    summarise(len(test), state, args)


def sft_row(problem):
    """A demonstration as a row: the prompt is context, the response and its end token are trained."""
    prompt, response = problem["prompt"], problem["response"]
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def sft_loss(policy, micro, minibatch):
    """-log pi of the demonstrations' tokens, as a mean over all target tokens of the minibatch."""
    hidden, targets = sampled(policy, micro)
    logprobs, _ = linear_logprobs(hidden, policy.head_weight, targets)
    loss = -logprobs.sum() / minibatch["response_mask"].sum()                                                        # Eq. 1
    return loss, {"loss": loss}


def sft_step(policy, rows, optimizer, step, total, seed, args):
    """The step-th of `total` supervised steps, with a linear learning rate of which the first tenth rises."""
    for group in optimizer.param_groups:
        group["lr"] = args.warmup_lr * min(step / (0.1 * total), (total - step + 1) / (0.9 * total), 1.0)
    batch = pack(draw(rows, args.warmup_batch_size, step, seed), policy)
    return optimiser_step(functools.partial(sft_loss, policy), batch, optimizer, args)


def warm_up(policy, rows, tokenizer, state, args):
    """The policy after supervised training on rows; of a resumed run that was past it, from its folder."""
    folder, total = Path(args.out) / "warmup", math.ceil(args.warmup_epochs * len(rows) / args.warmup_batch_size)
    if "warmup_steps" not in state:
        optimizer = adamw([policy], args.warmup_lr)
        steps = resumable(total, 0, {"policy": policy}, optimizer, state, args)
        for step in progress(steps, "warm-up", args, state["step"], total):
            with located(f"warm-up step {step}", args):
                loss = sft_step(policy, rows, optimizer, step, total, args.seed, args)["loss"]
            state["loss"] = loss if step == 1 else 0.99 * state["loss"] + 0.01 * loss
        save_model(folder, policy, tokenizer)
        state |= {"warmup_steps": total, "step": 0}
    return load_checkpoint(folder)[0].to(resting(args))


# ==== baselines ===============================================================================================================

def sft_update(policy, rows, optimizer, iteration, steps, args):
    """An iteration of supervised training: `steps` optimiser steps on a schedule, as the warm-up's, over all iterations."""
    done = [sft_step(policy, rows, optimizer, (iteration - 1) * steps + i, steps * args.iterations, f"{args.seed} sft", args)
            for i in range(1, steps + 1)]
    return {k: sum(step[k] for step in done) / steps for k in done[0]}


def draw_traces(policy, batches, tokenizer, args):
    """Two-turn traces at temperature 1, [(problem, y1, y2)], and a dict to log."""
    traces = []
    for batch in progress(batches, "traces", args):
        problems = [p for p in batch for _ in range(args.group_size)]
        traces += zip(problems, *two_turns(policy, problems, tokenizer, args))
    found = turn_measures(*list(zip(*traces))[1:])
    return traces, means(found) | {"rollouts": len(traces), "tokens": sum(found["response_length"])}


def trace_rows(traces, rng, args):
    """Rows x1 y1 p1 y2 with y2 trained. STaR keeps the traces from wrong to right; pair-SFT gives a wrong y1 any right response,
    of either turn, to the same question; with plus, right first attempts take part in the same way."""
    right, rows = {}, []
    for problem, *attempts in traces:
        right.setdefault(problem["question"], []).extend(y for y in attempts if y["outcome"] == 1)
    for problem, y1, y2 in traces:
        if "pair" in args.method and right[problem["question"]]:
            y2 = rng.choice(right[problem["question"]])
        if y2["outcome"] == 1 and (y1["outcome"] == 0 or "plus" in args.method):
            rows.append(sft_row({"prompt": problem["prompt"] + y1["ids"] + between(problem, y1), "response": y2["ids"]}))
    return rows


def trace_update(policy, ref, train, optimizer, iteration, state, tokenizer, args):
    """An iteration of supervised training on traces. The iterations are split into rounds. The first of a round draws as many
    traces from the newest model as reinforcement learning would in all of it, and goes back to the base; in star-stage2 it goes
    on from where it is. The passes over them are spread over the round; of a few traces they end sooner. state["rows"] keeps the
    round's rows for a resumed run."""
    before = sum(stage_of(i, args) == 1 for i in range(1, iteration))
    rounds, length = 1 if "pair" in args.method else args.rounds, args.iterations - before
    starts = [before + 1 + length * i // rounds for i in range(rounds)] + [args.iterations + 1]
    start, end = max((a, b) for a, b in zip(starts, starts[1:]) if a <= iteration < b)
    log = {}
    if iteration == start:
        batches = [draw(train, args.batch_size, i, args.seed) for i in range(start, end)]
        traces, log = draw_traces(policy, batches, tokenizer, args)
        state["rows"] = trace_rows(traces, random.Random(f"{args.seed} {iteration}"), args)
        if args.method != "star-stage2":
            back_to_base(policy, args)
        optimizer.state.clear()
    log |= {"stage": stage_of(iteration, args), "kept": len(state["rows"])}
    total = math.ceil(args.sft_epochs * len(state["rows"]) / args.warmup_batch_size)
    steps = max(1, math.ceil(total / (end - start)))
    used = math.ceil(total / steps)                                  # iterations that train
    if iteration - start >= used:
        return log
    schedule = replace(args, iterations=used, warmup_lr=args.lr)     # the learning rate is that of all methods
    return log | sft_update(policy, state["rows"], optimizer, iteration - start + 1, steps, schedule)


def back_to_base(policy, args):
    """Gives the policy the weights of the warm-up as they were saved: ref's matrices are rounded on a GPU."""
    base, _ = load_checkpoint(Path(args.out) / "warmup")
    spread([base], args)                                             # with --shard parts are copied to parts
    policy.load_state_dict(base.state_dict())


def offline_first(ref, problems, tokenizer, args):
    """The problems of a rollout, a share args.offline_fraction of them with a first attempt by the base."""
    offline = (torch.rand(len(problems)) < args.offline_fraction).tolist()
    written = iter(one_turn(ref, [p for p, chosen in zip(problems, offline) if chosen], tokenizer, args))
    return [p | {"first": next(written)} if chosen else p for p, chosen in zip(problems, offline)]


def over_std(A1, A2, on1, args):
    """A1 and A2 (B,) over the standard deviation of their question's returns, in that turn or in both. It undoes most of the
    bonus, which for the most part only scales turn 2."""
    A = torch.stack([A1, A2]).view(2, -1, args.group_size)                                                   # (2, Q, K)
    n = torch.stack([on1, torch.ones_like(on1)]).view(A.shape).sum(2)                                        # (2, Q) rows
    centred = A * ((n - 1) / n.clamp(min=1))[..., None]                                                      # G - mean
    squares = centred.square().sum(2)
    if args.norm_std == "joint":
        n, squares = n.sum(0), squares.sum(0)
    std = (squares / (n - 1).clamp(min=1)).sqrt().expand(2, -1)[..., None] + 1e-6
    return (A / std).flatten(1)


# ==== what an episode is measured by ==========================================================================================

def turn_measures(first, second):
    """{name: a number for each episode} of what training and evaluation both log; in the means every rate is one of all problems,
    so that delta = t2 - t1 = (i->c) - (c->i). edit_histogram: which tenth of the edit ratios."""
    def measure(y1, y2):
        r1, r2, ratio = y1["outcome"], y2["outcome"], edit_ratio(y1["text"], y2["text"])
        cut1, cut2, length1, length2 = not y1["ended"], not y2["ended"], len(y1["ids"]), len(y2["ids"])
        return {"accuracy": r2, "strict_accuracy": y2["strict"], "outcome": r1 + r2,
                "t1": r1, "t2": r2, "delta": r2 - r1, "i->c": r1 < r2, "c->i": r1 > r2,
                "changed": y1["answer"] != y2["answer"], "edit_ratio": ratio,
                "edit_histogram": [tenth == min(int(10 * ratio), 9) for tenth in range(10)],
                "unparsed": ((y1["answer"] is None) + (y2["answer"] is None)) / 2,
                "truncated": (cut1 + cut2) / 2, "truncated_1": cut1, "truncated_2": cut2,
                "response_length": length1 + length2, "length_1": length1, "length_2": length2}

    measured = [measure(y1, y2) for y1, y2 in zip(first, second)]
    return {name: [numbers[name] for numbers in measured] for name in measured[0]}


def attempt(policy, problems, tokenizer, args, temperature):
    """What the two attempts at each problem give, {name: a number for each problem}, and the texts of the first."""
    first, second = two_turns(policy, problems, tokenizer, args, temperature)
    return turn_measures(first, second), f"{first[0]['text']}\n---\n{second[0]['text']}"


def turn_report(policy, problems, tokenizer, args):
    """What evaluate() finds, and two conditional rates, for reading only: of which problems they are depends on t1."""
    found = evaluate(policy, problems, tokenizer, args)
    share = lambda part, whole: part / whole if whole else 0.0
    return found | {"right_if_wrong": share(found["i->c"], 1 - found["t1"]), "wrong_if_right": share(found["c->i"], found["t1"])}


def voted_report(policy, problems, tokenizer, args):
    """What turn_report() finds, and votes if asked for."""
    found = turn_report(policy, problems, tokenizer, args)
    return found | (vote_curves(policy, problems, tokenizer, args) if args.vote_k else {})


def final_report(best, last, ref, problems, tokenizer, args):
    """voted_report() of the best checkpoint and what became of given first attempts; rates and controls of the last one."""
    found, at_end = voted_report(best, problems, tokenizer, args), evaluate(last, problems, tokenizer, args)
    at_end = {name: at_end[name] for name in ("t1", "t2", "delta", "i->c", "c->i")} | controls(last, problems, tokenizer, args)
    found |= {f"last_{name}": value for name, value in at_end.items()}
    return found | fixed_and_own(best, ref, problems, tokenizer, args) | controls(best, problems, tokenizer, args)


def fixed_and_own(policy, ref, problems, tokenizer, args):
    """Greedy second attempts after first ones sampled from the base, the same ones for all methods, and from the policy."""
    problems, found = sorted(problems, key=lambda p: len(p["prompt"])), {}               # like lengths together: less padding
    for name, author in (("fixed", ref), ("own", policy)):
        torch.manual_seed(args.seed)
        first = [y1 for batch in in_batches(problems, args) for y1 in one_turn(author, batch, tokenizer, args)]
        rates = evaluate(policy, [p | {"first": y1} for p, y1 in zip(problems, first)], tokenizer, args)
        found |= {f"{name}_{key}": rates[key] for key in ("t1", "t2", "i->c", "c->i")}
    return found


def controls(policy, problems, tokenizer, args):
    """Whether second attempts mend the first or solve anew, greedy. swapped_t2: their share right after the first attempt to
    another question. Of wrong first attempts: the share whose own last line is right (shown), where answers are numbers, and the
    shares mended of those and of the others (hidden); None where there are none."""
    problems = sorted(problems, key=lambda p: len(p["prompt"]))                          # the next question is about as long
    batches = [problems[i:i + args.minibatch_size] for i in range(0, len(problems), args.minibatch_size)]
    first = [y1 for batch in batches for y1 in one_turn(policy, batch, tokenizer, args, 0)]
    after = lambda pairs: evaluate(policy, [p | {"first": y1} for p, y1 in pairs], tokenizer, args)["t2"] if pairs else None
    wrong = [(p, y1) for p, y1 in zip(problems, first) if y1["outcome"] == 0]
    shows = lambda p, y1: isinstance(p.get("gold"), float) and same(p["gold"], read_number(y1["text"].rstrip().split("\n")[-1]))
    shown, hidden = [[pair for pair in wrong if shows(*pair) == kind] for kind in (True, False)]
    return {"swapped_t2": after(list(zip(problems, first[1:] + first[:1]))), "shown": len(shown) / len(wrong) if wrong else None,
            "mended_shown": after(shown), "mended_hidden": after(hidden)}


def sampled_report(policy, problems, tokenizer, args):
    """Of two episodes a problem at temperature 1: the share of changed answers, and of those the share from wrong to right."""
    torch.manual_seed(args.seed)
    found = evaluate(policy, problems * 2, tokenizer, args, temperature=1)
    return {"sampled_changed": found["changed"], "sampled_mended": found["i->c"] / found["changed"] if found["changed"] else None}


def vote(answers):
    """The answer given most often, floats equal within 1e-2, of equally many the first seen; None is not counted."""
    counts = {}                                                      # {the first of its kind: how many}
    for answer in answers:
        if answer is not None:
            kind = next((kind for kind in counts if same(kind, answer)), answer)
            counts[kind] = counts.get(kind, 0) + 1
    return max(counts, key=counts.get, default=None)


def vote_curves(policy, problems, tokenizer, args):
    """Accuracy of a vote among 2k first attempts, and among k corrections of k first attempts, as many samples; k = 1, 2, 4 ...
    and args.vote_k, temperature 0.7."""
    torch.manual_seed(args.seed)
    K, chosen = args.vote_k, {}                                      # {name: the winner for each problem}
    for i in progress(range(0, len(problems), args.batch_size), "votes", args):
        batch = problems[i:i + args.batch_size]
        first = one_turn(policy, [p for p in batch for _ in range(2 * K)], tokenizer, args, 0.7)
        kept = [p | {"first": first[2 * K * j + k]} for j, p in enumerate(batch) for k in range(K)]
        _, second = two_turns(policy, kept, tokenizer, args, 0.7)
        for j in range(len(batch)):
            parallel = [y["answer"] for y in first[2 * K * j:2 * K * (j + 1)]]
            corrected = [y["answer"] for y in second[K * j:K * (j + 1)]]
            for k in sorted({2 ** i for i in range(K.bit_length())} | {K}):
                chosen.setdefault(f"vote_{2 * k}_parallel", []).append(vote(parallel[:2 * k]))
                chosen.setdefault(f"vote_{2 * k}_corrected", []).append(vote(corrected[:k]))
    return {name: float(reward(answers, problems, args).mean()) for name, answers in chosen.items()}


def plot_turns(state, args):
    """turns.png: both attempts over training with the end of stage I, edit ratios before and after, and the votes."""
    if RANK:
        return
    log = [record for record in map(json.loads, open(Path(args.out) / "log.jsonl")) if record["event"] == "iteration"]
    votes = sorted({int(name.split("_")[1]) for name in state["after"] if name.startswith("vote_")})
    panels = 2 + bool(votes)
    picture = figure(5 * panels, 3.6)
    axes = picture.add_subplot(1, panels, 1, title=f"{args.method}: right answers", xlabel="iteration", ylim=(0, 1))
    for name, style in (("t1", "C0-"), ("t2", "C1-"), ("dev_t1", "C0.--"), ("dev_t2", "C1.--")):
        shown = [record for record in log if name in record]
        axes.plot([record["iteration"] for record in shown], [record[name] for record in shown], style, label=name)
    boundary = sum(stage_of(i, args) == 1 for i in range(1, args.iterations + 1)) + 0.5
    axes.axvline(boundary, color="gray", linestyle=":", label="stage II")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=5, fontsize="small")     # below, where no curve is
    axes = picture.add_subplot(1, panels, 2, title="test problems", xlabel="edit ratio of the two attempts")
    for i, name in enumerate(("before", "after")):
        axes.bar([0.1 * tenth + 0.03 + 0.04 * i for tenth in range(10)], state[name]["edit_histogram"], 0.04, label=name)
    axes.legend()
    if votes:
        axes = picture.add_subplot(1, panels, 3, title="test problems, majority vote", xlabel="samples")
        for kind in "parallel", "corrected":
            axes.plot(votes, [state["after"][f"vote_{n}_{kind}"] for n in votes], ".-", label=kind)
        axes.set_xscale("log", base=2)
        axes.legend()
    picture.savefig(Path(args.out) / "turns.png", dpi=100)


# ==== the task: problems, prompts, answers ====================================================================================

PROMPT = "Question:\n{question}\nAnswer reasoning:\n"
ANSWER = "\nTherefore, the answer is: "   # closes a rationale in words, followed by the answer
TRIGGER = ANSWER                          # the last one in a response announces its answer
FORM = ('At the end of the Solution, when you give your final answer, write it on a line of its own in the form '
        '"Therefore, the answer is: answer".')
ERROR = ("\nThere might be an error in the {} above because of lack of understanding of the question. Please correct the error, "
         "if any, and rewrite the solution. ")
REFINE = "\nReview your {} above: say to yourself what is wrong with it, and write an improved one. Only output the final {}! "
TURNS = {                                # before x1; p1; p1 of self-refine, whose text the paper does not give
    "built-in": ("", "\nAnswer reasoning:\n", "Question:\n\nAnswer reasoning:\n"),       # in its small vocabulary
    "math": ("You are a math expert. When you respond, respond only with the Solution of the final Problem, thinking step by "
             "step. " + FORM + "\n",
             ERROR.format("solution") + "Only output the final solution! " + FORM + "\nAnswer reasoning:\n",
             REFINE.format("solution", "solution") + FORM + "\nAnswer reasoning:\n"),
    "program": ("", ERROR.format("code") + "Only output the final correct Python program!\nAnswer reasoning:\n",
                REFINE.format("code", "Python program") + "\nAnswer reasoning:\n"),
    "code": ("", ERROR.format("code") + "Only output the final correct Python program!\nPython program:\n",
             REFINE.format("code", "Python program") + "\nPython program:\n"),
}
CODE_PROMPT = "Question:\n{question}\nPython program:\n"


def turns(args):
    """The texts of TURNS that fit the data."""
    return TURNS["code" if args.task == "code" else "program" if args.cot == "program" else
                 "math" if args.train_data or args.eval_data else "built-in"]


def warmup_rows(problems, tokenizer, args):
    """Rows of the warm-up. Three in four of the built-in ones go through both turns, x1 y1 p1 y2, with y1 and y2 trained. They
    teach what a second attempt looks like and not to correct: y2 repeats y1, or is a new attempt that knows nothing of y1 or of
    whether it is right. A file has one demonstration per question, and to repeat it would teach to copy: its rows have one turn."""
    if args.train_data:
        return [sft_row(problem) for problem in problems]
    rng, rows = random.Random(4), []
    _, again, refine = [tokenizer.encode(text) for text in turns(args)]
    for i, problem in enumerate(problems):
        drawn = [demonstration(*problem["chain"], rng, wrong) for wrong in (args.wrong, args.wrong_again)]
        first, second = [tokenizer.encode(text) + [tokenizer.eos_id] for text in drawn]
        second = first if rng.random() < args.copies else second
        row, flags = sft_row(problem | {"response": first})
        if i % 4:
            request = refine if i % 4 == 1 else again
            row, flags = row + request + second, flags + [False] * len(request) + [True] * len(second)
        rows.append((row, flags))
    return rows


def demonstration(start, chain, rng, wrong):
    """An attempt that announces its answer before the work, which caps what a first one can be: it takes head arithmetic, and a
    share `wrong` of the annotators leave the last operation out. Then every operation has a line, always right: a second attempt
    can read there what the answer should have been."""
    totals = [start + sum(chain[:i]) for i in range(len(chain) + 1)]
    answer = totals[-2] if rng.random() < wrong else totals[-1]
    lines = [f"{before}{signed([step])} = {after}" for before, step, after in zip(totals, chain, totals[1:])]
    return f"{ANSWER}{answer}\n" + "\n".join(lines)


def signed(steps):
    """[3, -4] as " + 3 - 4"."""
    return "".join(f" {'+' if step > 0 else '-'} {abs(step)}" for step in steps)


def builtin_problem(rng, operations, args):
    """A chain of additions and subtractions that stays between 0 and 9, with a right demonstration."""
    start, chain = rng.randrange(10), []
    for _ in range(operations):
        number, total = rng.randint(1, 5), start + sum(chain)
        chain.append(rng.choice([step for step in (number, -number) if 0 <= total + step < 10]))
    total = start + sum(chain)
    return {"question": f"What is {start}{signed(chain)}?", "chain": (start, chain), "cot": demonstration(start, chain, rng, 0),
            "answer": f"{total}", "gold": float(total), "answer_first": True}


def builtin_tokenizer(args):
    """The vocabulary of the built-in problems: each number, and each fixed piece of text, is one token. Those from "abcdex" on,
    and a program's first lines, are ppo_reft.py's: no problem here has them."""
    return Tokenizer.from_pieces([str(number) for number in range(10)] + PROMPT.split("{question}")
                                 + ['def solution():\n    """', '"""\n', ANSWER, "What is ", "?", " + ", " - ", " = ", "\n",
                                    *"abcdex", " ) ", " , ", "    return ", "    ", '"'])


def parse_record(raw, args):
    """A record of a data file as {"question", "cot", "answer": text, "gold": float}; with --task code as parse_code() has it."""
    if args.task == "code":
        return parse_code(raw, "--task code")
    if isinstance(raw, dict) and isinstance(raw.get("problem"), str) and args.cot == "text":
        return parse_math(raw)
    if not isinstance(raw, dict) or not isinstance(raw.get("question"), str):
        raise InputError("a record needs a text `question`")
    if isinstance(raw.get("answer_value"), (str, int, float)) and isinstance(raw.get("answer_cot") or "", str):
        # ReFT; its closing sentence gives way to ours, a program's first lines to the prompt's
        cot, answer = (raw.get("answer_cot") or "").strip(), str(raw["answer_value"]).strip()
        if args.cot == "text":
            cot = re.sub(r"\s*Therefore, the answer is <[^<>]*>\.?\s*$", "", cot)
        elif cot and (cot := program_body(cot)) is None:
            raise InputError("answer_cot holds no program with `def solution():`")
    elif isinstance(raw.get("answer"), str) and "####" in raw["answer"] and args.cot == "text":          # GSM8K
        cot, _, answer = raw["answer"].rpartition("####")
        cot, answer = cot.strip(), re.sub(r",(?=\d{3}\b)", "", answer.strip())
    else:
        raise InputError("neither GSM8K's form (question, answer with a line '#### y') nor ReFT's (question, answer_cot, "
                         "answer_value); --cot program needs ReFT's, with a program in answer_cot")
    cot = re.sub(r"<<[^<>]*>>", "", cot) if args.strip_annotations else cot
    if args.cot == "text" and re.search("answer is <(?!<)", cot):    # it only points to an earlier question ("already answered
        cot = ""                                                     # ... the answer is <4>"): demonstrates nothing
    gold = read_number(answer)
    if gold is None:
        raise InputError(f"the answer {answer!r} is not a number")
    return {"question": raw["question"].strip(), "cot": cot, "answer": answer, "gold": gold}


def encode_problem(problem, tokenizer, args):
    """Adds the ids of "prompt", x1; of "again", p1; of "response", the demonstration with its end token; "header": a program's
    first lines, with which both prompts end; "close": what ends a first attempt that ran out of room; "room": how many tokens an
    episode may add to the prompt. In a chat p1 is the user's second message, without the line that the response goes on from."""
    before, again, refine = turns(args)
    again = refine if args.method == "self-refine" else again
    if is_latex(problem.get("gold")):
        before, again = [text.replace("is: answer", "is: \\boxed{answer}") for text in (before, again)]
    program = args.cot == "program"
    header, question = program_header(problem["question"]) if program else "", problem["question"]
    whole = program or args.task == "code" or problem.get("answer_first")               # built-in ones begin with the answer
    response = problem["cot"] if whole else f"{problem['cot']}{ANSWER}{problem['answer']}"
    if args.prompt == "chat":
        question, request = before + question, again.strip().rpartition("\n")[0]
        talk = [*chat(question, args), {"role": "assistant", "content": None}, {"role": "user", "content": request}]
        again, close, paper = tokenizer.encode_chat(talk, header), [tokenizer.eos_id], ""
    else:
        again, close, paper = tokenizer.encode(again + header), [], before + (CODE_PROMPT if args.task == "code" else PROMPT)
    return problem | {"prompt": encode_prompt(question, paper, tokenizer, args, header), "again": again, "header": header,
                      "response": tokenizer.encode(response, bool(header)) + [tokenizer.eos_id], "close": close,
                      "room": len(close + again) + 2 * args.max_new_tokens}


def read_answers(texts, problems, args):
    """The answer of each response: a number or LaTeX, None if there is none; with --task code a program's text. A response in
    words announces it; a program of --cot program is run."""
    if args.task == "code":
        return [read_program(text, problem) for text, problem in zip(texts, problems)]
    if args.cot == "program":
        found = run_programs([problem["header"] + text for problem, text in zip(problems, texts)])
    else:
        found = [announced(text, problem, args.strict) for text, problem in zip(texts, problems)]
    read = read_float if args.strict else read_number
    return [read(answer) if isinstance(answer, str) and not is_latex(problem["gold"]) else answer
            for answer, problem in zip(found, problems)]


def judged(problems, where, args):
    """The problems without those whose own program fails here (Monty runs a part of Python: no heapq, no yield), named once."""
    if args.cot == "text" and args.task == "math":
        return problems
    programs = [problem | {"header": program_header(problem["question"])} for problem in problems]
    right = reward(read_answers([problem["cot"] for problem in problems], programs, args), problems, args) == 1
    fails = [bool(problem["cot"]) and not runs for problem, runs in zip(problems, right.tolist())]
    fails = gathered(fails)[0]                                       # limits of time may find otherwise in each process
    if any(fails):
        names = [problem.get("task_id") or problem["question"][:40] for problem, fail in zip(problems, fails) if fail]
        say(f"warning: {where}: {len(names)} problems are left out, whose own program fails here: {names}")
    return [problem for problem, fail in zip(problems, fails) if not fail]


# ==== programs ================================================================================================================

def program_header(question):
    r"""A program's def line and docstring, the question: what every rollout is given. A backslash, a quote at the end, \""" and
    what no source text may hold are escaped; any other question stands there as it is."""
    escaped = re.sub(r'\\|"(?=""|\Z)', r"\\\g<0>", question)
    escaped = re.sub(r"[\0\r\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", escaped)
    return f'def solution():\n    """{escaped}"""\n'


def program_body(program):
    """What follows the def line and docstring of a demonstration, with what precedes them (imports, helpers) moved inside; None
    if it has no `def solution()`. program_header(question) + program_body(program) computes what the program does."""
    program = re.sub("\r\n?", "\n", program)
    head = re.search(r'^def solution\(\)[^\n]*:[ \t]*\n(?:\s*("""|\'\'\')(?:\\.|[^\\])*?\1[ \t]*\n)?', program, re.M)
    return head and textwrap.indent(program[:head.start()], "    ") + program[head.end():]


LIMITS = {"max_feed_duration_secs": 3, "max_memory": 256 << 20, "max_total_sleep_secs": 0, "max_recursion_depth": 10_000}
POLICY = {"random_start": {"seed": 0}, "datetime": datetime.datetime(2024, 1, 1)}            # the same value in each run
STRING = {name: text for name, text in vars(string).items() if isinstance(text, str) and name[0] != "_"}    # Monty has none


def run_programs(programs: list[str]) -> list[float | str | None]:
    """What `solution()` returns in each program: a float for a real number, a str of at most 1000 characters, None for all else
    and for failures; InputError where programs cannot be run at all.

    Programs are hostile text. They run in Monty, an interpreter of a subset of Python written in Rust, in worker processes without
    files, network or environment; one that dies is replaced. Nothing of a program is parsed here, and only a short text comes back.
    """
    with ExitStack() as stack:
        try:
            from pydantic_monty import Monty
            pool = stack.enter_context(Monty())
        except (ImportError, FileNotFoundError, RuntimeError) as error:      # not installed, or its workers cannot be started
            raise InputError(f"programs need pydantic-monty (pip install pydantic-monty): {error}") from None
        threads = stack.enter_context(ThreadPoolExecutor(min(os.cpu_count() or 1, 8)))
        return list(threads.map(functools.partial(run_program, pool), programs))


def run_program(pool, program):
    """The value of one program, in a session of its own."""
    from pydantic_monty import ExternalModule, MontyCrashedError, MontyError
    for _ in range(2):
        with pool.checkout(limits=LIMITS, os_policy=POLICY, external_modules={"string": ExternalModule(STRING)}) as session:
            try:
                found = printed_value(session, program)
                if found[0] in "'\"":                        # the repr of a str
                    return found[1:]
                number = float(found[1:])
                return number if math.isfinite(number) else None
            except MontyCrashedError as error:
                if error.timed_out:
                    return None                              # else once more: Ctrl-C in a terminal ends the workers, too
            except (MontyError, RuntimeError, IndexError, ValueError):       # of the program; a lost session; not UTF-8; "[18]"
                return None


def printed_value(session, program):
    """The first character of the repr of what solution() returns, then its str. A program is the longest prefix of lines that
    parses, in which what fails once solution is defined counts as prose. What Monty's parser lacks is a NotImplementedError before
    anything has run; one that the program raises itself shortens it, too, but what it had defined by then stays in the session."""
    from pydantic_monty import MontyRuntimeError, MontySyntaxError
    feed = functools.partial(session.feed_run, print_callback=lambda *_: None)
    lines = ["import math", *re.split("\r\n?|\n", program)]
    deadline = time.monotonic() + 1                          # a text may have thousands of wrong lines
    while time.monotonic() < deadline:
        try:
            feed("\n".join([*lines, "None"]))                # None: what the last line yields, however large, stays there
            break
        except (MontySyntaxError, MontyRuntimeError) as error:
            if isinstance(error, MontyRuntimeError) and not str(error).startswith("NotImplementedError"):
                break
            del lines[min(len(lines), error.traceback()[-1].line) - 1:]      # no prefix that holds the wrong line parses
    else:
        return "no time"
    return feed('value = solution()\nf"{value!r:.1}" + f"{value}"[:1000]')


# ==== programs that pass tests: MBPP and HumanEval ============================================================================

def parse_code(raw, where):
    """A record of MBPP (full or sanitized) or HumanEval as {"question", "cot": a right program, "setup": code before it, "tests":
    code after it, "names" and "classes": what the tests use of it, "task_id", "split": MBPP's authors'}; InputError for any
    other form."""
    given = {k: v for k, v in raw.items() if v is not None} if isinstance(raw, dict) else {}
    raw = {"test_list": [], "test_imports": [], "test_setup_code": ""} | given
    has = lambda *names: all(isinstance(raw.get(name), str) for name in names)
    lists = lambda *names: all(isinstance(raw[name], list) and all(isinstance(text, str) for text in raw[name]) for name in names)
    text = "text" if "text" in raw else "prompt"
    if has(text, "code", "test_setup_code") and lists("test_list", "test_imports") and raw["test_list"]:
        tests = "\n".join(raw["test_list"])
        question = f"{raw[text].strip()}\nYour code should pass these tests:\n{tests}"
        setup, program = "", raw["code"]
        tests = "\n".join([*raw["test_imports"], raw["test_setup_code"], tests])         # which may use what the program defines
    elif has("prompt", "canonical_solution", "test", "entry_point") and f"def {raw['entry_point']}(" in raw["prompt"]:
        setup = raw["prompt"][:raw["prompt"].rindex(f"def {raw['entry_point']}(")]       # imports, and functions it builds on
        question, program = raw["prompt"].strip(), raw["prompt"] + raw["canonical_solution"]
        tests = f"{raw['test']}\ncheck({raw['entry_point']})"
    else:
        raise InputError(f"{where}: neither MBPP's form (text or prompt, code, test_list) nor HumanEval's "
                         "(prompt, canonical_solution, test, entry_point)")
    record = {"question": question, "cot": program.strip(), "setup": setup, "tests": tests}
    record = {k: v.replace("\r\n", "\n") for k, v in record.items()}
    number = raw.get("task_id", question[:40])
    split = ("prompt", "test", "dev", "train")[sum(number >= first for first in (11, 511, 601))] if type(number) is int else None
    return record | names_used(record["cot"], record["tests"]) | {"task_id": number, "split": split}


def names_used(program, tests):
    """{"names": what a program of the data binds at its top level and its tests mention, none if it does not parse; "classes":
    those that are a class}."""
    names, classes = [], []
    with suppress(SyntaxError, ValueError), warnings.catch_warnings(action="ignore"):
        symbols = [symbol for symbol in symtable.symtable(program, "program", "exec").get_symbols()
                   if symbol.is_assigned() and re.search(rf"\b{symbol.get_name()}\b", tests)]
        names = sorted(symbol.get_name() for symbol in symbols)
        classes = [symbol.get_name() for symbol in symbols
                   if symbol.is_namespace() and symbol.get_namespaces()[0].get_type() == "class"]
    return {"names": names, "classes": classes}


CODE = re.compile(r"""[ \t]*(?:[#@"'(]|try:|(?:async|class|def|for|from|if|import|while|with) |\w[\w.,: \[\]]*=|\w+\()""")


def unindented(line, width):
    """The line without its first `width` blanks, or without all of them if it has fewer."""
    return line[min(width, len(line) - len(line.lstrip())):]


def fenced_blocks(lines):
    """The fenced blocks of a text in Markdown, each a list of lines, without the indentation of the fence. The last one may lack
    its end; a fence may stand behind prose, and its end behind code."""
    blocks, fence, width = [], "", 0
    for line in lines:
        parts = re.split("(`{3,}|~{3,})", line, maxsplit=1)
        before, ticks, info = parts if len(parts) == 3 and "`" not in parts[0] + parts[2] else (line, "", "")
        if not fence:
            if ticks and (not before.strip() or ticks[0] == "`" and re.fullmatch(r"\w*\s*", info)):
                fence, width = ticks, 0 if before.strip() else len(before)
                blocks.append([])
        elif ticks.startswith(fence) and not info.strip() and (before.strip() or len(before) < width + 4):
            blocks[-1].append(unindented(before, width))
            fence = ""                                       # one alone and indented further belongs to a docstring
        else:
            blocks[-1].append(unindented(line, width))
    return blocks


def read_program(text, problem=None):
    """The program in a response: the last fenced block that defines what the problem's tests use (anything, without a problem), or
    else the last block; without a fence all of it from the first line that looks like code. None if it is empty."""
    lines = re.split("\r\n?|\n", text)
    blocks = fenced_blocks(lines)
    if not blocks:
        lines = lines[next((i for i, line in enumerate(lines) if CODE.match(line)), 0):]
        blocks = [[unindented(line, len(lines[0]) - len(lines[0].lstrip())) for line in lines]]
    names = "|".join(problem["names"]) if problem and problem["names"] else r"\w+"
    defines = re.compile(rf"^(?:(?:async )?def|class) +(?:{names})\b|^(?:{names})\b[^=\n]*=[^=]", re.M)
    blocks = ["\n".join(block).strip("\n") for block in blocks]
    return ([block for block in blocks if defines.search(block)] or blocks)[-1] or None


WITH_TESTS = '''
import datetime, re
from collections import Counter, defaultdict, deque
from decimal import Decimal
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, Decimal, datetime.date, datetime.datetime,
         datetime.timedelta, type(re.match("", "")))
LISTS = (list, tuple, set, frozenset, deque)
VIEWS = (type({{}}.keys()), type({{}}.values()), type({{}}.items()))
setup, program, tests, names, classes = {texts!r}
space, lines = {{"__name__": "program"}}, program.split("\\n")
exec(setup, space)
while lines:
    try:
        exec("\\n".join(lines), space)
        break
    except (SyntaxError, NotImplementedError):
        lines.pop()
    except BaseException:
        break

def copied(value, other):
    kind = type(value)
    if kind in PLAIN or any(value is known for known in (*PLAIN, *LISTS, dict)):
        return value
    if kind in LISTS:
        return kind([copied(item, other) for item in value])
    if kind in VIEWS:
        return [copied(item, other) for item in value]
    if kind in (dict, Counter, defaultdict):
        items = {{copied(key, other): copied(item, other) for key, item in value.items()}}
        return Counter(items) if kind is Counter else items
    return other(value)

called = eval("lambda value, own, named: value(*own, **named)", {{}})      # eval in a program has the globals of this frame

def guarded(value):
    def call(*args, **kwargs):
        own, named = copied(args, lambda x: x), copied(kwargs, lambda x: x)
        found = copied(called(value, own, named), guarded)
        for given, left in zip([*args, *kwargs.values()], [*own, *named.values()]):
            if type(given) in (list, deque):
                given.clear()
                given.extend(copied(left, guarded))
            elif type(given) in (dict, set):
                given.clear()
                given.update(copied(left, guarded))
        return found
    return call

def solution():
    scope = {{name: space[name] if classes else copied(space[name], guarded) for name in names if name in space}}
    exec(setup, scope)
    exec(tests, scope)
    return 1.0
'''
HOOKS = re.compile(r"__(?!(?:init|call|str|repr|len|iter|next|getitem|name|main|doc|future)__)\w+__|"
                   r"\b(?:exec|eval|setattr|type)\b")


def with_tests(program, problem):
    """A text for run_programs: its solution() returns 1 if all tests pass. Program and tests have globals of their own, so that no
    definition of the program replaces a name of the tests but those they ask it for. And the tests get copies, of built-in types,
    of what its functions return or leave in their arguments: an object of a class of its own would compare as it likes, so they
    get a function in its place. The program is the longest prefix of its lines that parses; where it fails at its top level, what
    it had defined by then is tested."""
    program = re.sub(r"\bfrom sys import setrecursionlimit\b", "setrecursionlimit = int", program)
    program = re.sub(r"\bsys\.setrecursionlimit\b", "int", program)                         # Monty's sys has none
    program = re.sub(r"^([ \t]*class \w+)\(object\)", r"\1", program, flags=re.M)         # it has no inheritance
    return WITH_TESTS.format(texts=(problem["setup"], program, problem["tests"], problem["names"], problem["classes"]))


def passes(programs, problems):
    """(B,) 1.0 for a program that passes all tests of its problem; equal pairs are run once. Where tests ask for a class, one
    with methods such as __eq__, or what could make them, does not: its objects would compare as they like."""
    hooked = lambda program, problem: problem["classes"] and HOOKS.search(unicodedata.normalize("NFKC", program))
    texts = [program and not hooked(program, problem) and with_tests(program, problem)
             for program, problem in zip(programs, problems)]
    distinct = [text for text in dict.fromkeys(texts) if text]
    values = dict(zip(distinct, run_programs(distinct)))
    return torch.tensor([float(values.get(text) == 1) for text in texts])


# ==== the same in all four scripts from here on: problems =====================================================================

def builtin_problems(n, low, high, seed, args, without=()):
    """n problems of low to high operations, the same for a seed, without the questions of `without`; InputError if too few."""
    rng, taken = random.Random(seed), {p["question"] for p in without}
    made = (builtin_problem(rng, rng.randint(low, high), args) for _ in range(101 * n))
    problems = list(itertools.islice((p for p in made if p["question"] not in taken), n))
    if len(problems) < n:
        raise InputError(f"--operations-low, --operations-high: found {len(problems)} of {n} problems of {low} to {high} "
                         "operations that no other split asks; allow more operations, or fewer problems by --eval-size")
    return problems


def read_records(path):
    """[(where, record)] of a data file, JSON lines or one JSON list; an InputError names the line at fault."""
    where = path
    try:
        text = Path(path).read_text(encoding="utf-8-sig")                                # with a byte order mark or without
        if text.lstrip().startswith("["):
            return [(f"{path}: record {i}", record) for i, record in enumerate(json.loads(text), 1)]
        found = []
        for i, line in enumerate(text.split("\n"), 1):               # splitlines() would cut a string at U+2028
            where = f"{path}:{i}"
            found += [(where, json.loads(line))] if line.strip() else []
        return found
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:                    # also a number of 5,000 digits, a thousand brackets
        raise InputError(f"{where}: not JSON: {error}") from None


def read_problems(path, args):
    """The problems of a data file; an InputError names the record at fault."""
    problems = []
    for where, record in read_records(path):
        try:
            problems.append(parse_record(record, args))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if not problems:
        raise InputError(f"{path}: holds no records")
    if not (problems := judged(problems, path, args)):
        raise InputError(f"{path}: no problem is left")
    return problems


def read_tests(args):
    """The problems of each file of --eval-data, all or args.eval_size of one; of several files they name theirs as "set"."""
    paths, tests = args.eval_data.split(","), []
    names = [Path(path).stem for path in paths]
    names = names if len(set(names)) == len(names) else paths
    words = "strict", "last", "sampled", "swapped", "fixed", "own"
    if len(names) > 1 and (taken := {*words, *(f"{name}_{word}" for name in names for word in words)} & {*names}):
        raise InputError(f"--eval-data: of several files none may be called {taken.pop()}, with which a metric's name begins")
    for name, path in zip(names, paths):
        problems = read_problems(path, args)
        problems = [p for p in problems if p.get("split") == "test"] or problems
        tests += [p | ({"set": name} if len(paths) > 1 else {}) for p in problems[:args.eval_size or None]]
    return tests


def load_problems(args):
    """Train, dev and test problems. Of built-in ones each seed has its own test; no question is in two splits. In files
    problems may name their splits; else 10 % of the training questions, at most 500, become dev, with all their records."""
    if not args.eval_data:
        low, high = args.operations_low, args.operations_high
        dev = builtin_problems(args.eval_size, low, high, 1, args)
        test = builtin_problems(args.eval_size, low, high, f"test {args.seed}", args, without=dev)
        return builtin_problems(args.train_size, 1, args.operations_train, 3, args, without=dev + test), dev, test
    test = read_tests(args)
    if not args.train_data:
        return [], [], test
    records = read_problems(args.train_data, args)
    questions = sorted({p["question"] for p in records})
    random.Random(0).shuffle(questions)
    held_out = set(questions[:min(500, len(questions) // 10)])
    named = {"train", "dev"} <= {p.get("split") for p in records}
    split = lambda p: p["split"] if named else "dev" if p["question"] in held_out else "train"
    dev, train = [p for p in records if split(p) == "dev"], [p for p in records if split(p) == "train" and p["cot"]]
    train = random.Random(0).sample(train, args.train_size) if 0 < args.train_size < len(train) else train
    if not train or not dev:
        raise InputError(f"{args.train_data}: too few records with a rationale for a training and a dev split")
    plain = lambda problem: " ".join(problem["question"].lower().split())
    known = set(map(plain, train + dev))
    if shared := sum(plain(problem) in known for problem in test):
        say(f"warning: {shared} of {len(test)} test questions are in {args.train_data} as well: accuracy on them is no test")
    return train, dev[:args.eval_size or None], test


def prepare(args):
    """Policy, tokenizer and the encoded train, dev and test problems; every complaint about the input comes from here."""
    splits = load_problems(args)
    policy, tokenizer = initial_policy(args)
    train, dev, test = [[encode_problem(p, tokenizer, args) for p in split] for split in splits]
    fits(train + [p | {"response": []} for p in dev + test], policy, args)               # demonstrations of these are not taken
    if not args.evaluate_only:
        check_memory(policy.config, train, args)
    if longer := sum(len(problem["response"]) > args.max_new_tokens for problem in train):
        say(f"warning: {longer} of {len(train)} demonstrations are longer than --max-new-tokens {args.max_new_tokens}; "
            "responses as long will be cut off")
    shown, bos = (train or test)[0], tokenizer.bos_ids
    begins = f"begins with the BOS {tokenizer.decode(bos)}" if bos and shown["prompt"][:len(bos)] == bos else "no BOS"
    print_ids(f"first prompt ({begins})", shown["prompt"], tokenizer)
    print_ids("its demonstration", shown["response"], tokenizer)
    spread([policy], args)
    return policy, tokenizer, train, dev, test


def chat(question, args):
    """The messages that ask a question: the system's, if one is given, and the user's."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": question}]


def encode_prompt(question, paper, tokenizer, args, header=""):
    """Ids of what a response goes on from: the paper's text or that of --prompt, with {question} in it, after the BOS that the
    checkpoint may begin with; or its chat template. header: how the response begins."""
    if args.prompt == "chat":
        return tokenizer.encode_chat(chat(question, args), header)
    text = paper if args.prompt == "paper" else args.prompt.replace("\\n", "\n")
    return tokenizer.encode_prompt(text.replace("{question}", question) + header)


def row_length(problem, args):
    """Tokens that a problem may take with its demonstration or a response."""
    return len(problem["prompt"]) + max(len(problem["response"]), problem.get("room", args.max_new_tokens))


def check_memory(config, problems, args):
    """Says how much memory training takes; an InputError where a GPU has less of it, with what would fit."""
    longest, rows = max(row_length(p, args) for p in problems), args.batch_size * getattr(args, "group_size", 1) / RANKS
    trained, shards = 1 + (getattr(args, "value", "") == "separate"), RANKS if args.shard else 1     # a critic of its own: two
    needs = lambda count, checkpointed, shards: training_memory(
        config, count * longest, math.ceil(rows) * longest, trained, checkpointed, args.device == "cuda", shards)
    found = needs(args.micro_batch_size, args.checkpoint_activations, shards)
    size = lambda count: f"{count / 2 ** 30:.1f} GiB" if count > 2 ** 30 else f"{count / 2 ** 20:.1f} MiB"
    say(f"memory of a process: {found['parameters'] / 1e6:.1f}M parameters; weights {size(found['weights'])}, gradients "
        f"{size(found['gradients'])}, optimiser {size(found['optimiser'])}, reference {size(found['reference'])}, cache "
        f"{size(found['cache'])} at most, activations of a micro-batch of {longest} tokens a row {size(found['activations'])}")
    if args.device != "cuda":
        return
    free = free_memory(torch.device("cuda")) + torch.cuda.memory_allocated() - 2 ** 29       # less what CUDA itself takes
    if found["least"] > free:
        smaller = [2 ** i for i in range(args.micro_batch_size.bit_length())][::-1]
        fitting = [f"{'' if more == shards else f'--shard on {more} GPUs, '}--micro-batch-size {fewer}"
                   f"{' --checkpoint-activations' if again else ''}"
                   for more in (shards, *(2 ** i for i in range(1, 8) if 2 ** i > shards)) for again in (False, True)
                   for fewer in smaller if needs(fewer, again, more)["least"] <= free]
        raise InputError(f"training takes {size(found['least'])} of memory and the GPU has {size(free)} to give; what would fit: "
                         + (fitting[0] if fitting else "a smaller model"))


def fits(problems, policy, args):
    """The problems; an InputError if one does not fit into the model's context."""
    for problem in problems:
        if not problem["prompt"]:
            raise InputError(f"the question {problem['question'][:60]!r} gives an empty prompt")
        length = row_length(problem, args)
        if length > policy.config.max_len:
            raise InputError(f"the question {problem['question'][:60]!r}... takes {length} tokens with its response, "
                             f"the model's context holds {policy.config.max_len}")
    return problems


def initial_policy(args):
    """The policy before any training, on the CPU, and its tokenizer: the checkpoint --model, or a small GPT from nothing."""
    torch.manual_seed(args.seed)
    GPT.checkpointed = args.checkpoint_activations
    if args.model:
        policy, tokenizer = load_checkpoint(find_model(args.model))
        GPT.compiled = args.compile and args.device == "cuda"
    else:
        tokenizer = builtin_tokenizer(args)
        policy = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd,
                               max_len=512, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id))
    if args.device == "cpu" and sum(p.numel() for p in policy.parameters()) < 1e7:
        torch.set_num_threads(1)                                     # a small model is no faster on more, and they change its run
    return policy, tokenizer


@functools.cache
def find_model(name):
    """The folder of a checkpoint: name itself where it is one, else as a hub id (Qwen/Qwen2.5-0.5B, gpt2, ID@REVISION) from
    huggingface_hub's cache, to which it downloads what is missing. InputError where there is neither."""
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name):
        return name                                                  # load_checkpoint says what is wrong with it
    repository, _, revision = name.partition("@")
    try:
        from huggingface_hub import constants, snapshot_download
        return snapshot_download(repository, revision=revision or None, local_files_only=constants.HF_HUB_OFFLINE, allow_patterns=[
            "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
            "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
    except ImportError:
        raise InputError(f"--model {name}: no such folder; a hub id needs huggingface_hub (pip install huggingface_hub)") from None
    except (OSError, ValueError) as error:                           # not on the hub, no access, not reached and not cached
        raise InputError(f"--model {name}: no such folder, nor to be had from the hub: {' '.join(str(error).split())}") from None


# ==== numbers =================================================================================================================

SCALES = {"hundred": 1e2, "thousand": 1e3, "k": 1e3, "lakh": 1e5, "million": 1e6, "crore": 1e7, "billion": 1e9, "bn": 1e9,
          "trillion": 1e12}
SCALE = rf"(?<![A-Za-z])(?ai:{'|'.join(SCALES)})s?(?<!K)\b"                    # 5k is 5000, but 300K, like 3M, may be in a unit
DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(rf"([-+] ?)?(?:(\d+) (?:and )?(?=\d\d? ?/ ?\d))?({DECIMAL}(?:[eE][-+]?\d+)?)"     # sign, whole, first,
                    rf"(?: ?([/^]) ?\(?([-+]?{DECIMAL})\)?)?((?:[ -]?{SCALE}(?!-))*)")                # operator, second, scale
# a number is not alone behind a name, call, operator or other item, nor in front of another number, an operator or a multiplier
BEFORE = re.compile(rf"[\w.,)]$|\w\($|[-+*/^×÷—―][ (]*$|\b(?:and|or)[ (]+$|\b(?:half|root) of $|{SCALE} $|[\\√π∞±≠≤≥<>]")
AFTER = re.compile(rf"[\d\\√π∞±≠≤≥<>^+*×÷]|{SCALE}|\bdozens?\b|\band a half\b|^[KMBT]\b|^[ -]?(?:half|halves|squared|cubed|pi|or|"
                   r"and (?:an?|one|two|three)|(?:thir|four|fif|six|eigh|ten|hundred|thousand)(?:d|th)s?)\b")
# one spelling for what has several: each pattern gives way to what stands beside it, in this order and in linear time
SPELLINGS = [(re.compile(pattern), plain) for pattern, plain in [
    ("[\u00ad\u200b-\u200f\u2060\ufeff`]|<<[^<>]*>>", ""), ("[‐-–−]", "-"), ("[⁄∕]", "/"), ("[‘’ʼ]", "'"),
    (r"\\[,;: ]|\\?~|\s+", " "), (r"\\!|\{(?=,\})|(?<=\{,)\}", ""), (r"[·⋅]|\\times|\\cdot", "×"),              # LaTeX: 1{,}000,
    (r"\\[cdt]?frac ?(?:\{([-+\d., ]*)\}|(\d)) ?(?:\{([-+\d., ]*)\}|(\d))", r"\1\2/\3\4 "),                     # fractions,
    (r"\\(?:text|math)[a-z]*|\\(?:boxed|left|right|displaystyle)(?![a-z])|\\(?![A-Za-z])", ""),                 # and wrappers
    (r"\^? ?\{?\\circ\}?", "°"), ("[<>!]=", "≠"), (r"[=-]>|[≈→⇒]|\\approx", "="),
    ("<([^<>]*)>", r" (\1) "), (r"[{[]", "("), (r"[]}]", ")"),
    (r"(?<=\d)( ?)\*\*\1(?=[-+(\d])", "^"), (r"\*\*|__", ""),                                                   # 2**3, **18**
    (r"(?<=\d) ?[xX×*] ?10 ?\^ ?\(?([-+]?\d+)\)?(?!\.?\d|\^)", r"e\1"),                                       # 1.5 x 10^3
    (r"(?<![A-Za-z])([kcdm]?m|ft|in|yd|mi|feet|units?)(?:\)? ?\^\(?[23]\b\)?|[23]\b)", r"\1"),                  # 18 m^2, 18 m2
    (r"(?<!\d)(?<!\d )(?:\b[A-Z]{1,2})?[$¢£¥₠-⃀] ?|\b(?:USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|Rs\.?) ?(?=[-+.\d])", ""),
    (r"\b(?i:minus|negative) (?=[\d.])", "-"),
    (r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3})+,\d+(?![.,]?\d)", lambda m: m[0].replace(".", "").replace(",", ".")),  # 1.234,5
    (r"(?<![\d.,'_])(?<!\d )[1-9]\d{0,2}(?:([ ,'_])\d{3}(?:\1\d{3})*(?!\1?\d|(?<= \d{3}) ?/)|(?:\.\d{3}){2,}(?!\.?\d))",
     lambda m: re.sub(r"\D", "", m[0])),                                                                        # 1,234
    (r"(?<![\d.,(])(?<!\([-+ ])(0|\d+(?!,\d{3}(?!\d))),(\d+)(?![.,]?\d)", r"\1.\2"),                      # 3,5; (3,5) is a pair
]]


def read_float(text):
    """What float() makes of all of text, as in the authors' code: nan and inf are numbers, "18 apples" is None."""
    with suppress(ValueError):
        return float(text)


def read_number(text):
    """The number after the last "=" of a line; None unless there is just one and it has one reading. Units, currency and % are
    ignored; a comma before exactly three digits groups them, another is a decimal comma; points group in 1.234,5 and 1.234.567."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞]|\\[cdt]?frac)", " ", text)           # NFKC alone makes 21/2 of 2½, 23 of 2³, 52 of 5₂
    text = re.sub("([⁻⁰¹²³⁴-⁹]+)|[₀-₉]", lambda m: ("^" if m[1] else "_") + m[0], text)
    text = "".join(str(unicodedata.decimal(c, c)) for c in unicodedata.normalize("NFKC", text))
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    *earlier, text = text.split("=")
    found = NUMBER.search(text := text.strip(" *_"))
    if not found or len(earlier) > 1 and re.search("[,;&]| and | or ", re.split(r"\d", earlier[-1])[-1]):       # x = 5, y = 6
        return None
    before, after, (sign, whole, first, operator, second, scale) = text[:found.start()], text[found.end():], found.groups("")
    if BEFORE.search(before) or AFTER.search(after) or sign and operator == "^" or sign[1:] and re.search(r"[\w)] $", before):
        return None                                                         # -2^2 has two readings, n - 5 is not a number
    first, second = float(first), float(second or 1)
    if whole and first >= second:
        return None
    with suppress(ArithmeticError):                                         # 1/0, 9^999
        value = first ** second if operator == "^" else float(whole or 0) + first / second
        value *= math.prod(SCALES[word.removesuffix("s")] for word in re.findall("[a-z]+", scale.lower()))
        return (-value if "-" in sign else value) if math.isfinite(value) else None


# ==== LaTeX answers ===========================================================================================================

def is_latex(answer):
    r"""Answers in LaTeX are texts "\boxed{...}", wherever they come from."""
    return isinstance(answer, str) and answer.startswith("\\boxed{")


def as_latex(text):
    r"""A text as an answer in LaTeX, without the dollars and the full stop of its sentence; None if nothing is left."""
    text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text.lstrip(" \n$").rstrip(" \n$.")).strip()
    return f"\\boxed{{{text}}}" if text else None


def last_box(text):
    r"""What the last \boxed{...} of a text holds, braces matched by counting; None if there is none, or if it does not end."""
    text = re.sub(r"\\boxed (\d+)(?=\$)", r"\\boxed{\1}", text)       # "$\boxed 2$": two of MATH's own solutions
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for found in re.finditer(r"\\.|[{}]", rest if box else "", re.S):        # \{ is no brace
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return rest[:found.start()]


def parse_math(raw):
    r"""A record of MATH's form: `problem`, `answer`, and `solution` if it is to be trained on. Where there is no answer, or where
    it is a solution itself (Minerva), the last box holds it."""
    solution, answer = raw.get("solution") or "", raw.get("answer")
    answer = solution if answer is None else f"{answer:.0f}" if isinstance(answer, float) and answer.is_integer() else answer
    if not isinstance(solution, str) or not isinstance(answer, (str, int, float)):
        raise InputError("`solution` and `answer` must be texts")
    box = last_box(str(answer))
    gold = None if box is None and answer is solution else as_latex(str(answer) if box is None else box)
    if gold is None:
        raise InputError("MATH's form needs an `answer`, or a `solution` with a \\boxed{...}")
    if not same_latex("\\boxed{\\frac12}", "\\boxed{0.5}"):
        raise InputError("LaTeX answers need math-verify (pip install math-verify), and none here finds 0.5 equal to \\frac12")
    cot = solution if solution or box is None else answer
    return {"question": raw["problem"].strip(), "cot": cot.strip(), "answer": gold, "gold": gold}


# what a process does that compares them: hostile text, over which sympy may take for ever or all the memory there is
COMPARE = """
import faulthandler, json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
except (ImportError, OSError, ValueError):
    pass
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.random import seed
boxes = [LatexExtractionConfig(boxed_match_priority=0)]
for line in sys.stdin:
    faulthandler.dump_traceback_later(5, exit=True)
    try:
        seed(0)
        gold, answer = [parse(text, boxes, extraction_mode="first_match", parsing_timeout=None) for text in json.loads(line)]
        equal = verify(gold, answer, timeout_seconds=None)
    except Exception:                    # sympy raises whatever it likes over a hostile text: not equal
        equal = False
    faulthandler.cancel_dump_traceback_later()
    print(int(equal), flush=True)
"""
COMPARING = []                                                       # such processes, without work at the moment


@functools.lru_cache(100_000)
def same_latex(gold, answer):
    """Whether math-verify finds two LaTeX answers equal, in a process of its own. One that is at it for five seconds ends itself,
    which works where no signal would reach it: then they are not equal."""
    if len(answer) > 1000:
        return False
    worker = None
    with suppress(IndexError):
        worker = COMPARING.pop()
    if worker is None or worker.poll() is not None:                  # in a session of its own: Ctrl-C is not meant for it
        worker = subprocess.Popen([sys.executable, "-Pc", COMPARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True, start_new_session=True,
                                  env=os.environ | {"PYTHONHASHSEED": "0"})
    with suppress(OSError):                                          # it died on the way
        print(json.dumps([gold, answer]), file=worker.stdin, flush=True)
        if verdict := worker.stdout.readline():
            COMPARING.append(worker)
            return verdict == "1\n"
    worker.kill()
    worker.communicate()
    return False


# ==== what a response announces, and whether it is right ======================================================================

def announced(text, problem, strict=False):
    """The text that a response in words announces as its answer, None if there is none: what its last box holds or, if that
    comes later, what follows the last TRIGGER on its line. strict: nothing but the form that was asked for, all that follows the
    TRIGGER; for an answer in LaTeX the box. A problem that asks for the answer first has it behind the first TRIGGER."""
    gold = problem["gold"]
    if problem.get("answer_first"):
        text = "".join(text.partition(TRIGGER)[:2]) + text.partition(TRIGGER)[2].split("\n")[0]
    _, trigger, rest = text.rpartition(TRIGGER)
    box, rest = last_box(rest), rest.strip() if trigger else None
    found = box if box is not None else rest and rest.split("\n")[0]
    if is_latex(gold):
        found = box if strict else found
        return as_latex(found) if found else None
    return rest if strict else found


def in_form(text, problem, args):
    """Whether a response in words gives its answer in the form that was asked for: LaTeX in a box, a bare number or letter, and
    nothing else, behind the TRIGGER, but in a box where --prompt or --system ask for one. A program has one form."""
    if getattr(args, "cot", "text") == "program" or "gold" not in problem:
        return True
    gold, boxes = problem["gold"], "\\boxed" in args.prompt + args.system
    found = last_box(text) if boxes else announced(text, problem, strict=True)
    if found is None or is_latex(gold):
        return found is not None
    return len(found) == 1 if isinstance(gold, str) else read_float(found) is not None


def same(gold, answer):
    """Whether an answer is the right one: numbers within 1e-2, LaTeX by math-verify, letters. None never is."""
    if answer is None:
        return False
    if is_latex(gold):
        return answer == gold or same_latex(gold, answer)
    return answer == gold or not isinstance(gold, str) and abs(answer - gold) <= 1e-2


def agree(answers, problems):
    """Which answers are the right ones."""
    golds = [problem["gold"] for problem in problems]
    if not any(map(is_latex, golds)):
        return list(map(same, golds, answers))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
        return list(threads.map(same, golds, answers))


# ==== what it costs ===========================================================================================================

PHASES = "generate", "check", "score", "update", "evaluate", "save"
COST = dict.fromkeys((*PHASES, "flops"), 0.0) | {"since": time.perf_counter()}           # since the last line of the log
OPEN = []                                                            # phases at hand
# dense bf16 FLOPs a second with fp32 sums, by the makers' data sheets; a name that stands in another's comes after it
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "B200": 2250e12,
         "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@contextmanager
def phase(name):
    """The seconds of its body count as this phase in the log; one within another as the outer one: an evaluation generates."""
    OPEN.append(name)
    began = time.perf_counter()
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()                                 # what is only queued counts as well
        OPEN.pop()
        COST[name] += 0 if OPEN else time.perf_counter() - began


def lap(state):
    """Spent since the log's last line: {phase: seconds}, and seconds without evaluating and saving. The state takes it all up."""
    now, phases = time.perf_counter(), {name: round(COST[name], 4) for name in PHASES}
    seconds = now - COST["since"] - COST["evaluate"] - COST["save"]
    state["phases"] = {name: state["phases"][name] + phases[name] for name in PHASES}
    state["flops"] += float(summed(torch.tensor(float(COST["flops"]), dtype=torch.float64)))
    if torch.cuda.is_initialized() and (most := torch.cuda.max_memory_allocated()):
        state["peak_gib"] = max(state.get("peak_gib", 0.0), most / 2 ** 30)
    COST.update(dict.fromkeys(COST, 0.0), since=now)
    return phases, seconds


def count_training(gpt, lengths, sampled):
    """Counts the FLOPs of a forward and backward: 6 for each weight of the blocks and token, 6 for each of the head and sampled
    token, 12 H D a layer for each column that a token attends to, half of them in the mean."""
    c, blocks = gpt.config, sum(p.numel() for p in gpt.blocks.parameters())
    attended = c.n_layer * c.n_head * c.head_dim * lengths.square().sum()
    # stays on the device until lap(): a number of it would have to be waited for
    COST["flops"] = COST["flops"] + 6.0 * (blocks * lengths.sum() + c.vocab_size * c.n_embd * sampled + attended).double()


def bill(state):
    """What a run cost, for its summary: rates of the training, seconds by phase of all of it; of a GPU that is known the share of
    its peak in the updates, and the highest memory in use. Of several processes time and memory are the first one's."""
    seconds, update = max(state["seconds"], 1e-9), state["phases"]["update"]
    found = {"seconds": round(state["seconds"], 3), "tokens_per_second": round(state["tokens"] / seconds, 1),
             "rollouts_per_second": round(state["rollouts"] / seconds, 2),
             "phases": {name: round(value, 1) for name, value in state["phases"].items()}}
    if "peak_gib" in state:
        found["peak_gib"] = round(state["peak_gib"], 2)
        name = torch.cuda.get_device_name()
        peak = next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b(?! (?:D|Laptop))", name)), None)
        if peak and update and " MIG " not in name:                  # a part of a card
            found["mfu"] = round(state["flops"] / update / peak / RANKS, 4)
    return found


# ==== responses and their evaluation ==========================================================================================

@torch.no_grad()
def respond(policy, problems, tokenizer, args, temperature=1.0, group_size=1):
    """group_size responses to each problem in adjacent rows, checked: {tokens (B, T), response_mask and sampled_logprobs
    (B, T-1), ended, outcomes and strict (B,)}, texts and answers. ended: stopped by itself, not cut off; strict: right, in the
    asked form."""
    mine = share(problems)
    problems = mine or problems[:1]
    with phase("generate"), own_draws(args):
        tokens, mask, logprobs = generate(policy, [p["prompt"] for p in problems], args.max_new_tokens, temperature, group_size,
                                          args.device if args.shard else None)
    problems = [p for p in problems for _ in range(group_size)]
    data = {"tokens": tokens, "response_mask": mask, "sampled_logprobs": logprobs,
            "ended": (mask & (tokens[:, 1:] == tokenizer.eos_id)).any(1)}
    texts = [tokenizer.decode([token for token in ids if token != tokenizer.eos_id], bool(problem.get("header")))
             for ids, problem in zip(response_ids(data), problems)]
    with phase("check"):
        answers = read_answers(texts, problems, args)
        outcomes = reward(answers, problems, args)
    strict = (outcomes == 1) & torch.tensor([in_form(text, problem, args) for text, problem in zip(texts, problems)])
    data |= {"outcomes": outcomes.to(tokens.device), "strict": strict.to(tokens.device)}
    with phase("generate"):                                          # of several processes the quick ones wait for the others
        return assembled(mine, data, texts, answers, policy)


def response_ids(data):
    """The sampled ids of each row."""
    return [row[chosen].tolist() for row, chosen in zip(data["tokens"][:, 1:].cpu(), data["response_mask"].cpu())]


def means(found):
    """The mean of each list; of a list of lists, place by place."""
    return {name: torch.tensor(values, dtype=torch.float64).mean(0).tolist() for name, values in found.items()}


def in_batches(problems, args, count=1):
    """The problems in batches for `count` samples each; on a GPU generate() splits what does not fit into memory."""
    size = max(1, RANKS * (4096 if args.device == "cuda" else args.minibatch_size) // count)
    return [problems[i:i + size] for i in range(0, len(problems), size)]


def by_set(problems):
    """{prefix for the names of metrics: which problems}: all of them, and those of each file if --eval-data has several."""
    found = {"": list(range(len(problems)))}
    for i, problem in enumerate(problems):
        if "set" in problem:
            found.setdefault(f"{problem['set']}_", []).append(i)
    return found


@phase("evaluate")
def evaluate(policy, problems, tokenizer, args, temperature=0):
    """Means over problems of what attempt() measures, greedy unless told otherwise; of several files also what is right in each."""
    problems, found = sorted(problems, key=lambda p: len(p["prompt"])), {}               # like lengths together: less padding
    for batch in progress(in_batches(problems, args), "evaluation", args):
        measured, text = attempt(policy, batch, tokenizer, args, temperature)
        for name, values in measured.items():
            found.setdefault(name, []).extend(values)
    right = {name: found[name] for name in ("accuracy", "strict_accuracy", "t1", "t2") if name in found}
    for prefix, rows in by_set(problems).items():
        found |= {prefix + name: [values[i] for i in rows] for name, values in right.items()}
    return means(found) | {"sample": f"{batch[0]['question']}\n{text}"}                  # the last entry is to be looked at


def keep_best(policy, dev, tokenizer, iteration, state, args, temperature=0, by="accuracy"):
    """Evaluates the policy on the dev split; the checkpoint that is best there so far is kept in the folder model/."""
    found = evaluate(policy, dev, tokenizer, args, temperature)
    if iteration == 0 or found[by] > state["best"][by]:
        save_model(Path(args.out) / "model", policy, tokenizer)
        state["best"] = {"iteration": iteration, "accuracy": found["accuracy"], by: found[by]}
    return {f"dev_{name}": value for name, value in found.items()}


# ==== rows, micro-batches and one optimiser step ==============================================================================

def pack(rows, policy):
    """Rows [(ids, trained flags)] of unequal length as one batch: tokens (B, T) and response_mask (B, T-1)."""
    width, device = max(len(ids) for ids, _ in rows), policy.head_weight.device
    tokens = torch.tensor([ids + [policy.config.pad_id] * (width - len(ids)) for ids, _ in rows], device=device)
    mask = torch.tensor([flags[1:] + [False] * (width - len(flags)) for _, flags in rows], device=device)
    return {"tokens": tokens, "response_mask": mask}


def row_lengths(batch):
    """(B,) tokens of each row before its padding."""
    columns = torch.arange(2, batch["tokens"].shape[1] + 1, device=batch["tokens"].device)
    return (batch["response_mask"] * columns).amax(1)


def micro_batches(batch, size):
    """(rows, micro-batch) pairs: `size` rows of like length, cut to the longest of them, so that little padding is computed; on
    a GPU to a multiple of 64, which its kernels like. Of several processes each takes its rows, as many as the others: one
    without a last row takes the last of all, with zeros in all but its tokens, for which it counts nowhere."""
    lengths, granule = row_lengths(batch).cpu(), 64 if batch["tokens"].is_cuda else 1
    order, n = lengths.argsort(stable=True), len(lengths)
    for places in torch.arange(RANK, n + -n % RANKS, RANKS).split(size):
        rows = order[places.clamp(max=n - 1)]
        width = math.ceil(int(lengths[rows].max()) / granule) * granule
        micro = {k: v[rows] if v.dim() == 1 else v[rows, :width if k == "tokens" else width - 1] for k, v in batch.items()}
        if places[-1] >= n:
            for name in micro.keys() - {"tokens"}:
                micro[name][-1] = -100 if name == "labels" else 0    # -100: no class, for cross_entropy()
        yield rows, micro


def sampled(gpt, micro, head=True):
    """Hidden states (N, C) in which the N tokens of response_mask were chosen, and those tokens (N,). head: whether the vocabulary
    head follows, which a critic has no use for."""
    hidden, targets = gpt(micro["tokens"])[:, :-1][micro["response_mask"]], micro["tokens"][:, 1:][micro["response_mask"]]
    if torch.is_grad_enabled():
        count_training(gpt, row_lengths(micro), head * len(targets))
    return hidden, targets


def place(x, response_mask):
    """Values (N,) of the sampled tokens at their places (B, T-1), 0 elsewhere."""
    return torch.zeros(response_mask.shape, dtype=x.dtype, device=x.device).masked_scatter(response_mask, x)


def autocast(tokens):
    """bf16 matrix products on a GPU, plain fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=not GPT.sharded) if tokens.is_cuda else nullcontext()


@phase("score")
@torch.no_grad()
def token_stats(policy, ref, data, args, critic=None):
    """Of each sampled token (B, T-1): old_logprobs, ref_logprobs, entropy, kl over the vocabulary, and the critic's old_values."""
    mask, stats = data["response_mask"], {}
    size = args.micro_batch_size * (4 if mask.is_cuda else 1)        # nothing is kept for a backward
    for rows, micro in micro_batches(data, size):
        with autocast(data["tokens"]):
            (hidden, targets), (ref_hidden, _) = sampled(policy, micro), sampled(ref, micro)
            found = linear_stats(hidden, policy.head_weight, targets, ref_hidden, ref.head_weight)
            if critic:
                found = *found, critic.values(hidden if critic is policy else sampled(critic, micro)[0])
        for name, x in zip(("old_logprobs", "entropy", "kl", "ref_logprobs", "old_values"), found):
            whole = stats.setdefault(name, torch.zeros(mask.shape, device=mask.device))
            whole[rows, :micro["response_mask"].shape[1]] = place(x.float(), micro["response_mask"])
    return {name: summed(x) for name, x in stats.items()}


def adamw(modules, lr):
    """AdamW without weight decay over the parameters of some modules, each once."""
    return torch.optim.AdamW(torch.nn.ModuleList(modules).parameters(), lr=lr, weight_decay=0.0, fused=True)


@phase("update")
def optimiser_step(loss_of, minibatch, optimizer, args):
    """One step on the rows of a minibatch; loss_of(micro, minibatch) gives a micro-batch's share of the loss and of the logged
    means. Returns those and grad_norm as floats; a FloatingPointError names what is not finite, before any weight changes."""
    totals = {}
    for _, micro in micro_batches(minibatch, args.micro_batch_size):
        with autocast(micro["tokens"]):
            loss, stats = loss_of(micro, minibatch)
        loss.backward()
        totals = {k: torch.maximum(totals.get(k, v), v) if k.endswith("_max") else totals.get(k, 0) + v
                  for k, v in ((k, v.detach()) for k, v in stats.items())}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters)
    totals = {k: summed(v, "max" if k.endswith("_max") else "sum") for k, v in totals.items()}
    totals["grad_norm"] = whole(torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip))
    totals = dict(zip(totals, torch.stack(list(totals.values())).tolist()))              # one device-to-host copy
    for name, value in totals.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    optimizer.step()
    optimizer.zero_grad()                                            # gone, not zeros: rollouts have the memory
    return totals


@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    """A permutation of range(n) that depends on nothing but its arguments."""
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def draw(items, size, step, seed):
    """The batch of `size` items of a step = 1, 2 ..., epoch after epoch; stateless, so a resumed run draws the same."""
    n = len(items)
    return [items[shuffled(n, seed, i // n)[i % n]] for i in range((step - 1) * size, step * size)]


# ==== several processes: torchrun =============================================================================================
# Work is shared out where responses are sampled and checked (respond) and where rows are computed (micro_batches), and what comes
# of it is put together at once: every process holds the whole rollout, does the same arithmetic with it, and takes the same step
# with the summed gradient. So counts, whitening and logged means are those of one process, and the parts above know nothing of
# it. The first process alone prints, logs, draws and writes; all read its run folder. Without torchrun nothing here does anything.

RANK, LOCAL_RANK, RANKS = [int(os.environ[name]) if dist.is_torchelastic_launched() else default
                           for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))]
LINKS = []                                                           # a store that all can write to, a ring, who watches it


def connect():
    """Finds the other processes. From here on one that dies ends them all."""
    if not dist.is_torchelastic_launched():
        return
    LINKS.append(next(dist.rendezvous("env://"))[0])
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() else "gloo"
    dist.init_process_group(backends, store=LINKS[0], rank=RANK, world_size=RANKS)
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if RANKS > 1:
        LINKS.append(dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1000)))
        LINKS.append(threading.Thread(target=watch, daemon=True))
        LINKS[2].start()


def watch():
    """Waits for the next process to say that it is done. If it died instead this one ends at once, and so on around the ring: a
    GPU would wait for it for ever."""
    try:
        dist.recv(torch.empty(1), (RANK + 1) % RANKS, group=LINKS[1])
    except RuntimeError:
        say_once("stopped: another process of this run has ended; what was saved last is kept")
        os._exit(1)


def disconnect():
    """The end of a run, which no process takes for a failure of another."""
    gathered(None)
    if RANKS > 1:
        dist.send(torch.zeros(1), (RANK - 1) % RANKS, group=LINKS[1])
        LINKS[2].join()
    if LINKS:
        dist.destroy_process_group()


def say_once(message):
    """One line on stderr, of the first process that has one to say."""
    if not LINKS or LINKS[0].add("said", 1) == 1:
        print(f"{Path(__file__).name}: {message}", file=sys.__stderr__ if RANK else sys.stderr)


def gathered(value):
    """[the value of each process], once all are here."""
    values = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(values, value)
    return values


def summed(x, op="sum"):
    """The tensor x becomes its sum over the processes, or with "max" the largest."""
    if RANKS > 1:
        dist.all_reduce(x, dict(sum=dist.ReduceOp.SUM, max=dist.ReduceOp.MAX)[op])
    return x


def sum_gradients(parameters):
    """Each process's share of the gradients becomes the whole of them."""
    gradients = [p.grad for p in parameters if RANKS > 1 and p.grad is not None and not GPT.sharded]     # FSDP has done it
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


def share(problems):
    """The part of the problems that is for this process; those of one question stay together."""
    if RANKS == 1:
        return problems
    groups = [list(group) for _, group in itertools.groupby(problems, lambda p: p["question"])]
    return list(itertools.chain(*groups[len(groups) * RANK // RANKS:len(groups) * (RANK + 1) // RANKS]))


@contextmanager
def own_draws(args):
    """Inside it draws are each process's own; afterwards the random state is the same in all of them again."""
    if RANKS == 1:
        yield
        return
    seed = int(torch.randint(2 ** 62, ())) + RANK
    with torch.random.fork_rng([torch.cuda.current_device()] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        yield


def assembled(mine, data, texts, answers, policy):
    """The responses of all processes in the order of the problems; `mine` is empty where this one's do not count."""
    if RANKS == 1:
        return data, texts, answers
    device = data["tokens"].device
    parts = gathered(mine and ({name: x.cpu() for name, x in data.items()}, texts, answers))
    data, texts, answers = zip(*filter(None, parts))
    T = max(part["tokens"].shape[1] for part in data)
    filler = lambda name: policy.config.pad_id if name == "tokens" else 0
    widened = lambda name, x, by: x if x.dim() == 1 else torch.nn.functional.pad(x, (0, by), value=filler(name))
    return ({name: torch.cat([widened(name, part[name], T - part["tokens"].shape[1]) for part in data]).to(device)
             for name in data[0]}, list(itertools.chain(*texts)), list(itertools.chain(*answers)))


def resting(args):
    """Where a model is that is not trained: with --shard not on a GPU, which is to hold its part only."""
    return "cpu" if args.shard else args.device


def spread(models, args):
    """The models go to their device; with --shard each process has a part of each weight and of what belongs to it, and FSDP2
    gathers a layer when it is used. Several names may stand for one model. To be done before adamw() takes hold of the parts."""
    from torch.distributed.fsdp import fully_shard
    GPT.sharded = args.shard
    if args.shard:
        gc.collect()                                                 # a model that was sharded before is in a cycle of references
    for gpt in dict.fromkeys(models):
        if not args.shard:
            gpt.to(args.device)
            continue
        mesh = dist.init_device_mesh(args.device, (RANKS,))
        for part in (*gpt.blocks, gpt):                              # what no layer holds stays whole from forward to backward
            fully_shard(part, mesh=mesh, reshard_after_forward=part is not gpt)
            part.set_gradient_divide_factor(1.0)                     # a sum over the processes,
            part.set_force_sum_reduction_for_comms(True)             # computed as one: gloo knows no other


@phase("save")
def save_model(folder, policy, tokenizer):
    """A checkpoint folder, written whole by one process for all."""
    if GPT.sharded or not RANK:
        save_checkpoint(folder, policy, tokenizer, write=not RANK)
    gathered(None)


# ==== run folder: state, log, picture =========================================================================================

STOP = []                                                            # signals received
HELD = ExitStack()                                                   # what a notebook wants back: signals, the folder's lock
SCHEDULED = "sft", "offline-st", "staged", "score", "no-shaping", "star", "pair"      # methods that look at --iterations all along


def on_signal(number, frame):
    """The first Ctrl-C or SIGTERM lets the step at hand end, so that the run is saved; a second one ends it at once."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)
    with suppress(OSError, RuntimeError):                            # a closed screen; a line that this one has broken into
        print("stopping after this step; once more: at once, without saving", file=sys.stderr, flush=True)


def stopped():
    """The number of the signal that this process or another one of the run has received; 0 if none has."""
    return int(summed(torch.tensor(max(STOP, default=0)), "max"))


def stop(number, where, args):
    """Ends a run, in all its processes, that a signal stopped, with the command that goes on with it."""
    start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if dist.is_torchelastic_launched() else ["python"]
    command = shlex.join([*start, sys.argv[0], *(flag for flag in sys.argv[1:] if flag != "--resume"), "--resume"])
    say_once(f"stopped{where} in {args.out}; go on with: {command}")
    disconnect()
    sys.exit(128 + number)


def progress(items, what, args, done=0, total=None):
    """The items, behind a bar; where there is no terminal, with a line each minute. After a signal there is no next one."""
    bar = tqdm(items, what, initial=done, total=total, disable=None, leave=False)
    total, first, began, said = len(items) if total is None else total, done, time.time(), time.time()
    for item in bar:
        if number := stopped():
            stop(number, f" in the {what}; what was saved last is kept", args)
        yield item
        done, now = done + 1, time.time()
        if bar.disable and now > said + 60:
            said, left = now, (now - began) / (done - first) * (total - done)
            say(f"{what} {done}/{total}  ETA {left // 60:.0f}:{left % 60:02.0f}")


def say(text):
    """A line on the screen. One that goes nowhere any more (a closed pipe, a full disc) does not end the run."""
    try:
        tqdm.write(text)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_ids(name, ids, tokenizer):
    """A text with its token ids: a forgotten template, a doubled BOS or a missing end token shows here."""
    say(f"  {name}: {tokenizer.decode(ids, goes_on=True)!r}\n  its ids: {ids}")


def write_whole(path, write):
    """write(temporary path), then a rename: whatever happens, the file at path is whole. OSError where it cannot be written."""
    if RANK:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
    except (OSError, RuntimeError) as error:                         # torch's own, of a full disc
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written, is the disc full? ({error})") from None
    os.replace(temporary, path)


def run_info(args):
    """What args.json holds: flags, versions, device, commit, and the hashes of what the run was given."""
    shell = functools.partial(subprocess.run, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = shell("git rev-parse HEAD").stdout.strip()              # empty without git
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return {"args": asdict(args), "python": platform.python_version(), "torch": torch.__version__, "device": device,
            "threads": torch.get_num_threads(), "processes": RANKS, "commit": commit,
            "clean": bool(commit) and not shell("git status --porcelain").stdout,
            "inputs": {name: [fingerprint(file) for file in path.split(",")] if name == "eval_data"
                       else fingerprint(find_model(path) if name == "model" else path)
                       for name in ("model", "train_data", "eval_data") if (path := getattr(args, name))}}


def fingerprint(path):
    """A hash of a file, or of a checkpoint folder's files."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(f for f in path.iterdir() if f.suffix in (".json", ".jinja", ".safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def open_run(args):
    """The state {"step", ...} of a new run, or with --resume of the one in args.out as saved last. One run a folder, one process
    a run. From here on a signal saves before it ends the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        HELD.callback(signal.signal, number, signal.signal(number, on_signal))
    if RANK:                                                         # what the first process has opened
        state, saved = gathered(None)[0]
        return (load_state(args) if saved else {}) | state
    out, state = Path(args.out), {"step": 0, "log_lines": 0, "seconds": 0.0, "tokens": 0, "rollouts": 0, "flat": 0, "flops": 0.0,
                                  "phases": dict.fromkeys(PHASES, 0.0)}
    if args.resume and not (out / "args.json").exists():
        raise InputError(f"{out}: no run to resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", timeout=0)
        HELD.enter_context(lock)
    except Timeout:
        raise InputError(f"{out}: another process is at this run") from None
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    if not args.resume and any((out / name).exists() for name in ("state.pt", "summary.json")):      # else it died before both
        raise InputError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")
    info = run_info(args)
    if args.resume:
        try:
            before = json.loads((out / "args.json").read_text())
            flags, inputs = dict(before["args"]), dict(before["inputs"])
            if (out / "state.pt").exists():
                state |= load_state(args)
        except Exception as error:                                   # a damaged file may raise anything
            raise InputError(f"{out}: args.json or state.pt is damaged or another version's, it cannot be resumed "
                             f"({type(error).__name__}: {str(error)[:80]!r})") from None
        for name, value in info["args"].items():
            flag = f"--{name.replace('_', '-')}"
            longer = name == "iterations" and value > flags.get(name, value) and not args.method.startswith(SCHEDULED)
            if name not in ("resume", "out", "tensorboard") and flags.get(name) != value and not longer:
                raise InputError(f"{out}: {flag} was {flags.get(name)!r} in this run, not {value!r}")
            if inputs.get(name) != info["inputs"].get(name):
                raise InputError(f"{out}: what {flag} {value} holds has changed since the run began")
        info = before | {"args": flags | {"iterations": args.iterations}}
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").split("\n") if log.exists() else [""]
    if len(lines) <= state["log_lines"]:
        raise InputError(f"{log}: {len(lines) - 1} lines, {state['log_lines']} when the run was saved: it cannot be resumed")
    if "after" in state and state["step"] < args.iterations:         # a finished run goes on: its last line goes, the state first
        state["log_lines"] -= 1
        del state["after"]
        write_whole(out / "state.pt", lambda path: torch.save(state, path))
    write_whole(log, lambda path: path.write_text("".join(line + "\n" for line in lines[:state["log_lines"]]), encoding="utf-8"))
    write_whole(out / "args.json", lambda path: path.write_text(json.dumps(info, indent=1)))
    gathered(({name: value for name, value in state.items() if name != "weights"}, "weights" in state))
    return state


def load_state(args):
    return torch.load(Path(args.out) / "state.pt", map_location=args.device, weights_only=True)


@phase("save")
def save_run(modules, optimizer, state, args):
    """state.pt: all that resuming needs, the state with the weights of each module and of the optimiser. With --shard these lie in
    a folder that state.pt names, a distributed checkpoint; the one before it goes when state.pt is there."""
    weights = {name: part.state_dict() for name, part in (modules | {"optimizer": optimizer}).items()}
    if args.shard:
        import torch.distributed.checkpoint as dcp
        before, state["shards"] = state.get("shards"), "shards-2" if state.get("shards") == "shards-1" else "shards-1"
        moments = weights.pop("optimizer")
        dcp.save(weights | {"moments": moments["state"]}, checkpoint_id=Path(args.out) / state["shards"])
        weights = {"param_groups": moments["param_groups"]}
    write_whole(Path(args.out) / "state.pt", lambda path: torch.save(state | {"weights": weights}, path))
    if args.shard and before and not RANK:
        shutil.rmtree(Path(args.out) / before)
    gathered(None)


def load_run(modules, optimizer, weights, state, args):
    """Gives modules and optimiser what save_run() kept of them."""
    if not args.shard:
        for name, part in (modules | {"optimizer": optimizer}).items():
            part.load_state_dict(weights[name])
        return
    import torch.distributed.checkpoint as dcp
    folder = Path(args.out) / state["shards"]
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata            # "moments.7.exp_avg" and the like
    known = {int(key.split(".")[1]) for key in stored if key.startswith("moments.")}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameters[i]),
                   "exp_avg_sq": torch.zeros_like(parameters[i])} for i in known}
    dcp.load({name: part.state_dict() for name, part in modules.items()} | {"moments": moments}, checkpoint_id=folder)
    optimizer.load_state_dict({"state": moments, "param_groups": weights["param_groups"]})


def resumable(total, every, modules, optimizer, state, args):
    """Steps 1 .. total, or those that a resumed run has left. Saves every so many (0: each minute), after the last, after one whose
    checkpoint keep_best() has kept, so that model/ is not ahead of the state for long, and when a signal came, which ends the run.
    A step's number seeds it, so that no random state needs to be kept."""
    if "weights" in state:
        load_run(modules, optimizer, state.pop("weights"), state, args)
        COST["since"] = time.perf_counter()                          # to load it was no training
    elif every:
        save_run(modules, optimizer, state, args)                    # what came before the first step
    saved = time.time()
    for step in range(state["step"] + 1, total + 1):
        torch.manual_seed(1_000_003 * args.seed + step)
        yield step
        state["step"] = step
        number, late = stopped(), summed(torch.tensor(int(time.time() > saved + 60)), "max")
        kept = "best" in state and state["best"]["iteration"] == step
        if number or kept or step == total or (step % every == 0 if every else late):
            save_run(modules, optimizer, state, args)
            saved = time.time()
        if number:
            stop(number, "; saved", args)


@contextmanager
def located(where, args):
    """Says where a number stopped being finite, and that the state saved last is kept."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {error}; the state saved last is kept in {args.out}") from None


def write_log(record, state, args):
    """Appends one line to log.jsonl; a number that is not finite (the explained variance of equal returns) becomes null."""
    if RANK:
        return
    if args.tensorboard:
        write_events(record, args)
    plain = {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in record.items()}
    with open(Path(args.out) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")
    state["log_lines"] += 1


def write_events(record, args):
    """The numbers of a log line as TensorBoard's events in the folder events/, those of the test set under their own heading."""
    writer, iteration = event_writer(Path(args.out)), record["event"] == "iteration"
    step = record["iteration"] if iteration else 0 if record["event"] == "warmup" else args.iterations
    for name, value in record.items():
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
        for place, number in parts:
            if isinstance(number, (int, float)):
                writer.add_scalar("/".join(filter(None, ("" if iteration else "test", name, str(place)))), number, step)
    writer.flush()


@functools.cache
def event_writer(out):
    """What a stopped process wrote of iterations that the log no longer has is put aside."""
    from torch.utils.tensorboard import SummaryWriter
    logged = sum(json.loads(line)["event"] == "iteration" for line in open(out / "log.jsonl", encoding="utf-8"))
    return SummaryWriter(out / "events", purge_step=logged + 1 if logged else 0)


SHOWN = {"accuracy": "acc", "t1": "t1", "t2": "t2", "outcome": "reward", "kl": "kl", "response_length": "len", "loss": "loss",
         "policy_loss": "pg", "value_loss": "vf", "kl_loss": "klloss", "clip_frac": "clip", "explained_variance": "ev",
         "grad_norm": "grad", "truncated": "cut", "unparsed": "unread", "dev_accuracy": "dev"}


def show(record, state, args):
    """A line of the log, short, on the screen; in red that too many responses are cut off."""
    red = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    parts = [f"iteration {record['iteration']:4d}/{args.iterations}"]
    for key, name in SHOWN.items():
        if key in record:
            value = record[key]
            text = f"{name} " + ("/".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.3g}")
            parts.append(f"\033[31m{text}\033[0m" if key == "truncated" and value > 0.2 and red else text)
    spent = state["seconds"] + state["phases"]["evaluate"] + state["phases"]["save"]
    left = spent / record["iteration"] * (args.iterations - record["iteration"])
    parts += [f"{record['tokens_per_second']:.0f} tok/s"] if "tokens_per_second" in record else []
    say("  ".join(parts) + f"  ETA {left // 60:.0f}:{left % 60:02.0f}")


def finish_iteration(log, iteration, state, args):
    """Logs an iteration, shows it as one line, draws the curves, and warns of ten in a row without any signal."""
    phases, seconds = lap(state)
    for name, value in (("seconds", seconds), ("tokens", log.get("tokens", 0)), ("rollouts", log.get("rollouts", 0))):
        state[name] += value
    state["flat"] = state["flat"] + 1 if log.get("no_signal") == 1 else 0
    record = {"event": "iteration", "iteration": iteration} | log | {"seconds": seconds, "phases": phases}
    record |= {"tokens_per_second": log["tokens"] / seconds} if "tokens" in log else {}             # sampled ones
    write_log(record, state, args)
    show(record, state, args)
    if state["flat"] and state["flat"] % 10 == 0:
        say(f"warning: {state['flat']} iterations in a row in which all outcomes that are compared were equal: there is nothing "
            "to learn from; look at the samples in log.jsonl")
    drawn = state.setdefault("drawn", time.time())
    if iteration == args.iterations or time.time() > drawn + 60:     # each minute: to draw takes longer than a small iteration
        plot(args)
        state["drawn"] = time.time()


PANELS = [["accuracy", "dev_accuracy", "contradictions"], ["t1", "t2", "dev_t1", "dev_t2"], ["outcome"], ["kl", "kl_k1"],
          ["response_length"], ["truncated", "unparsed"], ["policy_loss", "kl_loss"], ["value_loss"], ["loss"], ["entropy"],
          ["explained_variance"], ["clip_frac"], ["grad_norm"]]


def figure(width, height):
    """An empty figure. Imported here, with the backend that a notebook may have set put aside: only files are drawn."""
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


@phase("save")
def plot(args):
    """curves.png: the numbers of log.jsonl over the iterations, and at 0 what the warm-up model has on the test problems."""
    if RANK:
        return
    log = list(map(json.loads, open(Path(args.out) / "log.jsonl")))
    warm, log = [[record for record in log if record["event"] == event] for event in ("warmup", "iteration")]
    panels = list(filter(None, [[key for key in keys if any(key in record for record in log)] for keys in PANELS]))
    picture = figure(14, 2.6 * math.ceil(len(panels) / 4))
    for i, keys in enumerate(panels):
        axes = picture.add_subplot(math.ceil(len(panels) / 4), 4, i + 1, title=", ".join(keys))
        for key in keys:
            points = [(r["iteration"], r[key]) for r in log if r.get(key) is not None] or [(math.nan, math.nan)]
            line, *_ = axes.plot(*zip(*points), marker="." if key.startswith("dev_") else "", label=key)
            if isinstance(warm[0].get(key), float):
                axes.plot(0, warm[0][key], "*", color=line.get_color(), label=f"{key}: warm-up, test")
        axes.legend(fontsize="small")
    picture.savefig(Path(args.out) / "curves.png", dpi=100)


def evaluated(find, problems, args):
    """--evaluate-only: a run folder with what find() finds of the checkpoint, in the summary of a run that trained nothing."""
    state, found = open_run(args), find()
    state |= {"warmup_steps": 0, "before": found, "best": {"iteration": 0, "accuracy": found["accuracy"]}}
    tell("after", found, state, args)
    summarise(problems, state, args)


def tell(moment, found, state, args):
    """What a test found "before" the training or "after" it, for the state, the log and the screen."""
    state[moment] = found
    for name in "generate", "check", "score":                        # samples of the test problems
        COST["evaluate"], COST[name] = COST["evaluate"] + COST[name], 0.0
    event = ({"event": "warmup", "steps": state["warmup_steps"], "loss": state.get("loss")} if moment == "before" else
             {"event": "end", "best_iteration": state["best"]["iteration"]})
    write_log(event | found | {"phases": lap(state)[0]}, state, args)
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, (int, float)))
    which = "warm-up" if moment == "before" else "checkpoint" if args.evaluate_only else "best checkpoint"
    say(f"{which}, test: {numbers}\n  a response: {found['sample']!r}")


def summarise(problems, state, args, by="accuracy"):
    """The last lines on the screen, the first about the measure `by`, and summary.json with what a results table needs."""
    summary = {"script": Path(__file__).stem, "method": args.method, "seed": args.seed, "problems": problems}
    summary |= {name: state[name] for name in ("before", "after", "best")} | (cost := bill(state))
    write_whole(Path(args.out) / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1)))
    what, before, best = "evaluation", "", ""
    if not args.evaluate_only:
        what, before = args.method, f"{state['before'][by]:.3f} -> "
        best = f" (dev {state['best']['accuracy']:.3f} at iteration {state['best']['iteration']})"
    say(f"{what}: {by} {before}{state['after'][by]:.3f} on {problems} test problems{best}; {args.out}")
    rates = {"rollouts_per_second": "{} rollouts/s", "tokens_per_second": "{} tokens/s", "mfu": "MFU of the updates {:.1%}",
             "peak_gib": "peak {} GiB"}
    spent = ", ".join(f"{name} {value}" for name, value in cost["phases"].items())
    say("; ".join(["seconds: " + spent, *(text.format(cost[name]) for name, text in rates.items() if cost.get(name))]))


# ==== command line ============================================================================================================

def fail(message, status=2):
    """One line on stderr, and the exit status."""
    say_once(message)
    if RANKS > 1:
        os._exit(status)                                             # at once: the others end when they see it
    sys.exit(status)


def settle(args):
    """Of each flag whose default is a pair takes the one that counts."""
    for f in fields(args):
        if isinstance(value := getattr(args, f.name), tuple):
            setattr(args, f.name, value[bool(args.train_data or args.eval_data)])


BF16 = 8, 0                                                          # the least compute capability, Ampere's


def parse_args(argv=None):
    """Args from the command line, a flag for each with the comment behind it as its help; checked."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags]", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"error: {message}")
    source = Path(__file__).read_text(encoding="utf-8").partition("class Args:")[2].partition("\n\n\n")[0]
    group, flags = parser, {}
    for block, name, text in re.findall(r"^    (?:# (.*)|(\w+): .*?# (.*))$", source, re.M):
        group = parser.add_argument_group(block) if block else group
        flags[name] = group, text
    for f in fields(Args):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        kind = dict(choices=get_args(f.type)) if get_args(f.type) else kind
        default = f"{f.default[0]}; with --train-data {f.default[1]}" if isinstance(f.default, tuple) else f.default
        group, text = flags[f.name]
        text = text.replace("%", "%%") + ("" if default == "" else f" (default: {default})")
        group.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    args = Args(**vars(parser.parse_args(argv)))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= BF16 else "cpu"
    args.out = args.out or f"runs/{Path(__file__).stem}-{'evaluate' if args.evaluate_only else args.method}-s{args.seed}"
    check_args(args)
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)                            # what "cuda" means from here on
    return args


def check_args(args):
    """InputError for values that are impossible in any of the scripts."""
    for f in fields(Args):
        value = getattr(args, f.name)
        may_be_0 = "seed", "eval_size", "train_size", "warmup_epochs", "iterations", "vote_k"
        least = 0 if f.type is float or f.name in may_be_0 else 1
        most = math.inf if f.type is float else 10 ** 12 if f.name == "seed" else 10 ** 9
        if f.type in (int, float) and not least <= value <= most or value == math.inf:
            bounds = f"at least {least}" if f.type is float else f"from {least} to {most}"
            raise InputError(f"--{f.name.replace('_', '-')} {value}: must be a finite number, {bounds}")
    conflicts = {f"--n-embd {args.n_embd} --n-head {args.n_head}: the width must be an even multiple of the heads":
                     args.n_embd % (2 * args.n_head),
                 "--tensorboard: the package is not installed (pip install tensorboard)":
                     args.tensorboard and not importlib.util.find_spec("tensorboard"),
                 f"--device cuda: torch sees {torch.cuda.device_count() or 'no'} GPUs here, each process needs one":
                     args.device == "cuda" and LOCAL_RANK >= torch.cuda.device_count(),
                 "--device cuda: this GPU does not compute in bf16 (needs compute capability 8.0, Ampere or newer)":
                     args.device == "cuda" and torch.cuda.device_count() and torch.cuda.get_device_capability() < BF16,
                 "--shard spreads a model over the processes of torchrun": args.shard and not dist.is_torchelastic_launched(),
                 "--rerank trains a model of its own and goes without --shard": args.shard and getattr(args, "rerank", False),
                 "--prompt needs `paper`, `chat` or a text with {question} in it":
                     args.prompt not in ("paper", "chat") and "{question}" not in args.prompt,
                 "--prompt needs data files: built-in problems have their own": args.prompt != "paper" and not args.eval_data,
                 "--system goes with --prompt chat": args.system and args.prompt != "chat",
                 "--train-data and --eval-data go together":
                     bool(args.train_data) != bool(args.eval_data) and not (args.evaluate_only and args.eval_data),
                 "--out is the folder of --model": args.model and Path(args.out).resolve() == Path(args.model).resolve(),
                 "--evaluate-only needs --model, the checkpoint to be tested": args.evaluate_only and not args.model,
                 "--eval-size 0 needs data files: there is no end of built-in problems": not (args.eval_size or args.eval_data),
                 "--train-data needs --model: one from nothing knows built-in problems only": args.train_data and not args.model,
                 "--train-size 0 needs data files: there is no end of built-in problems": not (args.train_size or args.eval_data),
                 "--grad-clip 0 leaves nothing of the gradient; a large number clips nothing": not args.grad_clip,
                 "--gamma and --lam are at most 1": max(getattr(args, "gamma", 0), getattr(args, "lam", 0)) > 1,
                 "--operations-low is above --operations-high": args.operations_low > args.operations_high,
                 "--warmup-epochs 0 needs --model: one from nothing must be warmed up": not (args.model or args.warmup_epochs)}
    for message, wrong in conflicts.items():
        if wrong:
            raise InputError(message)


if __name__ == "__main__":
    for name in "stdout", "stderr":                                  # closed, not UTF-8, or a file to be read while it grows
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        with suppress(AttributeError):                               # a notebook's has none
            getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        connect()
        main(parse_args())
        disconnect()
    except InputError as error:
        fail(f"error: {error}")
    except (FloatingPointError, OSError) as error:                   # no space left, a folder that is gone
        fail(f"stopped: {error}", 1)
    except KeyboardInterrupt:
        fail("stopped before there was anything to save", 130)
    except RuntimeError:
        time.sleep(5 * (RANKS > 1))                                  # where another process has died watch() ends this one
        raise
    finally:
        HELD.close()
        sys.stderr = sys.__stderr__ if RANK else sys.stderr
