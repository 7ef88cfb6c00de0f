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
    credit       G2 = R2,   G1 = R1 + gamma R2 with gamma = 0: y1 earns nothing by what y2 earns  S6      turn_returns()
    baseline     A_i = G_i - mean of the G_j, j != i, of the same question, each turn by itself   S7      leave_one_out()
    policy loss  -mean over episodes of sum_t A_t log pi(a_t | s_t)                               S2      loss_fn()
    KL loss      mean over episodes of sum_t c KL(pi || pi_ref)(s_t),   c = beta2 or beta1        S8      loss_fn()
    edit ratio   Levenshtein distance of y1 and y2 / (length of y1 + length of y2)                S10     edit_ratio()

Eq. 1 is ReFT's; the paper's own Eq. 1 to 5 are S1 to S5, its text has S6 and S10. Not disclosed there and chosen here: baseline
(S7), exact KL summed over a turn (S8), share of stage I, samples per question. The reference is the base in both stages. In
expectation and with gamma = 0 the bonus is a factor 1 + alpha on the gradient of r2: r1 is part of x2, so it acts as a baseline.
Programs are asked for without worked examples (paper: three for MBPP). No code of the authors is known.

    python score.py                                               built-in problems, a small GPT from nothing, a few CPU minutes
    python score.py --method multi-turn                           an ablation: both rewards from the start, no bonus
    python score.py --method star --model runs/score-score-s0/warmup --warmup-epochs 0
                                                                  a baseline, from the same warm-up
    python score.py --model FOLDER --train-data train.jsonl --eval-data test.jsonl --warmup-epochs 0 --lr 5e-6
        --max-new-tokens 400                                      a pretrained checkpoint on GSM8K's files or ReFT's
    python score.py --task code --model FOLDER --train-data mbpp.jsonl --eval-data HumanEval.jsonl --warmup-epochs 0 --lr 1e-5
        --max-new-tokens 300                                      programs instead of answers
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from kernels import linear_kl, linear_logprobs
from model import GPT, GPTConfig, InputError, Tokenizer, load_checkpoint, save_checkpoint, generate

METHODS = ("score", "base", "self-refine", "star", "star-plus", "pair-sft", "pair-sft-plus", "multi-turn", "single-turn",
           "no-stage1", "no-shaping", "star-stage2")
CHOICES = {"method": METHODS, "task": ("math", "code"), "problems": ("numeric",), "cot": ("text", "program"),
           "kl_mode": ("loss", "reward"), "norm_std": ("none", "turn", "joint"), "device": ("cpu", "cuda")}


@dataclass
class Args:
    # run
    method: str = "score"            # score | base, self-refine: untrained | star, pair-sft, also -plus: supervised | ablations
    task: str = "math"               # math: an answer | code: a program that passes tests
    model: str = ""                  # folder of a pretrained checkpoint; empty: a small GPT from nothing
    train_data: str = ""             # GSM8K's JSON lines or ReFT's JSON list; code: MBPP's JSON lines; empty: built-in problems
    eval_data: str = ""              # test set in the same form, code: or in HumanEval's; needed with --train-data
    problems: str = "numeric"        # built-in problems: numeric
    cot: str = "text"                # rationales are text (N-CoT) | program (P-CoT: Python, run in a sandbox), from files only
    out: str = ""                    # run folder; empty: runs/<script>-<method>-s<seed>
    seed: int = 0                    # of everything random but the built-in problems, which are always the same
    device: str = "auto"             # cpu | cuda | auto
    resume: bool = False             # go on with the run in --out exactly where it was saved
    # model from nothing, used without --model (small and many steps beats large and few)
    n_layer: int = 2                 # layers
    n_head: int = 4                  # attention heads
    n_embd: int = 64                 # width
    train_size: int = 16000          # built-in training problems, of 1 to --operations-high operations
    operations_low: int = 3          # fewest operations of a built-in dev or test problem
    operations_high: int = 6         # most
    # warm-up, on a linear schedule with 10 % warm-up steps
    warmup_epochs: int = 3           # passes over the demonstrations; 0 with --model: take the checkpoint as it is (paper)
    warmup_batch_size: int = 16      # demonstrations an optimiser step
    warmup_lr: float = 2e-3          # peak; 1e-5 for a pretrained model
    slips: float = 0.5               # share of built-in demonstrations with a wrong step: with none, y2 would copy y1
    # reinforcement learning
    iterations: int = 60             # rollouts, each with its update, of both stages; paper: 3000 (MATH), 1500 (MBPP)
    stage1: float = 0.67             # share of the iterations that are stage I; not disclosed
    batch_size: int = 64             # questions an iteration
    group_size: int = 4              # K, episodes of each; not disclosed. 64 * 4 = 256; paper: 512 (MATH), 128 (MBPP)
    minibatch_size: int = 256        # rows an optimiser step, at least the whole rollout: it is used once, so there is no ratio
    micro_batch_size: int = 64       # rows a forward pass: changes memory and speed, never the result
    max_new_tokens: int = 56         # longest attempt, in each turn; not disclosed
    lr: float = 1e-4                 # constant; supervised baselines: peak; paper: 5e-6 (MATH), 1e-5 (MBPP)
    alpha: float = 10.0              # of the bonus; paper: 10
    beta1: float = 0.01              # KL weight of both turns, in stage I of the second; paper: 0.01
    beta2: float = 0.5               # KL weight of the first turn in stage I; paper: 0.1 (MATH), 0.25 (MBPP), of longer responses
    gamma: float = 0.0               # share of R2 that y1 gets in stage II; paper: 0 (0.8 with alpha 1 collapsed)
    turn2_weight: float = 1.0        # factor on y2's advantages in stage II; with no-shaping, 11 is like alpha = 10 on average
    kl_mode: str = "loss"            # loss: exact KL in the loss | reward: sampled log-ratio in the reward; not disclosed
    norm_std: str = "none"           # advantages are divided by nothing | the std of the turn's returns | of both turns': joint
    offline_fraction: float = 0.0    # q, share of first attempts in stage II that the base writes; paper: in "some experiments"
    grad_clip: float = 1.0           # norm of the gradient; not disclosed
    # supervised baselines
    rounds: int = 3                  # of star, each samples from the newest model and starts from the base; paper: 3
    sft_epochs: int = 1              # passes over the kept traces in a round; paper: 1 (pair-sft)
    # reports
    vote_k: int = 0                  # vote among 2, 4, 8 .. 2 * so many first attempts, or half as many corrections; paper: 16
    strict: bool = False             # read answers as ReFT's authors do: a bare float() of all that follows "the answer is:"
    strip_annotations: bool = False  # remove GSM8K's <<48/2=24>> from the demonstrations
    eval_every: int = 10             # iterations between greedy evaluations on the dev split; t1 + t2 (single-turn: t1) chooses
    eval_size: int = 1000            # at most so many dev and so many test problems
    save_every: int = 10             # iterations between saved states


# ---- data and reward ---------------------------------------------------------------------------------------------------------

PROMPT = "Question:\n{question}\nAnswer reasoning:\n"
PROGRAM = 'def solution():\n    """{question}"""\n    '     # opens a rationale that is a program
ANSWER = "\nTherefore, the answer is: "   # closes a rationale in words, followed by the answer
TRIGGER = ANSWER                          # the last one in a response announces its answer
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
    """Outcome of each attempt (B,): 1 for the right answer, or for a program that passes all tests, 0 for anything else."""
    if args.task == "code":
        return passes(answers, problems)
    right = [answer == p["gold"] if isinstance(answer, str) or answer is None else abs(answer - p["gold"]) <= 1e-2
             for answer, p in zip(answers, problems)]
    return torch.tensor(right, dtype=torch.float32)                                                                  # S1


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


# ---- code: MBPP and HumanEval ------------------------------------------------------------------------------------------------

CODE_PROMPT = "Question:\n{question}\nPython program:\n"


def builtin_code(n, seed):
    """n small problems in MBPP's form, for tests."""
    kinds = [("plus", "adds {} to a number", "x + {}"), ("times", "multiplies a number by {}", "x * {}"),
             ("above", "tells whether a number is above {}", "x > {}")]
    rng, records = random.Random(seed), []
    for _ in range(n):
        name, text, body = rng.choice(kinds)
        number, inputs = rng.randint(2, 99), rng.sample(range(-100, 100), 3)
        code = f"def {name}_{number}(x):\n    return {body.format(number)}"
        tests = [f"assert {name}_{number}({x}) == {eval(body.format(number), {'x': x})}" for x in inputs]
        records.append({"text": f"Write a function that {text.format(number)}.", "code": code, "test_list": tests})
    return records


def parse_code(raw, where):
    """A record of MBPP or HumanEval as {"question", "cot": a right program, "setup": code before it, "tests": code after it}."""
    texts = lambda *names: isinstance(raw, dict) and all(isinstance(raw.get(name), str) for name in names)
    if texts("text", "code") and isinstance(raw.get("test_list"), list) and raw["test_list"]:
        tests = "\n".join(map(str, raw["test_list"]))
        question = f"{raw['text'].strip()}\nYour code should pass these tests:\n{tests}"
        tests = f"{raw.get('test_setup_code') or ''}\n{tests}"                            # which may use what the program defines
        setup, program = "", raw["code"]
    elif texts("prompt", "canonical_solution", "test", "entry_point") and f"def {raw['entry_point']}(" in raw["prompt"]:
        setup = raw["prompt"][:raw["prompt"].rindex(f"def {raw['entry_point']}(")]       # imports, and functions it builds on
        question, program = raw["prompt"].strip(), raw["prompt"] + raw["canonical_solution"]
        tests = f"{raw['test']}\ncheck({raw['entry_point']})"
    else:
        raise InputError(f"{where}: neither MBPP's form (text, code, test_list) nor HumanEval's "
                         "(prompt, canonical_solution, test, entry_point)")
    record = {"question": question, "cot": program.strip(), "setup": setup, "tests": tests}
    return {k: v.replace("\r\n", "\n") for k, v in record.items()} | {"task_id": raw.get("task_id")}


def load_code(args):
    """Train, dev and test records: by the authors' split of MBPP (training 601 to 974, validation 511 to 600) if the training
    file has both, else a tenth of it is dev; of an MBPP file for evaluation 11 to 510; the built-in set without a file."""
    if not args.train_data:
        records = [parse_code(raw, "built-in") for raw in builtin_code(300, 0)]
        return records[:200], records[200:250][:args.eval_size], records[250:][:args.eval_size]
    records = [parse_code(raw, where) for where, raw in read_records(args.train_data)]
    number = lambda record: record["task_id"] if type(record["task_id"]) is int else 0
    train, dev = [r for r in records if 601 <= number(r) <= 974], [r for r in records if 511 <= number(r) <= 600]
    if not train or not dev:
        train, dev = records[len(records) // 10:], records[:len(records) // 10]
    if not train or not dev:
        raise InputError(f"{args.train_data}: too few records for a training and a dev split")
    test = [parse_code(raw, where) for where, raw in read_records(args.eval_data)]
    test = [r for r in test if 11 <= number(r) <= 510] or test                               # of MBPP its own test split
    return train, dev[:args.eval_size], test[:args.eval_size]


def prepare_code(args):
    """As prepare(), for programs."""
    splits = load_code(args)
    policy, tokenizer = initial_policy(args)
    encode = lambda record: record | {"prompt": tokenizer.encode(CODE_PROMPT.format(question=record["question"])), "given": [],
                                      "response": tokenizer.encode(record["cot"]) + [tokenizer.eos_id]}
    return policy, tokenizer, *[[encode(record) for record in split] for split in splits]


def read_program(text):
    """The program in a response: its last fenced block, or all of it; None if it is empty."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|$)", text, re.S)
    return (blocks[-1] if blocks else text).strip("\n") or None


def with_tests(program, problem, key):
    """A text for run_programs: its solution() returns key if all tests pass. The tests come last, so that no definition of the
    program replaces them, and see the program's own `solution` if it has one; a key that no program knows, since in a text that
    does not parse to its end that one would be called."""
    tests = "".join(f"    {line}\n" for line in problem["tests"].split("\n"))
    return f"{problem['setup']}\n{program}\n\ndef solution(solution=globals().get(\"solution\")):\n{tests}    return {key!r}\n"


def passes(programs, problems):
    """(B,) 1.0 for a program that passes all tests of its problem; equal pairs are run once."""
    key = random.SystemRandom().uniform(1, 2)
    texts = [None if program is None else with_tests(program, problem, key) for program, problem in zip(programs, problems)]
    distinct = [text for text in dict.fromkeys(texts) if text]
    values = dict(zip(distinct, run_programs(distinct)))
    return torch.tensor([float(values.get(text) == key) for text in texts])


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


# ---- SCoRe: two turns, two stages --------------------------------------------------------------------------------------------

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


def turns(args):
    """The texts of TURNS that fit the data."""
    return TURNS["code" if args.task == "code" else "program" if args.cot == "program" else
                 "math" if args.train_data else "built-in"]


def add_turns(problems, tokenizer, max_len, args):
    """Puts the text before x1 into "prompt" and adds "again", the ids of p1; both turns have to fit into the context."""
    before, again, refine = [tokenizer.encode(text) for text in turns(args)]
    again = refine if args.method == "self-refine" else again
    problems = [problem | {"prompt": before + problem["prompt"], "again": again} for problem in problems]
    for problem in problems:
        length = len(problem["prompt"]) + len(again) + 2 * (len(problem["given"]) + args.max_new_tokens)
        if max(length, len(problem["prompt"]) + len(problem["response"])) > max_len:
            raise InputError(f"the question {problem['question'][:60]!r}... takes {length} tokens with two attempts, "
                             f"the model's context holds {max_len}")
    return problems


def demonstration(question, rng, args):
    """A fresh response to a built-in question, from annotators with builtin_record's two styles, who in a share args.slips of the
    cases get the result of one line wrong by one and carry on from there (between 0 and 19, all that the vocabulary has)."""
    start, chain = re.match(r"What is (\d+)", question)[1], re.findall(r" [+-] \d+", question)
    stride = 1 if rng.random() < (0.7 if len(chain) <= 3 else 0.3) else 4
    stops = [*range(stride, len(chain), stride), len(chain)]
    slip = rng.randrange(len(stops)) if rng.random() < args.slips else None
    total, lines = int(start), []
    for line, (i, j) in enumerate(zip([0] + stops, stops)):
        left, total = f"{total}{''.join(chain[i:j])}", total + sum(int(step.replace(" ", "")) for step in chain[i:j])
        total = min(max(total + (rng.choice((-1, 1)) if line == slip else 0), 0), 19)
        lines.append(f"{left} = {total}")
    return "\n".join(lines) + f"{ANSWER}{total}"


def warmup_rows(problems, tokenizer, args):
    """Rows of the warm-up. Three in four of the built-in ones go through both turns, x1 y1 p1 y2, with y1 and y2 trained. They
    teach what a second attempt looks like and not to correct: y2 is drawn like y1, independently of it and of whether it is
    right. A file has one demonstration per question, and to repeat it would teach to copy: its rows have one turn."""
    if args.train_data or args.task == "code":
        return [sft_row(problem) for problem in problems]
    rng, rows = random.Random(4), []
    _, again, refine = [tokenizer.encode(text) for text in turns(args)]
    for i, problem in enumerate(problems):
        first, second = [tokenizer.encode(demonstration(problem["question"], rng, args)) + [tokenizer.eos_id] for _ in range(2)]
        row, flags = sft_row(problem | {"response": first})
        if i % 4:
            between = refine if i % 4 == 1 else again
            row, flags = row + between + second, flags + [False] * len(between) + [True] * len(second)
        rows.append((row, flags))
    return rows


def two_turns(policy, problems, args, temperature=1.0, group_size=1, first=None):
    """Two attempts at each problem, in one row [x1 | y1 | p1 | y2 | pad]: tokens (B, T), turn1_mask and turn2_mask (B, T-1).
    first: (tokens, response_mask) of first attempts written elsewhere."""
    prompts = [p["prompt"] + p["given"] for p in problems]
    tokens, turn1_mask = first or generate(policy, prompts, args.max_new_tokens, temperature, group_size)
    ends = (turn1_mask * torch.arange(2, tokens.shape[1] + 1, device=tokens.device)).amax(1).tolist()
    repeated = [p for p in problems for _ in range(len(tokens) // len(problems))]
    second_prompts = [row[:end] + p["again"] + p["given"] for row, end, p in zip(tokens.tolist(), ends, repeated)]
    tokens, turn2_mask = generate(policy, second_prompts, args.max_new_tokens, temperature)
    return tokens, torch.nn.functional.pad(turn1_mask, (0, turn2_mask.shape[1] - turn1_mask.shape[1])), turn2_mask


def offline_first(policy, ref, problems, args):
    """First attempts (tokens, response_mask), a share args.offline_fraction by the reference, and (B,) which are the policy's."""
    prompts = [p["prompt"] + p["given"] for p in problems]
    pairs = [generate(gpt, prompts, args.max_new_tokens, group_size=args.group_size) for gpt in (policy, ref)]
    width = max(tokens.shape[1] for tokens, _ in pairs)
    own = torch.rand(len(pairs[0][0]), device=policy.head_weight.device) >= args.offline_fraction
    tokens, mask = [torch.where(own[:, None], *[torch.nn.functional.pad(x, (0, w - x.shape[1]), value=fill) for x in pair])
                    for pair, w, fill in zip(zip(*pairs), (width, width - 1), (policy.config.pad_id, False))]
    return (tokens, mask), own


def grade(tokens, turn_mask, problems, tokenizer, args):
    """Texts, answers and outcomes (B,) of one turn. An attempt that ran out of room has no answer."""
    texts = responses(tokens, turn_mask, problems, tokenizer)
    answers = [read_program(text) for text in texts] if args.task == "code" else read_answers(texts, problems, args)
    answers = [None if cut else answer for cut, answer in zip(truncated(tokens, turn_mask, tokenizer.eos_id).tolist(), answers)]
    return texts, answers, reward(answers, problems, args)


def stage_of(iteration, args):
    """1 or 2: a function of the iteration alone, so a resumed run is where it was."""
    staged = args.method in ("score", "no-shaping", "star-stage2")
    return 1 if staged and iteration <= round(args.stage1 * args.iterations) else 2


def turn_returns(outcomes1, outcomes2, k1_sums1, k1_sums2, stage, args):
    """G1 and G2 (B,), what the tokens of y1 and of y2 are credited with. k1_sums (B,): log-ratios to the reference, by turn."""
    R1, R2 = torch.zeros_like(outcomes1), outcomes2                                                                  # S3
    if stage == 2:
        R1 = outcomes1                                                                                               # S4
        if args.method in ("score", "no-stage1"):
            R2 = R2 + args.alpha * (outcomes2 - outcomes1)                                                           # S5
    if args.kl_mode == "reward":
        c1, c2 = kl_weights(stage, args)
        R1, R2 = R1 - c1 * k1_sums1, R2 - c2 * k1_sums2
    return R1 + args.gamma * R2 if stage == 2 else R1, R2                                                            # S6


def kl_weights(stage, args):
    """KL weights of the first and of the second turn."""
    return args.beta2 if stage == 1 else args.beta1, args.beta1


def leave_one_out(returns, counted, group_size):
    """A (Q, K): each return minus the mean of the others of its question, among the counted rows; 0 where there is no other."""
    returns, counted = returns.view(-1, group_size), counted.view(-1, group_size)
    n = counted.sum(1, keepdim=True)
    others = (torch.where(counted, returns, 0).sum(1, keepdim=True) - returns) / (n - 1).clamp(min=1)
    return torch.where(counted & (n > 1), returns - others, 0)                                                       # S7


def turn_advantages(G1, G2, on1, args):
    """A1 and A2 (B,) of the two turns; on1 (B,): rows whose first attempt is the policy's own."""
    on2 = torch.ones_like(on1)
    A1, A2 = leave_one_out(G1, on1, args.group_size), leave_one_out(G2, on2, args.group_size)
    if args.norm_std != "none":
        n = torch.stack([on.view(-1, args.group_size).sum(1) for on in (on1, on2)])                          # (2, Q) rows
        centred = torch.stack([A1, A2]) * ((n - 1) / n.clamp(min=1))[..., None]                              # (2, Q, K) G - mean
        squares = centred.square().sum(2)
        if args.norm_std == "joint":
            n, squares = n.sum(0), squares.sum(0)
        std = (squares / (n - 1).clamp(min=1)).sqrt().expand(2, -1)[..., None] + 1e-6
        A1, A2 = A1 / std[0], A2 / std[1]
    return A1.flatten(), args.turn2_weight * A2.flatten()


def edit_distance(a, b):
    """Levenshtein distance. A column of the table is two whole numbers, the bits where it rises and falls (Hyyro 2003)."""
    places = {}
    for i, x in enumerate(a):
        places[x] = places.get(x, 0) | 1 << i
    every, rises, falls, distance = (1 << len(a)) - 1, (1 << len(a)) - 1, 0, len(a)
    for y in b:
        equal = places.get(y, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        right_rises, right_falls = (falls | ~(diagonal | rises)) & every, rises & diagonal
        distance += (right_rises >> len(a) - 1) - (right_falls >> len(a) - 1) if a else 1
        right_rises, right_falls = right_rises << 1 | 1, right_falls << 1
        rises, falls = (right_falls | ~(diagonal | right_rises)) & every, right_rises & diagonal & every
    return distance


def edit_ratio(first, second):
    """Edit distance over the lengths' sum: 0 if equal, 1 if one is empty."""
    return edit_distance(first, second) / max(len(first) + len(second), 1)                                           # S10


def turn_metrics(first, second):
    """What the two attempts (texts, answers, outcomes) at the same problems did, as shares of all of them."""
    (texts1, answers1, r1), (texts2, answers2, r2) = first, second
    share = lambda chosen: float(chosen.float().mean())
    return {"t1": share(r1), "t2": share(r2), "delta": share(r2) - share(r1), "i->c": share((r1 == 0) & (r2 == 1)),
            "c->i": share((r1 == 1) & (r2 == 0)), "changed": sum(a != b for a, b in zip(answers1, answers2)) / len(r1),
            "edit_ratio": sum(map(edit_ratio, texts1, texts2)) / len(r1),
            "unparsed": sum(answer is None for answer in answers1 + answers2) / 2 / len(r1)}


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


@torch.no_grad()
def rollout(policy, ref, problems, stage, tokenizer, args):
    """args.group_size episodes per problem, checked and scored: a dict of (B, T-1) tensors for the update, and a dict to log."""
    offline = stage == 2 and args.offline_fraction > 0
    first, own = offline_first(policy, ref, problems, args) if offline else (None, None)
    tokens, turn1_mask, turn2_mask = two_turns(policy, problems, args, group_size=args.group_size, first=first)
    problems = [p for p in problems for _ in range(args.group_size)]
    attempts = [grade(tokens, mask, problems, tokenizer, args) for mask in (turn1_mask, turn2_mask)]
    outcomes1, outcomes2 = [outcomes.to(tokens.device) for _, _, outcomes in attempts]
    own = torch.ones_like(outcomes1, dtype=torch.bool) if own is None else own
    log = {"truncated_1": truncated(tokens, turn1_mask, tokenizer.eos_id).float().mean(),
           "truncated_2": truncated(tokens, turn2_mask, tokenizer.eos_id).float().mean(),
           "length_1": turn1_mask.sum(1).float().mean(), "length_2": turn2_mask.sum(1).float().mean()}
    sampled_tokens = int(turn1_mask.sum() + turn2_mask.sum())

    turn1_mask = turn1_mask & own[:, None]                           # what another model wrote is context
    data = {"tokens": tokens, "response_mask": turn1_mask | turn2_mask}
    names = ("logprobs", "ref_logprobs", "kl", "entropy")
    scores = {name: torch.zeros(turn1_mask.shape, device=tokens.device) for name in names}
    for rows, micro in micro_batches(data, args.micro_batch_size):
        with autocast(tokens):
            (hidden, targets), (ref_hidden, _) = sampled(policy, micro), sampled(ref, micro)
            logprobs, entropy = linear_logprobs(hidden, policy.head_weight, targets)
            ref_logprobs, _ = linear_logprobs(ref_hidden, ref.head_weight, targets)
            kl = linear_kl(hidden, policy.head_weight, ref_hidden, ref.head_weight)      # exact, over the whole vocabulary
        for name, x in zip(names, (logprobs, ref_logprobs, kl, entropy)):
            scores[name][rows, :micro["response_mask"].shape[1]] = place(x.float(), micro["response_mask"])
    turn_sum = lambda x, mask: torch.where(mask, x, 0).sum(1)                            # (B,)
    kl_k1 = scores["logprobs"] - scores["ref_logprobs"]                                  # one-sample estimate of the KL
    G1, G2 = turn_returns(outcomes1, outcomes2, turn_sum(kl_k1, turn1_mask), turn_sum(kl_k1, turn2_mask), stage, args)
    A1, A2 = turn_advantages(G1, G2, own, args if stage == 2 else replace(args, turn2_weight=1.0))
    c1, c2 = kl_weights(stage, args)
    data["response_mask"] = turn1_mask if args.method == "single-turn" else data["response_mask"]
    data["advantages"] = torch.where(data["response_mask"], A1[:, None] * turn1_mask + A2[:, None] * turn2_mask, 0)
    data["kl_weight"] = torch.where(data["response_mask"], c1 * turn1_mask + c2 * turn2_mask, 0)
    metrics = turn_metrics(*attempts)
    log |= {"accuracy": outcomes2.mean(), "outcome": (outcomes1 + outcomes2).mean(),
            "truncated": (log["truncated_1"] + log["truncated_2"]) / 2,
            "no_signal": not data["advantages"].any(), "response_length": log["length_1"] + log["length_2"],
            "kl": scores["kl"].sum(1).mean(), "kl_k1": kl_k1.sum(1).mean(),              # sums over an episode
            "kl_1": turn_sum(scores["kl"], turn1_mask).mean(), "kl_2": turn_sum(scores["kl"], turn2_mask).mean(),
            "entropy": masked_mean(scores["entropy"], turn1_mask | turn2_mask)}
    return data, {"stage": stage} | metrics | {k: float(v) for k, v in log.items()} | {
        "tokens": sampled_tokens, "sample": attempts[0][0][0] + "\n---\n" + attempts[1][0][0]}


# ---- loss --------------------------------------------------------------------------------------------------------------------

def loss_fn(policy, ref, args, micro, minibatch):
    """A micro-batch's share of the minibatch's loss: REINFORCE, and the exact KL with its turn's weight. Both are sums over the
    tokens of an episode and means over the episodes of the minibatch."""
    mask, rows = micro["response_mask"], len(minibatch["tokens"])
    hidden, targets = sampled(policy, micro)
    logprobs = place(linear_logprobs(hidden, policy.head_weight, targets)[0], mask)
    loss = policy_loss = -(micro["advantages"] * logprobs).sum() / rows                                              # S2
    stats = {"policy_loss": policy_loss}
    if args.kl_mode == "loss":
        with torch.no_grad():
            ref_hidden, _ = sampled(ref, micro)
        kl = place(linear_kl(hidden, policy.head_weight, ref_hidden, ref.head_weight), mask)
        stats["kl_loss"] = (micro["kl_weight"] * kl).sum() / rows                                                    # S8
        loss = loss + stats["kl_loss"]
    return loss, stats


def reinforce(policy, ref, data, optimizer, args):
    """One step on a whole rollout. Returns the logged numbers."""
    return optimiser_step(functools.partial(loss_fn, policy, ref, args), data, optimizer, args)


# ---- baselines: supervised training on the model's own traces ----------------------------------------------------------------

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


@torch.no_grad()
def draw_traces(policy, batches, tokenizer, args):
    """Two-turn traces at temperature 1, [(problem, ids of y1, ids of y2, r1, r2)], and a dict to log."""
    traces, attempts, count = [], [([], [], []), ([], [], [])], 0
    for batch in tqdm(batches, "traces", disable=None, leave=False):
        tokens, *masks = two_turns(policy, batch, args, group_size=args.group_size)
        problems = [p for p in batch for _ in range(args.group_size)]
        for kept, mask in zip(attempts, masks):
            for all_of, these in zip(kept, grade(tokens, mask, problems, tokenizer, args)):
                all_of.extend(these)
        ids = [[row[1:][chosen].tolist() for row, chosen in zip(tokens, mask)] for mask in masks]
        traces += zip(problems, *ids, *[kept[2][-len(problems):] for kept in attempts])
        count += sum(map(len, sum(ids, [])))
    attempts = [(texts, answers, torch.stack(outcomes)) for texts, answers, outcomes in attempts]
    return traces, turn_metrics(*attempts) | {"tokens": count}


def trace_rows(traces, rng, args):
    """Rows x1 y1 p1 y2 with y2 trained. STaR keeps the traces from wrong to right; pair-SFT gives a wrong y1 any right response,
    of either turn, to the same question; with plus, right first attempts take part in the same way."""
    right, rows = {}, []
    for problem, y1, y2, r1, r2 in traces:
        right.setdefault(problem["question"], []).extend(y for y, r in ((y1, r1), (y2, r2)) if r == 1)
    for problem, y1, y2, r1, r2 in traces:
        if "pair" in args.method and right[problem["question"]]:
            y2, r2 = rng.choice(right[problem["question"]]), 1
        if r2 == 1 and (r1 == 0 or "plus" in args.method):
            context = problem["prompt"] + problem["given"] + y1 + problem["again"] + problem["given"]
            rows.append((context + y2, [False] * len(context) + [True] * len(y2)))
    return rows


def is_supervised(iteration, args):
    """Whether the method trains on traces in this iteration."""
    return args.method.startswith(("star", "pair")) and stage_of(iteration, args) == 2


def trace_update(policy, ref, train, optimizer, state, iteration, tokenizer, args):
    """An iteration of supervised training on traces. The iterations are split into rounds. The first of a round draws as many
    traces from the newest model as reinforcement learning would in all of it, and goes back to the base; in star-stage2 it goes
    on from where it is. The passes over them are spread over the round; of a few traces they end sooner. state["rows"] keeps the
    round's rows for a resumed run."""
    before = sum(stage_of(i, args) == 1 for i in range(1, iteration))
    rounds, length = 1 if "pair" in args.method else args.rounds, args.iterations - before
    starts = [before + 1 + length * i // rounds for i in range(rounds)] + [args.iterations + 1]
    start, end = max((a, b) for a, b in zip(starts, starts[1:]) if a <= iteration < b)
    log = {"tokens": 0}
    if iteration == start:
        batches = [[train[i] for i in draw(len(train), args.batch_size, j - 1, args.seed)] for j in range(start, end)]
        traces, log = draw_traces(policy, batches, tokenizer, args)
        state["rows"] = trace_rows(traces, random.Random(f"{args.seed} {iteration}"), args)
        if args.method != "star-stage2":
            policy.load_state_dict(ref.state_dict())
        optimizer.state.clear()
    log |= {"stage": stage_of(iteration, args), "kept": len(state["rows"])}
    total = math.ceil(args.sft_epochs * len(state["rows"]) / args.warmup_batch_size)
    steps = max(1, math.ceil(total / (end - start)))
    used = math.ceil(total / steps)                                  # iterations that train
    if iteration - start >= used:
        return log, {}
    schedule = replace(args, iterations=used, warmup_lr=args.lr)     # the learning rate is that of all methods
    return log, sft_update(policy, state["rows"], optimizer, iteration - start + 1, steps, schedule)


# ---- inference-time methods: voting ------------------------------------------------------------------------------------------

def vote(answers):
    """The answer given most often, floats equal within 1e-2, of equally many the first seen; None is not counted."""
    kinds = []                                                       # [answer, count]
    for answer in answers:
        if answer is not None:
            same = [kind for kind in kinds if kind[0] == answer or isinstance(answer, float) and abs(kind[0] - answer) <= 1e-2]
            if same:
                same[0][1] += 1
            else:
                kinds.append([answer, 1])
    return max(kinds, key=lambda kind: kind[1])[0] if kinds else None


@torch.no_grad()
def vote_curves(policy, problems, tokenizer, args):
    """Accuracy of a vote among 2k first attempts, and among k corrections of k first attempts, as many samples; k = 1, 2, 4 ...
    to args.vote_k, temperature 0.7."""
    torch.manual_seed(args.seed)
    ks = [2 ** i for i in range(args.vote_k.bit_length()) if 2 ** i <= args.vote_k]
    chosen = {name: [] for k in ks for name in (f"vote_{2 * k}_parallel", f"vote_{2 * k}_corrected")}
    for i in tqdm(range(0, len(problems), args.batch_size), "votes", disable=None, leave=False):
        batch = problems[i:i + args.batch_size]
        first = generate(policy, [p["prompt"] + p["given"] for p in batch], args.max_new_tokens, 0.7, 2 * args.vote_k)
        half = (torch.arange(len(first[0]), device=first[0].device) % (2 * args.vote_k)) < args.vote_k
        tokens, _, turn2_mask = two_turns(policy, batch, args, 0.7, first=(first[0][half], first[1][half]))
        found = {}
        for name, count, pair in (("parallel", 2 * args.vote_k, first), ("corrected", args.vote_k, (tokens, turn2_mask))):
            answers = grade(*pair, [p for p in batch for _ in range(count)], tokenizer, args)[1]
            found[name] = [answers[j:j + count] for j in range(0, len(answers), count)]
        for k in ks:
            chosen[f"vote_{2 * k}_parallel"] += [vote(answers[:2 * k]) for answers in found["parallel"]]
            chosen[f"vote_{2 * k}_corrected"] += [vote(answers[:k]) for answers in found["corrected"]]
    return {name: float(reward(answers, problems, args).mean()) for name, answers in chosen.items()}


# ---- evaluation, log, plot, resume -------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(policy, problems, tokenizer, args, author=None):
    """Greedy in both turns, on problems from the question alone; the last entry is a sample to look at. With an author the first
    attempts are its samples at temperature 1, the same ones each time for one seed and author."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt"]))       # like lengths together: less padding
    attempts, lengths, cut, size = [([], [], []), ([], [], [])], [0, 0], [0, 0], args.batch_size * args.group_size
    torch.manual_seed(args.seed)
    for i in tqdm(range(0, len(order), size), "evaluation", disable=None, leave=False):
        batch = [problems[j] for j in order[i:i + size]]
        first = generate(author, [p["prompt"] + p["given"] for p in batch], args.max_new_tokens) if author else None
        tokens, *masks = two_turns(policy, batch, args, temperature=0, first=first)
        for turn, mask in enumerate(masks):
            lengths[turn] += int(mask.sum())
            cut[turn] += int(truncated(tokens, mask, tokenizer.eos_id).sum())
            for kept, these in zip(attempts[turn], grade(tokens, mask, batch, tokenizer, args)):
                kept.extend(these)
    n = len(problems)
    attempts = [(texts, answers, torch.stack(outcomes)) for texts, answers, outcomes in attempts]
    metrics = turn_metrics(*attempts)
    ratios = [min(int(10 * edit_ratio(a, b)), 9) for a, b in zip(attempts[0][0], attempts[1][0])]
    given = lambda part, whole: part / whole if whole else 0.0       # conditional rates, for reading only
    return {"accuracy": metrics["t2"], "outcome": metrics["t1"] + metrics["t2"]} | metrics | {
        "right_if_wrong": given(metrics["i->c"], 1 - metrics["t1"]), "wrong_if_right": given(metrics["c->i"], metrics["t1"]),
        "truncated": sum(cut) / 2 / n, "truncated_1": cut[0] / n, "truncated_2": cut[1] / n, "response_length": sum(lengths) / n,
        "edit_histogram": [round(ratios.count(tenth) / n, 6) for tenth in range(10)],
        "sample": "\n---\n".join([batch[0]["question"], attempts[0][0][-len(batch)], attempts[1][0][-len(batch)]])}


def two_rates(m):
    """The numbers of an evaluation that tell what the second attempts did, as a text."""
    return (f"t1 {m['t1']:.3f}, t2 {m['t2']:.3f}, delta {m['delta']:+.3f} = i->c {m['i->c']:.3f} - c->i {m['c->i']:.3f}, changed "
            f"{m['changed']:.3f}, cut {m['truncated']:.3f}")


def fixed_and_own(policy, ref, problems, tokenizer, args):
    """Second attempts after first ones that the base wrote, one set for all methods, and after the policy's own; both sampled."""
    found = {name: evaluate(policy, problems, tokenizer, args, author) for name, author in (("fixed", ref), ("own", policy))}
    return {f"{name}_{key}": metrics[key] for name, metrics in found.items() for key in ("t1", "t2", "i->c", "c->i")}


def plot_turns(args, state):
    """turns.png: both attempts over training with the end of stage I, edit ratios before and after, and the votes."""
    log = [json.loads(line) for line in open(Path(args.out) / "log.jsonl")]
    log = [record for record in log if record["event"] == "iteration"]
    after = state.get("after", {})
    votes = sorted({int(name.split("_")[1]) for name in after if name.startswith("vote_")})
    figure = Figure(figsize=(5 * (2 + bool(votes)), 3.6), layout="constrained")
    axes = figure.add_subplot(1, 2 + bool(votes), 1, title=f"{args.method}: right answers", xlabel="iteration", ylim=(0, 1))
    for name, color in (("t1", "C0"), ("t2", "C1")):
        for key, style in ((name, "-"), (f"dev_{name}", ".--")):
            points = [(r["iteration"], r[key]) for r in log if key in r]
            if points:
                axes.plot(*zip(*points), style, color=color, label=key + ("" if key == name else ", greedy"))
    boundary = sum(stage_of(i, args) == 1 for i in range(1, args.iterations + 1))
    if boundary:
        axes.axvline(boundary + 0.5, color="gray", linestyle=":", label="stage II")
    axes.legend()
    axes = figure.add_subplot(1, 2 + bool(votes), 2, title="test problems", xlabel="edit ratio of the two attempts")
    for i, name in enumerate(("before", "after")):
        if name in state:
            axes.bar([0.1 * tenth + 0.03 + 0.04 * i for tenth in range(10)], state[name]["edit_histogram"], 0.04, label=name)
    axes.legend()
    if votes:
        axes = figure.add_subplot(1, 3, 3, title="test problems, majority vote", xlabel="samples")
        for kind in "parallel", "corrected":
            axes.plot(votes, [after[f"vote_{n}_{kind}"] for n in votes], ".-", label=kind)
        axes.set_xscale("log", base=2)
        axes.legend()
    figure.savefig(Path(args.out) / "turns.png", dpi=100)


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


def check_turns(args):
    """InputError for flags that do not go together; methods without training have no iterations."""
    args.iterations = 0 if args.method in ("base", "self-refine") else args.iterations
    if args.group_size < 2:
        raise InputError(f"--group-size {args.group_size}: must be at least 2, episodes of a question are compared")
    for name in ("stage1", "offline_fraction", "slips"):
        if getattr(args, name) > 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: is a share, at most 1")
    if args.task == "code" and not args.model:
        raise InputError("--task code needs --model: the small vocabulary made here knows the built-in problems only")
    if args.minibatch_size < args.batch_size * args.group_size:
        raise InputError(f"--minibatch-size {args.minibatch_size}: must hold all of a rollout, --batch-size times --group-size "
                         f"{args.batch_size * args.group_size} rows, which is used once")
    if args.turn2_weight != 1 and args.kl_mode == "reward":
        raise InputError("--turn2-weight would weigh the KL too where it is part of the reward: --kl-mode loss")
    if args.method == "single-turn" and (args.offline_fraction or args.gamma):
        raise InputError("--method single-turn trains its own first attempts on r1 alone: no --offline-fraction, no --gamma")
    if args.cot == "program" and (args.task == "code" or not args.train_data):
        raise InputError("--cot program is for problems with an answer, from --train-data")


def main(args):
    check_turns(args)
    policy, tokenizer, *splits = prepare_code(args) if args.task == "code" else prepare(args)
    train, dev, test = [add_turns(split, tokenizer, policy.config.max_len, args) for split in splits]
    state, saved = open_run(args)
    out, rows = Path(args.out), warmup_rows(train, tokenizer, args)

    print_ids("first prompt", train[0]["prompt"] + train[0]["given"], tokenizer)
    print_ids("its demonstration", train[0]["response"], tokenizer)
    print_ids("second turn's prompt", train[0]["again"], tokenizer)

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
    print(f"warm-up: {two_rates(state['before'])} on {len(test)} test problems")
    print(f"  two attempts: {state['before']['sample']!r}")

    # the warm-up model is the base: the initial policy and, in both stages, the frozen reference
    ref = copy.deepcopy(policy).requires_grad_(False)
    chosen_by = "t1" if args.method == "single-turn" else "outcome"
    modules, optimizer = {"policy": policy}, adamw([policy], args.lr)
    if saved:
        restore(saved, modules, optimizer)
    else:
        save_checkpoint(out / "model", policy, tokenizer)
        greedy = evaluate(policy, dev, tokenizer, args)
        state["best"] = {"iteration": 0, "accuracy": greedy["accuracy"], chosen_by: greedy[chosen_by]}
        save_run(args, state, modules, optimizer)

    for iteration in range(state["step"] + 1, args.iterations + 1):
        began, stage = time.time(), stage_of(iteration, args)
        torch.manual_seed(1_000_003 * args.seed + iteration)         # so a resumed run needs no random state
        with located(f"iteration {iteration}", args):
            if is_supervised(iteration, args):
                log, stats = trace_update(policy, ref, train, optimizer, state, iteration, tokenizer, args)
            else:
                batch = [train[i] for i in draw(len(train), args.batch_size, iteration - 1, args.seed)]
                data, log = rollout(policy, ref, batch, stage, tokenizer, args)
                stats = reinforce(policy, ref, data, optimizer, args)
                if iteration == 1:
                    print_ids("first sample", data["tokens"][0, 1:][data["response_mask"][0]].tolist(), tokenizer)
        record = {"event": "iteration", "iteration": iteration} | log | stats
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            greedy = evaluate(policy, dev, tokenizer, args)
            record |= {f"dev_{k}": v for k, v in greedy.items() if k != "edit_histogram"}
            tqdm.write(f"stage {stage}, dev: {two_rates(greedy)}")
            if greedy[chosen_by] > state["best"][chosen_by]:
                save_checkpoint(out / "model", policy, tokenizer)
                state["best"] = {"iteration": iteration, "accuracy": greedy["accuracy"], chosen_by: greedy[chosen_by]}
        finish_iteration(record, state, began, args)
        if iteration % args.save_every == 0 or iteration == args.iterations or STOP:
            save_run(args, state, modules, optimizer)
            leave_if_stopped(args)

    # the checkpoint that was best on the dev split, tested once; and the last one
    if state["phase"] == "train":
        best, last = load_checkpoint(out / "model")[0].to(args.device), evaluate(policy, test, tokenizer, args)
        state["after"] = evaluate(best, test, tokenizer, args)
        state["after"] |= {f"last_{name}": last[name] for name in ("t1", "t2", "delta", "i->c", "c->i")}
        state["after"] |= fixed_and_own(best, ref, test, tokenizer, args)
        if args.vote_k:
            state["after"] |= vote_curves(best, test, tokenizer, args)
        write_log(args, state, {"event": "end", "best_iteration": state["best"]["iteration"]} | state["after"])
        write_summary(args, state, len(test))
        plot_turns(args, state)
        state["phase"] = "done"
        save_run(args, state, modules, optimizer)
    print("  " + ", ".join(f"{k} {v:.3f}" for k, v in state["after"].items() if k.startswith(("last", "fixed", "own", "vote"))))
    print(f"{args.method}: t2 {state['before']['t2']:.3f} -> {state['after']['t2']:.3f} (iteration {state['best']['iteration']}) "
          f"{two_rates(state['after'])} on {len(test)} test problems; {out}")


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
