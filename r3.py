"""R3: Training Large Language Models for Reasoning through Reverse Curriculum Reinforcement Learning
Zhiheng Xi, Wenxiang Chen, Boyang Hong, Senjie Jin, Rui Zheng, Wei He et al.; ICML 2024, arXiv 2402.05808.

PPO as in ppo_reft.py, but rollouts start inside a correct demonstration: it is cut at M places, from the question alone (k = 0)
to almost finished (k = M - 1), and all starts are mixed in every batch. Only the final answer is rewarded, yet near the end it is
often right, and failing from one start but not from the next blames the step between: outcomes act like rewards for each step.

    what         formula                                                                          number  function
    starts       s_k = question + first p_k of T lines,   p_k = min(floor(k T / M + 1/2), T - 1)  F10     evenly()
    seam         s_k holds the tokens before line p_k + 1 of the demonstration's own ids          F11     start_states()
    mixture      batches of all (question, k) shuffled; staged: k = M - 1, ..., 0 in turn         F12     draw_starts()
    SFT          L = -mean_t log pi(a_t | s_t)                                                    Eq. 1   sft_loss()
    outcome      1 for the right answer, 0.2 for another number, 0 for none, the same for all k   F2      reward()
    reward       r_t = outcome (last token only) - beta log(pi_old / pi_ref)(a_t | s_t)           F3      token_rewards()
    GAE          delta_t = r_t + gamma V(s_t+1) - V(s_t),   A_t = sum_l (gamma lam)^l delta_t+l   F4      gae()
    return       R_t = A_t + V(s_t)                                                               F5      gae()
    whitening    A <- (A - mean A) / sqrt(var A + 1e-8), over all response tokens of a rollout    F6      whiten()
    policy loss  max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),   ratio = pi / pi_old           F7      loss_fn()
    value loss   1/2 max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)                   F8      loss_fn()
    total        L = L_policy + c L_value, each a mean over a row's tokens, then over rows        F9      loss_fn()

Eq. 1 to F9 are as in ppo_reft.py, with lam = 1, c = 0.2 and values that start at 0 for the long chains here (authors' code: 0.95,
5, random). F10 to F12 are the idea; `diff ppo_reft.py r3.py` shows it. What is given is context: no loss on it, and evaluation
gives nothing. The authors' code (R3_math of github.com/WooooDyy/LLM-Reverse-Curriculum-RL) has ReFT's PPO but not the cutting:
F10 is a rule that fits their published start states. How staged RL shares out its iterations is ours. Layout: model.py.

    python r3.py                                                  built-in problems, a small GPT from nothing, a few CPU minutes
    python r3.py --method rl                                      the baselines: from the question alone (ReFT's loop),
    python r3.py --method staged                                  one start state after another, easy to hard,
    python r3.py --method sft                                     supervised training only
    python r3.py --model FOLDER --train-data train.jsonl --eval-data test.jsonl
                                                                  a pretrained checkpoint on GSM8K's files or SVAMP's
"""
import argparse
import copy
import functools
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from kernels import linear_kl, linear_logprobs
from model import GPT, GPTConfig, InputError, Tokenizer, load_checkpoint, save_checkpoint, generate

METHODS = ("r3", "staged", "rl", "sft")
CHOICES = {"method": METHODS, "problems": ("numeric", "choice"), "cot": ("text", "program"), "kl": ("k1", "exact"),
           "value": ("shared", "separate"), "device": ("cpu", "cuda"), "split": ("lines", "uniform", "auto")}


@dataclass
class Args:
    # run
    method: str = "r3"               # r3 (all starts mixed) | staged, rl (from the question alone), sft: the paper's baselines
    model: str = ""                  # folder of a pretrained checkpoint; empty: a small GPT from nothing
    train_data: str = ""             # GSM8K's JSON lines or ReFT's JSON list; empty: the built-in problems
    eval_data: str = ""              # test set in the same form; needed with --train-data
    problems: str = "numeric"        # built-in problems: numeric | choice (five options, a letter; with --max-new-tokens 100)
    cot: str = "text"                # rationales are text (N-CoT) | program (P-CoT: Python, run in a sandbox)
    out: str = ""                    # run folder; empty: runs/<script>-<method>-s<seed>
    seed: int = 0                    # of everything random but the built-in problems, which are always the same
    device: str = "auto"             # cpu | cuda | auto
    resume: bool = False             # go on with the run in --out exactly where it was saved
    # model from nothing, used without --model (small and many steps beats large and few)
    n_layer: int = 2                 # layers
    n_head: int = 4                  # attention heads
    n_embd: int = 64                 # width
    train_size: int = 24000          # built-in training problems, of 1 to --operations-high operations
    operations_low: int = 10         # fewest operations of a built-in dev or test problem, and of one that rollouts start from
    operations_high: int = 12        # most
    # warm-up, on a linear schedule with 10 % warm-up steps as ReFT's (authors' code: cosine)
    warmup_epochs: int = 3           # passes over the training demonstrations (authors' code: 2); 0: none (needs --model)
    warmup_batch_size: int = 16      # demonstrations an optimiser step; authors' code: 256
    warmup_lr: float = 3e-3          # peak; authors' code: 2e-5 for a pretrained 7B model
    # start states
    stages: int = 5                  # M, start states per demonstration; paper: 5 or 6
    split: str = "auto"              # cut demonstrations at lines | uniform: into M equal parts | auto: lines if there are two
    stage_weights: str = ""          # how often r3's mixture holds k = 0, 1, ...: "2,1,1,1,0"; empty: each once, as authors' data
    # reinforcement learning
    iterations: int = 80             # rollouts, each with its updates; paper: 50 epochs, code: 10 of five starts each
    batch_size: int = 256            # start states an iteration; authors' code: 32
    minibatch_size: int = 256        # rows an optimiser step; authors' code: the whole batch
    micro_batch_size: int = 64       # rows a forward pass: changes memory and speed, never the result
    ppo_epochs: int = 2              # passes over a rollout; authors' code: 2
    max_new_tokens: int = 80         # longest response (88 for programs); authors' code: prompt and response 700 together
    lr: float = 5e-4                 # constant; authors' code: 3e-7 (7B)
    gamma: float = 1.0               # paper's code: 1.0
    lam: float = 1.0                 # paper's code: 0.95, which hardly reaches the first lines before the values are learned
    clip_eps: float = 0.2            # ratio clip; paper: 0.2
    value_clip: float = 0.2          # value clip; authors' code: 0.2
    vf_coef: float = 0.2             # alpha; paper: 5 (times the 1/2 of F8), whose cold value head upsets so small a trunk
    kl_coef: float = 0.05            # beta; paper: 0.05 for rationales in words, 0.01 for programs
    kl: str = "k1"                   # k1: sampled log-ratio in the reward (authors' code) | exact: its conditional mean
    zero_value: bool = True          # the value head starts at 0, so the first advantages are outcomes alone; False: as in ReFT
    value: str = "shared"            # the value head sits on the policy's trunk: shared (paper) | on one of its own: separate
    whiten: bool = True              # F6; authors' code
    partial_reward: float = 0.2      # reward of a wrong number where the right answer is one; paper: 0.2 for GSM8K, 0.1 for SVAMP
    grad_clip: float = 1.0           # norm of the gradient; authors' code: 1.0
    # reports
    strict: bool = False             # read answers as the authors do: a bare float() of all that follows "####"
    strip_annotations: bool = False  # remove GSM8K's <<48/2=24>> from the demonstrations
    eval_every: int = 10             # iterations between greedy evaluations on the dev split, which choose the checkpoint
    eval_size: int = 1000            # at most so many dev and so many test problems
    save_every: int = 10             # iterations between saved states


# ---- data and reward ---------------------------------------------------------------------------------------------------------

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{question}\n\n### Response:\n")
PROGRAM = 'def solution():\n    """{question}"""\n    '     # opens a rationale that is a program
ANSWER = "\n#### "                        # closes a rationale in words, followed by the answer
TRIGGER = "####"                          # the last one in a response announces its answer
NUMBER = r"[-+]?\$?[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?"


def builtin_record(rng, operations, args):
    """A problem in ReFT's form: a chain of additions and subtractions that stays between 0 and 19, one step a line. Annotators
    have two styles: a careful one does one operation a line; a hasty one, more common on long chains, does four at once (as a
    program: writes down what they give), which is right in the data but hard to do in one's head. Supervised training copies
    the mixture; reinforcement learning finds out which style is right more often."""
    totals, chain = [rng.randrange(20)], []
    for _ in range(operations):
        number = rng.randint(1, 9)
        sign = rng.choice([sign for sign in (1, -1) if 0 <= totals[-1] + sign * number < 20])
        chain, totals = chain + [f" {'+' if sign > 0 else '-'} {number}"], totals + [totals[-1] + sign * number]
    stride = 1 if rng.random() < (0.7 if operations <= 3 else 0.3) else 4
    stops = [*range(stride, operations, stride), operations]              # the operations after which a line ends
    starts, question, answer = [0] + stops[:-1], f"What is {totals[0]}{''.join(chain)}?", f"{totals[-1]}"
    if args.problems == "choice":
        options = rng.sample([n for n in range(20) if n != totals[-1]], 4)
        options.insert(rng.randrange(5), totals[-1])
        listed = [f"{letter} ) {option}" for letter, option in zip("abcde", options)]
        question += "\n" + " , ".join(listed)
        answer = "abcde"[options.index(totals[-1])]
    if args.cot == "text":
        lines = [f"{totals[i]}{''.join(chain[i:j])} = {totals[j]}" for i, j in zip(starts, stops)]
        if args.problems == "choice":                                # goes through the options up to the right one
            lines.append(" , ".join(listed[:options.index(totals[-1]) + 1]))
        cot = "\n".join(lines)
    else:
        careful = [f"x = {totals[0] if i == 0 else 'x'}{chain[i]}" for i in range(operations)]
        lines = careful if stride == 1 else [f"x = {totals[j]}" for j in stops]
        value = f'"abcde"[[{" , ".join(map(str, options))}].index(x)]' if args.problems == "choice" else "x"
        cot = "\n    ".join([PROGRAM.format(question=question) + lines[0], *lines[1:], f"return {value}"])
    return {"question": question, "answer_cot": cot, "answer_value": answer}


def builtin_records(n, low, high, seed, args, without=()):
    """n built-in problems of low to high operations, the same for the same seed; none asks a question of `without`."""
    rng, seen, records = random.Random(seed), {r["question"] for r in without}, []
    while len(records) < n:
        record = builtin_record(rng, rng.randint(low, high), args)
        if record["question"] not in seen:
            records.append(record)
    return records


def builtin_tokenizer(args):
    """The vocabulary of the built-in problems: each number, and each fixed piece of text, is one token."""
    index = ['"abcde"[[', "].index(x)]"] if args.problems == "choice" else []            # the letter that a program returns
    return Tokenizer.from_pieces(index + [str(number) for number in range(20)] + PROMPT.split("{question}")
                                 + ['def solution():\n    """', '"""\n', ANSWER, "What is ", "?", " + ", " - ", " = ", "\n",
                                    *"abcdex", " ) ", " , ", "    return ", "    ", '"'])


def read_records(path):
    """[(where, record)] of a data file: GSM8K's JSON lines or ReFT's JSON list, told apart by their content."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            records = [(f"{path}: record {i}", record) for i, record in enumerate(json.loads(text), 1)]
        else:
            where = path                                             # the line at fault, should one fail
            records = []
            for i, line in enumerate(text.splitlines(), 1):
                where = f"{path}:{i}"
                if line.strip():
                    records.append((where, json.loads(line)))
    except json.JSONDecodeError as error:
        where = path if text.lstrip().startswith("[") else where
        raise InputError(f"{where}: not JSON: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not records:
        raise InputError(f"{path}: holds no records")
    return records


def parse_record(raw, where, args):
    """A raw record as {"question", "cot", "answer": text, "gold": float, or a letter for multiple choice}, or an InputError."""
    if not isinstance(raw, dict) or not isinstance(raw.get("question"), str):
        raise InputError(f"{where}: a record needs a text `question`")
    if "answer_value" in raw:                                        # ReFT; its closing sentence gives way to ours
        cot = str(raw.get("answer_cot") or "")
        cot = re.sub(r"\s*Therefore, the answer is <[^<>]*>\.?\s*$", "", cot) if args.cot == "text" else cot
        answer = str(raw["answer_value"]).strip()
    elif isinstance(raw.get("answer"), str) and "####" in raw["answer"]:
        cot, _, answer = raw["answer"].rpartition("####")            # GSM8K
        answer = answer.strip().replace(",", "")
        if args.cot == "program":
            raise InputError(f"{where}: --cot program needs ReFT's form with a program in answer_cot")
    else:
        raise InputError(f"{where}: neither GSM8K's form (question, answer with a line '#### y') "
                         "nor ReFT's (question, answer_cot, answer_value)")
    if args.strip_annotations:
        cot = re.sub(r"<<[^<>]*>>", "", cot)
    gold = answer.lower() if re.fullmatch("[A-Za-z]", answer) else parse_number(answer)
    if gold is None:
        raise InputError(f"{where}: the answer {answer!r} is neither a number nor a letter")
    return {"question": raw["question"].strip(), "cot": cot.strip(), "answer": answer, "gold": gold}


def load_problems(args):
    """Train, dev and test records. Built-in ones are always the same and share no question between the splits. Of a file's
    training questions 10 %, at most 500, become the dev split; a question asked twice stays on one side."""
    if not args.train_data:
        low, high = args.operations_low, args.operations_high
        dev = builtin_records(args.eval_size, low, high, 1, args)
        test = builtin_records(args.eval_size, low, high, 2, args, without=dev)
        train = builtin_records(args.train_size, 1, high, 3, args, without=dev + test)
        return [[parse_record(r, "built-in", args) for r in split] for split in (train, dev, test)]
    train = [parse_record(raw, where, args) for where, raw in read_records(args.train_data)]
    test = [parse_record(raw, where, args) for where, raw in read_records(args.eval_data)][:args.eval_size]
    questions = sorted({r["question"] for r in train})
    random.Random(0).shuffle(questions)
    held_out = set(questions[:min(500, len(questions) // 10)])
    dev = [r for r in train if r["question"] in held_out][:args.eval_size]
    # a rationale that only points to an earlier question ("already answered ... the answer is <4>") demonstrates nothing
    empty = lambda r: not r["cot"] or args.cot == "text" and re.search("answer is <(?!<)", r["cot"])
    train = [r for r in train if r["question"] not in held_out and not empty(r)]
    if not train or not dev:
        raise InputError(f"{args.train_data}: too few records with a rationale for a training and a dev split")
    return train, dev, test


def tokens_within(ids, tokenizer, end):
    """How many leading ids lie within the first `end` bytes of their text; a token across that place does not."""
    count = length = 0
    for token in ids:
        length += len(tokenizer.token_bytes(token))
        if length > end:
            break
        count += 1
    return count


def encode_record(record, tokenizer, args):
    """Adds the token ids: "prompt"; "given", what of the response is given before the policy goes on (a program's def line and
    docstring, cut from the ids of a whole program so that the seam is the demonstrations'); "response", with its end token."""
    prompt, given, target = PROMPT.format(question=record["question"]), [], f"{record['cot']}{ANSWER}{record['answer']}"
    if args.cot == "program":
        target, header = record["cot"], PROGRAM.format(question=record["question"])[:-len("    ")]
        given = tokenizer.encode(header + "    x = 0")
        given = given[:tokens_within(given, tokenizer, len(header.encode()))]
    response = tokenizer.encode(target) + [tokenizer.eos_id]
    return record | {"prompt": tokenizer.encode(prompt), "given": given, "response": response}


def parse_number(text):
    """The first number of a line after its last "=": signs, $, 1,000, decimals, exponents and a/b are read, units and a final
    full stop ignored. None if there is none, or it is not finite."""
    found = re.search(f"({NUMBER})(?: ?/ ?({NUMBER}))?", text.rpartition("=")[2])
    if not found:
        return None
    over, under = [float(number.replace(",", "").replace("$", "")) for number in found.groups(default="1")]
    value = over / under if under else math.nan
    return value if math.isfinite(value) else None


def read_letter(text):
    """The only letter of text, lower-case; None if there is more or less than one."""
    letters = re.findall(r"[a-z]+", text.lower())
    return letters[0] if len(letters) == 1 and len(letters[0]) == 1 else None


def read_answers(texts, problems, args):
    """The answer of each response: a float, a letter where the problem is multiple choice, None if there is none. A response in
    words announces it after the last TRIGGER; a program is run."""
    if args.cot == "program":
        found = run_programs(texts)
    else:
        parts = [text.rpartition(TRIGGER) for text in texts]
        found = [answer.strip().split("\n")[0] if trigger else None for _, trigger, answer in parts]
    answers = []
    for answer, problem in zip(found, problems):
        if isinstance(answer, str) and isinstance(problem["gold"], str):
            answer = read_letter(answer)
        elif isinstance(answer, str) and not args.strict:
            answer = parse_number(answer)
        elif isinstance(answer, str):
            with suppress(ValueError):
                answer = float(answer)
        answers.append(answer if type(answer) is type(problem["gold"]) else None)
    return answers


def reward(answers, problems, args):
    """Outcome of each response (B,): 1 for the right answer, args.partial_reward for another number, 0 for no answer. A wrong
    letter earns nothing (ReFT's code pays it 0.1 as well)."""
    def outcome(answer, gold):
        if isinstance(gold, str) or answer is None:
            return float(answer == gold)
        return 1.0 if abs(answer - gold) <= 1e-2 else args.partial_reward                                            # F2
    return torch.tensor([outcome(answer, problem["gold"]) for answer, problem in zip(answers, problems)])


# ---- start states ------------------------------------------------------------------------------------------------------------

HASTY = 4                            # so many operations a hasty line does at once, where as many are left


def restyled(problems, tokenizer, args):
    """Built-in problems with other right demonstrations, whose annotators choose their style anew on each line: while HASTY are
    left they do one operation (45 %), or write down what the next HASTY give, which is hard to do in one's head. A long chain
    holds many such chances to go wrong, so sampling rarely succeeds from the question alone; near the end few are left."""
    rng, found = random.Random(5), []
    for problem in problems:
        first, chain = re.match(r"What is (\d+)", problem["question"])[1], re.findall(r" [+-] \d+", problem["question"])
        total, done, lines = int(first), 0, []
        while done < len(chain):
            count = HASTY if len(chain) - done >= HASTY and rng.random() > 0.45 else 1
            before, part, done = total, chain[done:done + count], done + count
            total += sum(int(step.replace(" ", "")) for step in part)
            careful = f"{before}{part[0]} = {total}" if args.cot == "text" else f"x = {'x' if lines else first}{part[0]}"
            lines.append(careful if count == 1 else f"x = {total}")
        if args.cot == "program" or args.problems == "choice":       # the line of the return, or of the options, stays
            lines.append(problem["cot"].split("\n")[-1].strip())
        cot = "\n".join(lines)
        if args.cot == "program":
            cot = PROGRAM.format(question=problem["question"]) + "\n    ".join(lines)
        found.append(encode_record(problem | {"cot": cot}, tokenizer, args))
    return found


def evenly(n, stages):
    """How many of a demonstration's n lines, or tokens, start k = 0 .. stages - 1 gives: none at k = 0, the last one never."""
    return [min(math.floor(k * n / stages + 0.5), n - 1) for k in range(stages)]                                     # F10


def line_starts(text):
    """Where the lines of a text begin that are not blank."""
    return [line.start() for line in re.finditer(r"^.*\S", text, re.M)]


def tokens_of_lines(problem, lines, tokenizer):
    """How many ids of a demonstration belong to its first `lines` lines. They end where the next begins, indentation included;
    a token across that place is left to the policy. Counted in the ids of the whole: the seam is the one the warm-up saw."""
    text = problem["cot"]
    end = [*line_starts(text), len(text)][lines]
    return tokens_within(problem["response"], tokenizer, len(text[:end].encode()))


def start_states(problem, tokenizer, args):
    """The problem from each start k: "given" is what of its demonstration the policy goes on from; of a program at least the def
    line and docstring. Short demonstrations have equal starts, which are kept: as many of each k."""
    lines, header = len(line_starts(problem["cot"])), len(line_starts(tokenizer.decode(problem["given"])))
    if args.split == "lines" or args.split == "auto" and lines > 1:
        counts = [tokens_of_lines(problem, p, tokenizer) for p in evenly(lines, args.stages)]
    else:
        counts = evenly(tokens_of_lines(problem, lines, tokenizer), args.stages)
    least = max(tokens_of_lines(problem, min(header, lines), tokenizer), len(problem["given"]))
    given = [problem["response"][:count] if count > least else problem["given"] for count in counts]                 # F11
    return [problem | {"stage": k, "given": ids} for k, ids in enumerate(given)]


def all_starts(problems, policy, tokenizer, args):
    """The start states of each problem [[k = 0, 1, ...], ...]; of built-in ones only those as long as the dev and test problems:
    the short ones, which need no curriculum, are for the warm-up. What is wrong with weights or lengths is said here."""
    if args.stage_weights and not (re.fullmatch(r"\d+(,\d+)*", args.stage_weights) and int(args.stage_weights.replace(",", ""))
                                   and args.stage_weights.count(",") + 1 == args.stages):
        raise InputError(f"--stage-weights {args.stage_weights}: --stages {args.stages} needs as many whole numbers, not all 0")
    operations = lambda problem: len(re.findall(" [+-] ", problem["question"]))
    long = [problem for problem in problems if args.train_data or operations(problem) >= args.operations_low]
    if not long and problems:
        raise InputError(f"--train-size {args.train_size}: none has --operations-low {args.operations_low} operations")
    starts = [start_states(problem, tokenizer, args) for problem in long]
    for *_, start in starts if args.method in ("r3", "staged") else []:                  # the last one gives most
        length = len(start["prompt"]) + len(start["given"]) + args.max_new_tokens
        if length > policy.config.max_len:
            raise InputError(f"the question {start['question'][:60]!r}... takes {length} tokens from its last start "
                             f"state, the model's context holds {policy.config.max_len}")
    return starts


def draw_starts(starts, iteration, args):
    """The starts of an iteration's batch: r3 draws from all together, each k as often as its weight says; staged from those of
    one k after another, the last one first, for an equal share of the iterations each; rl from the questions alone."""
    if args.method == "r3":
        weights = [int(weight) for weight in args.stage_weights.split(",")] if args.stage_weights else [1] * args.stages
        pool = [start for states in starts for start in states for _ in range(weights[start["stage"]])]              # F12
    else:
        k = (args.iterations - iteration) * args.stages // args.iterations if args.method == "staged" else 0
        pool = [states[k] for states in starts]
    return [pool[i] for i in draw(len(pool), args.batch_size, iteration - 1, args.seed)]


def by_stage(data, batch, args):
    """What came of the rollouts from each start, as lists over k: their number, accuracy, share without an answer (outcome 0, as
    a wrong letter's) and length; None where there were none."""
    stages = torch.tensor([start["stage"] for start in batch], device=data["outcomes"].device)
    columns = {"accuracy": data["outcomes"] == 1, "unparsed": data["outcomes"] == 0, "length": data["response_mask"].sum(1)}
    chosen = [stages == k for k in range(args.stages)]                                   # (B,) each
    means = {f"stage_{name}": [round(float(x[rows].float().mean()), 6) if rows.any() else None for rows in chosen]
             for name, x in columns.items()}
    return {"stage_rollouts": [int(rows.sum()) for rows in chosen]} | means


def plot_stages(args):
    """stages.png: the accuracy of the samples from each start state, and of greedy answers from the dev questions alone."""
    log = [json.loads(line) for line in open(Path(args.out) / "log.jsonl")]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=f"{args.method}: accuracy by start state", xlabel="iteration", ylim=(-0.02, 1.02))
    for k in range(args.stages):
        points = [(r["iteration"], r["stage_accuracy"][k]) for r in log if r.get("stage_rollouts", [0] * args.stages)[k]]
        if points:
            axes.plot(*zip(*points), color=f"{0.8 * k / args.stages:.2f}", label=f"k = {k}" + " (question alone)" * (k == 0))
    axes.plot(*zip(*[(r["iteration"], r["dev_accuracy"]) for r in log if "dev_accuracy" in r]), "r.-", label="dev, greedy")
    axes.legend()
    figure.savefig(Path(args.out) / "stages.png", dpi=100)


# ---- sandbox -----------------------------------------------------------------------------------------------------------------

CPU_SECONDS, WALL_SECONDS, MAX_CHARS = 3, 5, 1000          # limits of a program; of a string it returns so much is kept


def system_call_filter():
    """seccomp-BPF: a program may compute, and write to fds 0 to 3. Returns struct sock_fprog and the code to keep."""
    import ctypes, os, struct
    # mmap mprotect munmap brk rt_sigreturn sched_yield mremap madvise exit gettimeofday futex clock_gettime
    # clock_getres exit_group getrandom; then the number of the architecture and write
    calls = {"x86_64": (9, 10, 11, 12, 15, 24, 25, 28, 60, 96, 202, 228, 229, 231, 318, 0xC000003E, 1),
             "aarch64": (222, 226, 215, 214, 139, 124, 216, 233, 93, 169, 98, 113, 114, 94, 278, 0xC00000B7, 64)}
    *calls, arch, write = calls[os.uname().machine]
    load, equal, greater, end, allow, deny = 0x20, 0x15, 0x25, 0x06, 0x7FFF0000, 0x00050001    # deny: fails with EPERM
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, deny), (load, 0, 0, 0)]         # 0: call, 4: arch, 16: fd
    code += [line for call in calls for line in ((equal, 0, 1, call), (end, 0, 0, allow))]
    code += [(equal, 0, 2, write), (load, 0, 0, 16), (greater, 0, 1, 3), (end, 0, 0, deny), (end, 0, 0, allow)]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    return struct.pack("HP", len(code), ctypes.addressof(buffer)), buffer


def program_helper():
    """The whole helper process: one request on stdin; on stdout a line `[index, what it wrote]` for each program."""
    import ast, builtins, ctypes, gc, importlib, json, math, numbers, os, resource, select, signal, sys, time
    import unicodedata                                      # the parser loads it for names such as größe
    from contextlib import suppress

    request, linux, bpf = json.load(sys.stdin), sys.platform == "linux", None
    allowed = """__future__ _strptime array bisect calendar cmath collections copy dataclasses datetime decimal enum
        fractions functools hashlib heapq itertools math numbers operator random re statistics string sympy sys time
        typing""".split()
    for name in allowed:                                    # now, since a program cannot open files
        if any(name.strip("_") in text for text in request["programs"]):
            with suppress(ImportError):
                importlib.import_module(name)
    if "sympy" in sys.modules:
        for name in "solve", "solveset", "simplify", "integrate":           # it imports its parts when first needed
            getattr(sys.modules["sympy"], name)("x**2 - 4")

    if linux:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl.argtypes = [ctypes.c_ulong, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
        libc.unshare(0x40000000 | (0x10000000 if os.geteuid() else 0))      # own network; users need a user namespace
    if os.geteuid() == 0:                                   # root is exempt from the limit on processes
        with suppress(OSError):
            os.setgroups([]), os.setgid(65534), os.setuid(65534)
    if linux:
        for option, value in (38, 1), (4, 0), (1, 9):       # no new privileges, not dumpable, dies with the trainer
            libc.prctl(option, value, None, 0, 0)
        with suppress(KeyError):                            # another architecture
            if libc.prctl(22, 2, None, 0, 0) and ctypes.get_errno() == 14:  # EFAULT: filters exist, none at address 0
                bpf, buffer = system_call_filter()
    if not bpf:
        print(json.dumps([None, f"{sys.platform} {os.uname().machine}"]), flush=True)

    def limited_import(name, *args, load=builtins.__import__, **kwargs):
        if name.split(".")[0] not in allowed:
            raise ImportError(name)
        return load(name, *args, **kwargs)

    def run_program(text, pipe):
        os.setsid()
        for fd in 0, 1, 2:
            os.dup2(null, fd)
        os.dup2(pipe, 3), os.closerange(4, 1024)
        for name, limit in dict(CPU=request["cpu"], AS=512 << 20, FSIZE=0, CORE=0, NPROC=0, NOFILE=4).items():
            with suppress(ValueError, OSError):             # macOS refuses AS
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        if linux and (libc.prctl(1, 9, None, 0, 0) or bpf and libc.prctl(22, 2, bpf, 0, 0)):   # 1: dies with the helper
            return
        if "random" in sys.modules:
            sys.modules["random"].seed(0)                   # the same value in each run (see also PYTHONHASHSEED)
        lines, tree = text.split("\n"), None
        while lines and not tree:                           # the longest prefix of lines that parses
            try:
                tree = ast.parse("\n".join(lines))
            except Exception as error:                      # no prefix that holds the wrong line parses
                del lines[min(len(lines), getattr(error, "lineno", 0) or len(lines)) - 1:]
        kept = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign, ast.AnnAssign
        tree.body = [n for n in tree.body if isinstance(n, kept) and getattr(n, "value", n)]   # not prose `Note: x`
        names = {k: v for k, v in vars(builtins).items() if k not in ("open", "input", "breakpoint")}
        scope = {"__builtins__": names | {"__import__": limited_import}, "__name__": "__main__", "math": math}
        exec(compile(tree, "program", "exec"), scope)
        value = scope["solution"]()
        if isinstance(value, str):
            value = value[:request["chars"]]
        elif isinstance(value, numbers.Number) and not isinstance(value, bool) or hasattr(value, "is_number"):  # sympy
            value = float(value)
        os.write(3, json.dumps(value).encode())

    null, room = os.open(os.devnull, os.O_RDWR), 16 * request["chars"]
    gc.freeze()                                             # else a collection in a child copies every page
    queue, running = list(enumerate(request["programs"]))[::-1], {}
    while queue or running:
        while queue and len(running) < request["workers"]:
            (index, text), (reader, writer) = queue.pop(), os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    run_program(text, writer)
                finally:
                    os._exit(0)
            os.close(writer)
            running[reader] = index, pid, time.monotonic() + request["wall"], b""
        patience = min(deadline for _, _, deadline, _ in running.values()) - time.monotonic()
        ready = select.select(running, [], [], max(0, patience))[0]
        for reader, (index, pid, deadline, data) in list(running.items()):
            part = os.read(reader, room) if reader in ready else b""
            running[reader] = index, pid, deadline, data + part
            if time.monotonic() > deadline or reader in ready and (not part or len(data + part) > room):
                for kill in os.killpg, os.kill:             # first what it left behind, where the kernel let it
                    with suppress(OSError):
                        kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]              # not 0: ended by a limit
                os.close(reader), running.pop(reader)
                print(json.dumps([index, "" if status else (data + part).decode("latin-1")]), flush=True)


# the text is taken now: the file may be edited while a run lasts
PROGRAM_HELPER = "\n".join(map(inspect.getsource, (system_call_filter, program_helper))) + "\nprogram_helper()"


def run_programs(programs: list[str]) -> list[float | str | None]:
    """What `solution()` returns in each program: a float for a real number, a str, None for all else and for failures.

    A program is the longest prefix of lines that parses, without top-level statements other than imports, definitions
    and assignments. It is hostile text. Nothing of it runs in this process, which starts a fresh interpreter (the
    helper: exec, no fork of ours) that forks a child for each program, a few at a time. Layers, in place before the
    child looks at the text:
      filter   the kernel refuses every system call but memory, clock, random numbers, exit, write to fds 0-3 (seccomp)
      limits   3 s CPU, 5 s wall clock, then SIGKILL; 512 MB of memory; no file, process, thread or core dump
      user     nobody if we are root; no new privileges, not dumpable; a network namespace of its own if allowed
      fds      stdin, stdout and stderr are /dev/null, 3 is the pipe of the result, nothing else is open
      names    imports from a list, no open, no input: for plain errors only; a program can get around this layer

    endless loop, huge power, huge int to str, catastrophic regex    CPU limit
    sleep, lock that never opens, SIGSTOP of itself                  filter, wall clock
    memory bomb, deep recursion, crash of the interpreter            memory limit; only the child dies
    fork bomb, exec, thread, daemon left behind                      filter, process limit, SIGKILL of the process group
    files read, written, listed; full disk; the terminal             filter, file limits, user, own session
    sockets                                                          filter, network namespace
    signals, ptrace, /proc/PID/mem, process_vm_readv                 filter, user, not dumpable
    the trainer's environment, memory and CUDA context               never in the helper, whose environment is empty
    raised limits, ignored signals, closed descriptors               filter, hard limits; SIGKILL cannot be ignored
    ctypes, gc, __subclasses__, patched builtins or json             touch the child alone, under filter and limits
    any exception or exit, atexit, __del__, hostile value or class   made JSON in the child, which ends by _exit
    forged, endless or malformed result                              32 kB of strict JSON at most, float or str, else
                                                                     None: no more than it could have returned
    Without the filter (macOS, processors other than x86-64 and ARM64, kernels without seccomp) a warning says so: there
    a program that gets around `names` reads what the user can read, creates empty files, opens sockets (on Linux in its
    own network) and signals the user's processes; macOS has no memory limit either. Run there what you would run bare.
    """
    values, workers = {}, min(os.cpu_count() or 1, 8)
    # not -I, which ignores the hash seed: the order of a set is the same in each run
    command = [sys.executable, "-s", "-P", "-W", "ignore", "-c", PROGRAM_HELPER]
    env = {"PYTHONHASHSEED": "0"} | {k: v for k, v in os.environ.items() if k.endswith("LD_LIBRARY_PATH")}
    for _ in range(2):                                      # again for what a helper that was killed left undone
        todo = [i for i in range(len(programs)) if i not in values]
        request = dict(programs=[programs[i] for i in todo], workers=workers,
                       cpu=CPU_SECONDS, wall=WALL_SECONDS, chars=MAX_CHARS)
        try:
            lines = todo and subprocess.run(
                command, input=json.dumps(request).encode(), stdout=subprocess.PIPE, env=env, cwd="/",
                start_new_session=True, timeout=60 + WALL_SECONDS * (1 + len(todo) / workers)).stdout.splitlines()
        except subprocess.TimeoutExpired as error:
            lines = (error.output or b"").splitlines()
        for line in lines:
            with suppress(ValueError, TypeError, IndexError, RecursionError):            # unreadable: no value
                index, result = json.loads(line)
                if index is None:
                    warnings.warn(f"no system-call filter on {result}: programs are less confined, see run_programs")
                    continue
                values[todo[index]] = None
                value = json.loads(result)
                if isinstance(value, str):                  # a lone surrogate would break the caller's print
                    values[todo[index]] = value[:MAX_CHARS].encode("utf-8", "replace").decode()
                if isinstance(value, float) and math.isfinite(value):
                    values[todo[index]] = value
    if len(values) < len(programs):
        warnings.warn(f"the helper of run_programs died: {len(programs) - len(values)} programs have no value")
    return [values.get(i) for i in range(len(programs))]


# ---- rows, micro-batches and one optimiser step ------------------------------------------------------------------------------

def pack(rows, pad_id, device):
    """Rows [(ids, trained flags)] of unequal length as one batch: tokens (B, T) and response_mask (B, T-1)."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows], device=device)
    mask = torch.tensor([flags[1:] + [False] * (width - len(flags)) for _, flags in rows], device=device)
    return {"tokens": tokens, "response_mask": mask}


def micro_batches(batch, size):
    """(rows, micro-batch) pairs: `size` rows of like length, cut to the longest of them, so that little padding is computed."""
    columns = torch.arange(2, batch["tokens"].shape[1] + 1, device=batch["tokens"].device)
    lengths = (batch["response_mask"] * columns).amax(1).cpu()       # (B,) tokens before the padding
    for rows in lengths.argsort(stable=True).split(size):
        width = int(lengths[rows].max())
        yield rows, {k: v[rows] if v.dim() == 1 else v[rows, :width if k == "tokens" else width - 1]
                     for k, v in batch.items()}


def sampled(gpt, micro):
    """Hidden states (N, C) in which the N tokens of response_mask were chosen, and those tokens (N,)."""
    return gpt(micro["tokens"])[:, :-1][micro["response_mask"]], micro["tokens"][:, 1:][micro["response_mask"]]


def place(x, response_mask):
    """Values (N,) of the sampled tokens at their places (B, T-1), 0 elsewhere."""
    return torch.zeros(response_mask.shape, dtype=x.dtype, device=x.device).masked_scatter(response_mask, x)


def masked_mean(x, mask):
    """Mean of x over the True places of mask."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def autocast(tokens):
    """bf16 matrix products on a GPU, plain fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()


def optimiser_step(loss_of, minibatch, optimizer, args):
    """One step on the rows of a minibatch; loss_of(micro, minibatch) gives a micro-batch's share of the loss and of the logged
    means. Returns those and grad_norm as floats; a FloatingPointError names what is not finite, before any weight changes."""
    optimizer.zero_grad()
    totals = {}
    for _, micro in micro_batches(minibatch, args.micro_batch_size):
        with autocast(micro["tokens"]):
            loss, stats = loss_of(micro, minibatch)
        loss.backward()
        totals = {k: totals.get(k, 0) + v.detach() for k, v in stats.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
    totals = dict(zip(totals, torch.stack(list(totals.values())).tolist()))     # one device-to-host copy
    for name, value in totals.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    optimizer.step()
    return totals


@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    """A permutation of range(n) that depends on nothing but its arguments."""
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def draw(n, size, index, seed):
    """The index-th batch of `size` out of n items, epoch after epoch; stateless, so a resumed run draws the same."""
    return [shuffled(n, seed, i // n)[i % n] for i in range(index * size, (index + 1) * size)]


# ---- warm-up -----------------------------------------------------------------------------------------------------------------

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


def warmup(policy, rows, optimizer, state, save, args):
    """Supervised training on rows, linear learning rate with 10 % warm-up steps; goes on at state["step"], saves each minute."""
    steps, saved_at = math.ceil(args.warmup_epochs * len(rows) / args.warmup_batch_size), time.time()
    loss_of = functools.partial(sft_loss, policy)
    bar = tqdm(range(state["step"], steps), "warm-up", initial=state["step"], total=steps, disable=None, leave=False)
    for step in bar:
        lr = args.warmup_lr * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = pack([rows[i] for i in draw(len(rows), args.warmup_batch_size, step, args.seed)],
                     policy.config.pad_id, policy.head_weight.device)
        with located(f"warm-up step {step + 1}", args):
            loss = optimiser_step(loss_of, batch, optimizer, args)["loss"]
        state["step"], state["loss"] = step + 1, loss if step == 0 else 0.99 * state["loss"] + 0.01 * loss
        bar.set_postfix(loss=f"{state['loss']:.3f}", refresh=False)
        if STOP or time.time() > saved_at + 60:
            save()
            leave_if_stopped(args)
            saved_at = time.time()


# ---- rollout and advantages --------------------------------------------------------------------------------------------------

def responses(tokens, response_mask, problems, tokenizer):
    """Texts of the responses: what was given of each and what was sampled, without the end token."""
    texts = []
    for row, mask, problem in zip(tokens[:, 1:].tolist(), response_mask.tolist(), problems):
        ids = [token for token, chosen in zip(row, mask) if chosen]
        texts.append(tokenizer.decode(problem["given"] + ids[:-1 if ids[-1] == tokenizer.eos_id else None]))
    return texts


def truncated(tokens, response_mask, eos_id):
    """(B,) True where a response ran out of room: none of its sampled tokens is the end token."""
    return ~(response_mask & (tokens[:, 1:] == eos_id)).any(1)


def token_rewards(outcomes, kl_k1, kl, response_mask, args):
    """Rewards (B, T-1): the outcome on the last sampled token, finished or truncated, and the KL penalty on every one.

    k1 charges each action its own log-ratio: unbiased. The exact KL(s_t) does not depend on a_t, so it charges a_t with the KL of
    the next state, and loss_fn adds the KL of this one: the same expected gradient, each sampled ratio replaced by its mean.
    """
    last = (response_mask * torch.arange(1, response_mask.shape[1] + 1, device=outcomes.device)).argmax(1, keepdim=True)
    rewards = torch.zeros_like(kl_k1).scatter(1, last, outcomes[:, None])
    if args.kl == "k1":
        return rewards - args.kl_coef * kl_k1                                                                        # F3
    next_kl = torch.cat([kl[:, 1:], torch.zeros_like(kl[:, :1])], 1)      # 0 after the last token, as kl is 0 outside the mask
    return rewards - args.kl_coef * torch.where(response_mask, next_kl, 0)


def gae(rewards, values, response_mask, gamma, lam):
    """Advantages and returns (B, T-1) by generalised advantage estimation; V = 0 after the last sampled token."""
    advantages = torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(response_mask[:, t], delta + gamma * lam * following, 0)                             # F4
        advantages[:, t], next_value = following, values[:, t]
    return advantages, torch.where(response_mask, advantages + values, 0)                                            # F5


def whiten(advantages, response_mask):
    """Advantages with mean 0 and variance 1 (n - 1) over the response tokens, and the divisor; 0 outside the mask."""
    chosen = advantages[response_mask]
    sigma = (chosen.var() + 1e-8).sqrt() if len(chosen) > 1 else torch.ones_like(chosen[0])
    return torch.where(response_mask, (advantages - chosen.mean()) / sigma, 0), sigma                                # F6


@torch.no_grad()
def rollout(policy, critic, ref, problems, tokenizer, args):
    """One sampled response per problem, checked and scored: a dict of (B, T-1) tensors for the update, and a dict to log."""
    tokens, response_mask = generate(policy, [p["prompt"] + p["given"] for p in problems], args.max_new_tokens)
    texts = responses(tokens, response_mask, problems, tokenizer)
    answers = read_answers(texts, problems, args)
    outcomes = reward(answers, problems, args).to(tokens.device)
    data = {"tokens": tokens, "response_mask": response_mask}
    names = ("old_logprobs", "ref_logprobs", "old_values", "kl", "entropy")
    scores = {name: torch.zeros(response_mask.shape, device=tokens.device) for name in names}
    for rows, micro in micro_batches(data, args.micro_batch_size):
        with autocast(tokens):
            (hidden, targets), (ref_hidden, _) = sampled(policy, micro), sampled(ref, micro)
            logprobs, entropy = linear_logprobs(hidden, policy.head_weight, targets)
            ref_logprobs, _ = linear_logprobs(ref_hidden, ref.head_weight, targets)
            kl = linear_kl(hidden, policy.head_weight, ref_hidden, ref.head_weight)      # exact, over the whole vocabulary
            values = critic.values(hidden if critic is policy else sampled(critic, micro)[0])
        for name, x in zip(names, (logprobs, ref_logprobs, values, kl, entropy)):
            scores[name][rows, :micro["response_mask"].shape[1]] = place(x.float(), micro["response_mask"])
    kl_k1 = scores["old_logprobs"] - scores["ref_logprobs"]                              # one-sample estimate of the KL
    rewards = token_rewards(outcomes, kl_k1, scores["kl"], response_mask, args)
    advantages, returns = gae(rewards, scores["old_values"], response_mask, args.gamma, args.lam)
    residual = (returns - scores["old_values"])[response_mask]
    explained = 1 - residual.var() / returns[response_mask].var()
    advantages, sigma = whiten(advantages, response_mask) if args.whiten else (advantages, torch.ones_like(outcomes[0]))
    data |= {"outcomes": outcomes, "old_logprobs": scores["old_logprobs"], "old_values": scores["old_values"],
             "advantages": advantages, "returns": returns,
             "kl_weight": (args.kl_coef / sigma).expand(len(outcomes))}      # as k1's penalty is divided by sigma
    log = {"accuracy": (outcomes == 1).float().mean(), "outcome": outcomes.mean(),
           "unparsed": sum(answer is None for answer in answers) / len(answers),
           "truncated": truncated(tokens, response_mask, tokenizer.eos_id).float().mean(),
           "no_signal": float(outcomes.min() == outcomes.max()), "response_length": response_mask.sum(1).float().mean(),
           "kl": scores["kl"].sum(1).mean(), "kl_k1": kl_k1.sum(1).mean(),               # sums over a response
           "entropy": masked_mean(scores["entropy"], response_mask), "explained_variance": explained}
    if args.cot == "text" and isinstance(problems[0]["gold"], str):                      # right letters after wrong chains
        log["contradictions"] = sum(contradicts(t, p) for t, p, o in zip(texts, problems, outcomes) if o == 1) / len(texts)
    return data, {k: float(v) for k, v in log.items()} | {"tokens": int(response_mask.sum()), "sample": texts[0]}


# ---- loss --------------------------------------------------------------------------------------------------------------------

def loss_fn(policy, critic, ref, args, micro, minibatch):
    """A micro-batch's share of the minibatch's loss: clipped policy and value losses, and the KL of this state if args.kl is
    exact. Each is a mean over the tokens of a row, then over the rows of the minibatch, as in the authors' code."""
    mask, advantages, returns = micro["response_mask"], micro["advantages"], micro["returns"]
    row_mean = torch.where(mask, 1 / mask.sum(1, keepdim=True).clamp(min=1), 0) / len(minibatch["tokens"])   # (B, T-1) weights
    hidden, targets = sampled(policy, micro)
    logprobs = place(linear_logprobs(hidden, policy.head_weight, targets)[0], mask)
    values = place(critic.values(hidden if critic is policy else sampled(critic, micro)[0]), mask)

    ratio = torch.where(mask, logprobs - micro["old_logprobs"], 0).exp()
    clipped_ratio = ratio.clamp(1 - args.clip_eps, 1 + args.clip_eps)
    policy_loss = (row_mean * torch.maximum(-advantages * ratio, -advantages * clipped_ratio)).sum()                 # F7
    clipped_values = micro["old_values"] + (values - micro["old_values"]).clamp(-args.value_clip, args.value_clip)
    value_loss = (row_mean * 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)).sum()    # F8
    loss = policy_loss + args.vf_coef * value_loss                                                                   # F9
    stats = {"policy_loss": policy_loss, "value_loss": value_loss,
             "clip_frac": torch.where(mask, ratio != clipped_ratio, False).sum() / minibatch["response_mask"].sum()}
    if args.kl == "exact":
        with torch.no_grad():
            ref_hidden, _ = sampled(ref, micro)
        kl = place(linear_kl(hidden, policy.head_weight, ref_hidden, ref.head_weight), mask)
        stats["kl_loss"] = (row_mean * micro["kl_weight"][:, None] * kl).sum()
        loss = loss + stats["kl_loss"]
    return loss, stats


def update(loss_of, data, optimizer, args):
    """Passes over a rollout in minibatches of fresh permutations. Returns the mean of each logged number; clip_frac by pass."""
    passes = []
    for ppo_epoch in range(args.ppo_epochs):
        order = torch.randperm(len(data["tokens"]), device=data["tokens"].device)
        steps = [optimiser_step(loss_of, {k: v[rows] for k, v in data.items()}, optimizer, args)
                 for rows in order.split(args.minibatch_size)]
        passes.append({k: sum(step[k] for step in steps) / len(steps) for k in steps[0]})
    return {k: [p[k] for p in passes] if k == "clip_frac" else sum(p[k] for p in passes) / len(passes) for k in passes[0]}


# ---- baseline: supervised training -------------------------------------------------------------------------------------------

def sft_update(policy, rows, optimizer, iteration, steps, args):
    """An iteration of supervised training: `steps` optimiser steps on a schedule, as the warm-up's, over all iterations."""
    done, total = [], steps * args.iterations
    for i in range((iteration - 1) * steps, iteration * steps):
        for group in optimizer.param_groups:
            group["lr"] = args.warmup_lr * min((i + 1) / (0.1 * total), (total - i) / (0.9 * total), 1.0)
        chosen = [rows[j] for j in draw(len(rows), args.warmup_batch_size, i, f"{args.seed} sft")]
        batch = pack(chosen, policy.config.pad_id, policy.head_weight.device)
        done.append(optimiser_step(functools.partial(sft_loss, policy), batch, optimizer, args))
    return {k: sum(step[k] for step in done) / steps for k in done[0]}


# ---- evaluation, log, plot, resume -------------------------------------------------------------------------------------------

def contradicts(text, problem):
    """Multiple choice: whether the last number that the rationale arrives at is not the right option's. A wrong chain with the
    right letter earns the full reward."""
    option = re.search(rf"\b{problem['gold']} \) (\S+)", problem["question"]) if isinstance(problem["gold"], str) else None
    reached = re.findall(r"= (\S+)", text)
    return bool(option and reached and parse_number(reached[-1]) != parse_number(option[1]))


@torch.no_grad()
def evaluate(policy, problems, tokenizer, args):
    """Greedy accuracy on problems from the question alone, and what goes with it; the last entry is a sample to look at."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt"]))       # like lengths together: less padding
    right = unparsed = cut = length = contradictions = 0
    for i in tqdm(range(0, len(order), args.batch_size), "evaluation", disable=None, leave=False):
        batch = [problems[j] for j in order[i:i + args.batch_size]]
        tokens, response_mask = generate(policy, [p["prompt"] + p["given"] for p in batch], args.max_new_tokens, temperature=0)
        texts = responses(tokens, response_mask, batch, tokenizer)
        answers = read_answers(texts, batch, args)
        outcomes = reward(answers, batch, args)
        right += int((outcomes == 1).sum())
        if args.cot == "text":
            contradictions += sum(contradicts(t, p) for t, p, o in zip(texts, batch, outcomes) if o == 1)
        unparsed += sum(answer is None for answer in answers)
        cut += int(truncated(tokens, response_mask, tokenizer.eos_id).sum())
        length += int(response_mask.sum())
    n = len(problems)
    return {"accuracy": right / n, "unparsed": unparsed / n, "truncated": cut / n, "response_length": length / n,
            "contradictions": contradictions / n, "sample": batch[0]["question"] + "\n" + texts[0]}


STOP = []                                                            # signals received


def on_signal(number, frame):
    """The first Ctrl-C or SIGTERM lets the step at hand end, so that the run is saved; a second one ends it at once."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)


def leave_if_stopped(args):
    """After a save: exits with 128 + the signal's number and says how to go on, if a signal came."""
    if STOP:
        flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
        print(f"stopped; saved in {args.out}; go on with: python {' '.join([sys.argv[0], *flags, '--resume'])}", file=sys.stderr)
        sys.exit(128 + STOP[0])


def write_whole(path, write):
    """write(temporary path), then a rename: whatever happens, the file at path is whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def run_info(args):
    """What args.json holds: the flags, versions, device and commit."""
    git = shutil.which("git")
    ask = [git, "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if git else ""
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return {"args": asdict(args), "python": platform.python_version(), "torch": torch.__version__, "device": name,
            "threads": torch.get_num_threads(), "commit": commit}


def open_run(args):
    """Makes the run folder, or reads the one to resume: (state, saved tensors). Refuses to mix two runs in one folder."""
    out = Path(args.out)
    if not args.resume:
        if (out / "args.json").exists():
            raise InputError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "args.json", lambda path: path.write_text(json.dumps(run_info(args), indent=1)))
        (out / "log.jsonl").write_text("")
        return {"phase": "warmup", "step": 0, "log_lines": 0, "seconds": 0.0, "tokens": 0}, {}
    if not (out / "args.json").exists():
        raise InputError(f"{out}: no run to resume")
    before = json.loads((out / "args.json").read_text())["args"]
    for name, value in asdict(args).items():
        if before.get(name) != value and name not in ("resume", "out"):
            raise InputError(f"{out}: --{name.replace('_', '-')} was {before.get(name)!r} in this run, not {value!r}")
    if not (out / "state.pt").exists():                              # killed before anything was saved: from the start
        (out / "log.jsonl").write_text("")
        return {"phase": "warmup", "step": 0, "log_lines": 0, "seconds": 0.0, "tokens": 0}, {}
    saved = torch.load(out / "state.pt", map_location=args.device, weights_only=True)
    state = saved.pop("state")
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    write_whole(out / "log.jsonl", lambda path: path.write_text("".join(lines[:state["log_lines"]])))
    return state, saved


def save_run(args, state, modules, optimizer):
    """state.pt: all that resuming needs, {"state", "optimizer", and each module's weights by name}."""
    saved = {"state": state, "optimizer": optimizer.state_dict()} | {k: v.state_dict() for k, v in modules.items()}
    write_whole(Path(args.out) / "state.pt", lambda path: torch.save(saved, path))


def restore(saved, modules, optimizer):
    """Puts back what save_run saved."""
    for name, module in modules.items():
        module.load_state_dict(saved[name])
    optimizer.load_state_dict(saved["optimizer"])


def write_log(args, state, record):
    """Appends one line to log.jsonl; a number that is not finite (the explained variance of equal returns) becomes null."""
    plain = {k: (round(v, 6) if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in record.items()}
    with open(Path(args.out) / "log.jsonl", "a") as file:
        file.write(json.dumps(plain) + "\n")
    state["log_lines"] += 1


def show(record, state, args):
    """The record, short, as one line on the screen."""
    red = lambda text: f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text
    names = {"accuracy": "acc", "outcome": "reward", "kl": "kl", "response_length": "len", "loss": "loss", "policy_loss": "pg",
             "value_loss": "vf", "kl_loss": "klloss", "clip_frac": "clip", "explained_variance": "ev", "grad_norm": "grad",
             "truncated": "cut", "dev_accuracy": "dev"}
    parts = [f"iteration {record['iteration']:4d}/{args.iterations}"]
    for key, name in names.items():
        if key in record:
            value = record[key]
            text = f"{name} " + ("/".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.3g}")
            parts.append(red(text) if key == "truncated" and value > 0.2 else text)
    eta = state["seconds"] / record["iteration"] * (args.iterations - record["iteration"])
    tqdm.write("  ".join(parts) + f"  {record['tokens_per_second']:.0f} tok/s  ETA {eta // 60:.0f}:{eta % 60:02.0f}")


def finish_iteration(record, state, began, args):
    """Adds the times, logs the record, shows it, draws the curves, and warns of ten iterations in a row without any signal."""
    seconds = time.time() - began
    state["step"], state["seconds"] = record["iteration"], state["seconds"] + seconds
    state["tokens"] += record["tokens"]
    record |= {"seconds": seconds, "tokens_per_second": record["tokens"] / seconds}
    write_log(args, state, record)
    state["flat"] = state.get("flat", 0) + 1 if record.get("no_signal") == 1 else 0
    show(record, state, args)
    if state["flat"] and state["flat"] % 10 == 0:
        tqdm.write(f"warning: {state['flat']} iterations in a row in which all outcomes that are compared were equal: there is "
                   "nothing to learn from; look at the samples in log.jsonl")
    if "dev_accuracy" in record:
        plot(args)


def write_summary(args, state, problems):
    """summary.json: what a results table needs."""
    write_whole(Path(args.out) / "summary.json", lambda path: path.write_text(json.dumps(
        {"script": Path(__file__).stem, "method": args.method, "seed": args.seed, "problems": problems,
         "before": state["before"], "after": state["after"], "best": state["best"], "seconds": round(state["seconds"], 3),
         "tokens_per_second": round(state["tokens"] / max(state["seconds"], 1e-9), 1)}, indent=1)))


def print_ids(name, ids, tokenizer):
    """A text with its token ids: a forgotten template, a doubled BOS or a missing end token shows here."""
    print(f"  {name}: {tokenizer.decode(ids)!r}\n  its ids: {ids}")


@contextmanager
def located(where, args):
    """Says where a number stopped being finite, and that the state saved last is kept."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {error}; the state saved last is kept in {args.out}") from None


def plot(args):
    """curves.png: every number of log.jsonl over the iterations."""
    log = [json.loads(line) for line in open(Path(args.out) / "log.jsonl")]
    log = [record for record in log if record["event"] == "iteration"]
    panels = [["accuracy", "dev_accuracy", "contradictions"], ["outcome"], ["kl", "kl_k1"], ["response_length"],
              ["truncated", "unparsed"], ["policy_loss"], ["value_loss"], ["loss"], ["entropy"], ["explained_variance"],
              ["clip_frac"], ["grad_norm"]]
    panels = [[k for k in keys if any(k in r for r in log)] for keys in panels]
    panels = [keys for keys in panels if keys]
    figure = Figure(figsize=(14, 2.6 * math.ceil(len(panels) / 4)), layout="constrained")
    for i, keys in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / 4), 4, i + 1, title=", ".join(keys))
        for key in keys:
            points = [(r["iteration"], r[key]) for r in log if r.get(key) is not None]
            axes.plot(*zip(*points), marker="." if key == "dev_accuracy" else "")
    figure.savefig(Path(args.out) / "curves.png", dpi=100)


# ---- the algorithm -----------------------------------------------------------------------------------------------------------

def initial_policy(args):
    """The policy before any training, and its tokenizer: the checkpoint --model, or a small GPT from nothing."""
    torch.manual_seed(args.seed)
    if args.model:
        policy, tokenizer = load_checkpoint(args.model)
    else:
        tokenizer = builtin_tokenizer(args)
        policy = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd,
                               max_len=512, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id))
    return policy.to(args.device), tokenizer


def prepare(args):
    """Policy, tokenizer and the encoded train, dev and test problems; every complaint about the input comes from here."""
    splits = load_problems(args)
    policy, tokenizer = initial_policy(args)
    splits = [[encode_record(record, tokenizer, args) for record in split] for split in splits]
    for problem in sum(splits, []):
        length = len(problem["prompt"]) + max(len(problem["response"]), len(problem["given"]) + args.max_new_tokens)
        if length > policy.config.max_len:
            raise InputError(f"the question {problem['question'][:60]!r}... takes {length} tokens with its response, "
                             f"the model's context holds {policy.config.max_len}")
    longer = sum(len(problem["response"]) - len(problem["given"]) > args.max_new_tokens for problem in splits[0])
    if longer:
        tqdm.write(f"warning: {longer} of {len(splits[0])} demonstrations are longer than --max-new-tokens "
                   f"{args.max_new_tokens}; responses as long will be cut off")
    return policy, tokenizer, *splits


def adamw(modules, lr):
    """AdamW without weight decay over the parameters of some modules, each once."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0, fused=True)


def main(args):
    policy, tokenizer, train, dev, test = prepare(args)
    train = train if args.train_data else restyled(train, tokenizer, args)
    starts = all_starts(train, policy, tokenizer, args)
    state, saved = open_run(args)
    out, rows = Path(args.out), [sft_row(problem) for problem in train]

    print_ids("first prompt", train[0]["prompt"] + train[0]["given"], tokenizer)
    print_ids("its demonstration", train[0]["response"], tokenizer)
    print_ids("what the last start of another gives", starts[0][-1]["given"], tokenizer)

    # warm-up
    if state["phase"] == "warmup":
        modules, optimizer = {"policy": policy}, adamw([policy], args.warmup_lr)
        if saved:
            restore(saved, modules, optimizer)
        warmup(policy, rows, optimizer, state, lambda: save_run(args, state, modules, optimizer), args)
        save_checkpoint(out / "warmup", policy, tokenizer)
        state["before"] = evaluate(policy, test, tokenizer, args)
        write_log(args, state, {"event": "warmup", "steps": state["step"], "loss": state.get("loss")} | state["before"])
        state, saved = state | {"phase": "train", "warmup_steps": state["step"], "step": 0}, {}
    else:
        policy = load_checkpoint(out / "warmup")[0].to(args.device)
    print(f"warm-up: accuracy {state['before']['accuracy']:.3f} on {len(test)} test problems")
    print(f"  a response: {state['before']['sample']!r}")

    # the warm-up model is the initial policy, the frozen reference, and the trunk of the value function
    ref = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(args.seed)
    steps = math.ceil(args.ppo_epochs * args.batch_size / args.warmup_batch_size)    # of a supervised iteration, as many rows
    critic = copy.deepcopy(policy) if args.value == "separate" else policy
    critic.add_value_head()
    if args.zero_value:
        torch.nn.init.zeros_(critic.value_head.weight), torch.nn.init.zeros_(critic.value_head.bias)
    critic.to(args.device)
    modules = {"policy": policy} | ({"critic": critic} if critic is not policy else {})
    optimizer = adamw(modules.values(), args.lr)
    if saved:
        restore(saved, modules, optimizer)
    else:
        save_checkpoint(out / "model", policy, tokenizer)
        state["best"] = {"iteration": 0, "accuracy": evaluate(policy, dev, tokenizer, args)["accuracy"]}
        save_run(args, state, modules, optimizer)
    loss_of = functools.partial(loss_fn, policy, critic, ref, args)

    for iteration in range(state["step"] + 1, args.iterations + 1):
        began = time.time()
        torch.manual_seed(1_000_003 * args.seed + iteration)         # so a resumed run needs no random state
        with located(f"iteration {iteration}", args):
            if args.method == "sft":
                log, stats = {"tokens": 0}, sft_update(policy, rows, optimizer, iteration, steps, args)
            else:
                batch = draw_starts(starts, iteration, args)
                data, log = rollout(policy, critic, ref, batch, tokenizer, args)
                log |= by_stage(data, batch, args) | {"total_tokens": state["tokens"] + log["tokens"]}
                stats = update(loss_of, data, optimizer, args)
                if iteration == 1:
                    print_ids("first sample", data["tokens"][0, 1:][data["response_mask"][0]].tolist(), tokenizer)
        record = {"event": "iteration", "iteration": iteration} | log | stats
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            greedy = evaluate(policy, dev, tokenizer, args)
            record |= {"dev_accuracy": greedy["accuracy"], "dev_sample": greedy["sample"]}
            if greedy["accuracy"] > state["best"]["accuracy"]:
                save_checkpoint(out / "model", policy, tokenizer)
                state["best"] = {"iteration": iteration, "accuracy": greedy["accuracy"]}
        finish_iteration(record, state, began, args)
        if "dev_accuracy" in record:
            plot_stages(args)
        if iteration % args.save_every == 0 or iteration == args.iterations or STOP:
            save_run(args, state, modules, optimizer)
            leave_if_stopped(args)

    # the checkpoint that was best on the dev split, tested once
    if state["phase"] == "train":
        best = load_checkpoint(out / "model")[0].to(args.device)
        state["after"] = evaluate(best, test, tokenizer, args)
        end = {"event": "end", "best_iteration": state["best"]["iteration"], "total_tokens": state["tokens"]}
        write_log(args, state, end | state["after"])
        write_summary(args, state, len(test))
        state["phase"] = "done"
        save_run(args, state, modules, optimizer)
    print(f"{args.method}: accuracy {state['before']['accuracy']:.3f} -> {state['after']['accuracy']:.3f} on {len(test)} "
          f"test problems (dev {state['best']['accuracy']:.3f} at iteration {state['best']['iteration']}); {out}")


def comments():
    """{field of Args: the comment behind it}, the help texts."""
    return dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Args), re.M))


def fail(message):
    """One line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    """Args from the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, texts = fail, comments()
    for f in fields(Args):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        text = texts[f.name].replace("%", "%%") + ("" if f.default == "" else f" (default: {f.default})")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    args = Args(**vars(parser.parse_args(argv)))
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    args.out = args.out or f"runs/{Path(__file__).stem}-{args.method}-s{args.seed}"
    check_args(args)
    return args


def check_args(args):
    """InputError for impossible values."""
    for name, allowed in CHOICES.items():
        if getattr(args, name) not in allowed:
            raise InputError(f"--{name} {getattr(args, name)}: choose from {', '.join(allowed)}")
    at_least = {"seed": 0, "warmup_epochs": 0, "iterations": 0, "vote_k": 0}
    for f in fields(Args):
        value = getattr(args, f.name)
        if f.type is int and value < at_least.get(f.name, 1):
            raise InputError(f"--{f.name.replace('_', '-')} {value}: must be at least {at_least.get(f.name, 1)}")
        if f.type is float and not 0 <= value < math.inf:
            raise InputError(f"--{f.name.replace('_', '-')} {value}: must be a finite number, not negative")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU")
    if bool(args.train_data) != bool(args.eval_data):
        raise InputError("--train-data and --eval-data go together")
    if args.train_data and not args.model:
        raise InputError("--train-data needs --model: the small vocabulary made here knows the built-in problems only")
    if args.operations_low > args.operations_high:
        raise InputError("--operations-low is above --operations-high")
    if not args.model and not args.warmup_epochs:
        raise InputError("--warmup-epochs 0 needs --model: a model from nothing has to be warmed up")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        main(parse_args())
    except InputError as error:
        fail(error)
    except FloatingPointError as error:
        print(f"{Path(__file__).name}: stopped: {error}", file=sys.stderr)
        sys.exit(1)
