"""PRL: Process Reward Learning Improves LLMs' Reasoning Ability and Broadens the Reasoning Boundary
Jiarui Yao, Ruida Wang, Tong Zhang; arXiv 2601.10201v1. Version 2, with Hao Bai: Future-KL Regularized GRPO (FRPO).

Maximise E[r] - KL(pi || pi_ref) / eta, r = 1 for a right answer. The outcomes of a group of responses to one question are
compared as in GRPO, and each token pays the log-ratio to the reference, summed from its step to the end, over eta. So the one
reward at the end becomes a signal for every step, without a reward model, a critic or a search.

    what         formula                                                                          number  function
    SFT          L = -mean_t log pi(a_t | s_t)                                                    Eq. 1   sft_loss()
    outcome      r = 1 for the right answer, 0 for anything else                                  F2      reward()
    suffix       S_t = sum_j>=t log(pi_old / pi_ref)(a_j | s_j)                                   F3      suffix()
    step         a run of tokens, ended by a line break, or of a fixed length, or a single token  F4      step_id()
    advantage    A_t = A_i - S_k / eta,   k the first token of t's step, nothing differentiated   F5      token_advantages()
    group        A_i = (r_i - mean of the group) / (its standard deviation + 1e-6)                F6      group_advantages()
    policy loss  max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),   ratio = pi / pi_old           F7      loss_fn()
    dual clip    where A < 0: at most -c A,   c = 3                                               F8      loss_fn()
    KL loss      exp(-d) - 1 + d,   d = log(pi / pi_ref)(a_t | s_t);   --method grpo-kl-loss      F9      loss_fn()
    pass@k       1 - C(n - c, k) / C(n, k),   c right ones among n samples                        F10     pass_at_k()

Eq. 1 is ReFT's, F2 to F10 are ours. With k the first token of the step (--anchor start), or any that is fixed by what came before
t, F5 has the exact gradient of the objective: log-ratios before t are constants of the state, a baseline. The authors' code
(github.com/MaxwellJryao/Process-Reward-Learning at 1ee49fa) takes the last one (--anchor end), which drops the token's own
log-ratio, and knows a line break by one token id; here it is found in the decoded text of each token. F6 and F8 are that code's.
In units of r the KL of a question weighs its standard deviation over eta; a group of equal outcomes has A_i = 0 and is only
pulled towards the reference.

The weight of a token by --method: prl F5; frpo F5 with steps of one token, as in version 2; grpo A_i; grpo-kl-loss A_i,
with F9 added to the loss; grpo-kl-reward F6 of r_i - S_0 / eta; raft r_i; prm r_i - S_t / eta. base is not trained.

    python prl.py                                                 built-in problems, a small GPT from nothing, a few CPU minutes
    python prl.py --method grpo                                   a baseline: the same without the KL (all are listed at --method)
    python prl.py --method frpo --model runs/prl-prl-s0/warmup --warmup-epochs 0
                                                                  version 2, from the same warm-up
    python prl.py --model FOLDER --train-data train.jsonl --eval-data test.jsonl
                                                                  a pretrained checkpoint on GSM8K's files or ReFT's
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

METHODS = ("prl", "frpo", "grpo", "grpo-kl-loss", "grpo-kl-reward", "raft", "prm", "base")
CHOICES = {"method": METHODS, "problems": ("numeric", "choice"), "cot": ("text", "program"),
           "steps": ("newline", "length", "token"), "anchor": ("start", "end"), "agg": ("token", "const"),
           "device": ("cpu", "cuda")}


@dataclass
class Args:
    # run
    method: str = "prl"              # prl | frpo, grpo, grpo-kl-loss, grpo-kl-reward, raft, prm, base: see above
    model: str = ""                  # folder of a pretrained checkpoint; empty: a small GPT from nothing
    train_data: str = ""             # GSM8K's JSON lines or ReFT's JSON list; empty: the built-in problems
    eval_data: str = ""              # test set in the same form; needed with --train-data
    problems: str = "numeric"        # built-in problems: numeric | choice (five options, the answer is a letter)
    cot: str = "text"                # rationales are text (N-CoT) | program (P-CoT: Python, run in a sandbox)
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
    operations_high: int = 6         # most; also of a training problem
    operations_hard: int = 8         # most of a hard test problem, which has more than any question of the RL
    # warm-up, which the paper has none of, on a linear schedule with 10 % warm-up steps as ReFT's
    warmup_epochs: int = 3           # passes over the demonstrations, an eighth more of hard ones; 0: none (needs --model)
    warmup_batch_size: int = 16      # demonstrations an optimiser step; ReFT: 48
    warmup_lr: float = 2e-3          # peak; ReFT: 1e-5 for a pretrained 7B model
    # reinforcement learning
    iterations: int = 40             # rollouts, each with its update; authors' code: at least 500
    batch_size: int = 32             # questions an iteration; authors' code: 128
    group_size: int = 8              # G, responses to each of them; authors' code: 5
    minibatch_size: int = 256        # rows an optimiser step; authors' code: the whole batch (version 2: a quarter)
    micro_batch_size: int = 64       # rows a forward pass: changes memory and speed, never the result
    ppo_epochs: int = 1              # passes over a rollout; authors' code: 1, so the ratio is 1 and nothing is clipped
    max_new_tokens: int = 60         # longest response; authors' code: 3072
    lr: float = 3e-4                 # constant; authors' code: 1e-6 for pretrained 1B to 7B models
    eta: float = 10.0                # 1 / eta weighs the KL; authors' code: 1 to 200, for far longer responses
    steps: str = "newline"           # a step ends at a line break: newline | after --step-len tokens: length | at once: token
    step_len: int = 4                # tokens; paper: 16 to 256, of responses 30 times as long
    anchor: str = "start"            # S is taken at the start of the step (exact gradient) | at its end (authors' code)
    agg: str = "token"               # loss: mean over the optimiser step's tokens: token | sum / (rows * max_new_tokens): const
    clip_eps: float = 0.2            # ratio clip; authors' code: 0.2
    dual_clip: float = 3.0           # c; authors' code: 3.0
    kl_coef: float = 0.1             # of F9, --method grpo-kl-loss; version 2: 0.01
    grad_clip: float = 1.0           # norm of the gradient; authors' code: 1.0
    # reports
    samples: int = 8                 # n of avg@n and pass@k, drawn per test problem, T = 1; authors' code: 8
    strict: bool = False             # read answers as ReFT's authors do: a bare float() of all that follows "the answer is:"
    strip_annotations: bool = False  # remove GSM8K's <<48/2=24>> from the demonstrations
    eval_every: int = 5              # iterations between evaluations by a sample per dev problem, which choose the checkpoint
    eval_size: int = 300             # at most so many dev, test and hard test problems
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
    """Outcome of each response (B,): 1 for the right answer, 0 for anything else."""
    def outcome(answer, gold):
        if isinstance(gold, str) or answer is None:
            return float(answer == gold)
        return float(abs(answer - gold) <= 1e-2)                                                                     # F2
    return torch.tensor([outcome(answer, problem["gold"]) for answer, problem in zip(answers, problems)])


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


# ---- PRL: process rewards, and pass@k ----------------------------------------------------------------------------------------

@functools.lru_cache(1)
def newline_tokens(tokenizer, vocab_size):
    """(V,) whether the text of each token holds a line break, at its end or anywhere in it."""
    return torch.tensor([b"\n" in tokenizer.token_bytes(token) for token in range(vocab_size)])


def step_id(tokens, response_mask, newline, args):
    """The number (B, T-1) of the step to which each sampled token belongs. A line break ends the step that it is part of: if it
    opened one, that step's first token, where S is taken, would depend on the action, and the gradient would be biased."""
    if args.steps == "newline":
        ends = newline[tokens[:, 1:]] & response_mask
        return ends.cumsum(1) - ends.long()                                                                          # F4
    position = response_mask.cumsum(1) - 1                            # counted in the response, not in the row
    return position // (args.step_len if args.steps == "length" else 1)


def anchor_index(step, response_mask, anchor):
    """The column (B, T-1) of the first token of each token's step; of the last one for the anchor end."""
    if anchor == "end":                                               # the same, seen from the right
        return step.shape[1] - 1 - anchor_index(step.flip(1), response_mask.flip(1), "start").flip(1)
    first = response_mask.clone()
    first[:, 1:] &= ~response_mask[:, :-1] | (step[:, 1:] != step[:, :-1])
    return torch.where(first, torch.arange(step.shape[1], device=step.device), 0).cummax(1).values


def suffix(ref_log_ratio, response_mask):
    """S (B, T-1): the sum of a response's log-ratios from each token, itself included, to the end."""
    inside = torch.where(response_mask, ref_log_ratio, 0)             # before the sum: the prompt and the padding hold anything
    return inside.flip(1).cumsum(1).flip(1)                                                                          # F3


def group_advantages(outcomes, group_size):
    """A_i (B,): outcomes standardised within each group of adjacent rows; a group of one is left as it is."""
    groups = outcomes.view(-1, group_size)
    if group_size > 1:
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)                      # F6
    return groups.flatten()


def token_advantages(outcomes, ref_log_ratio, tokens, response_mask, newline, args):
    """Advantages (B, T-1) of the method; the process term S / eta at each token's anchor, and its step, for the log as well."""
    steps = step_id(tokens, response_mask, newline, args)
    total = suffix(ref_log_ratio, response_mask)
    process = torch.where(response_mask, total.gather(1, anchor_index(steps, response_mask, args.anchor)) / args.eta, 0)
    # the KL in the reward: standardised along with it, so its weight changes from group to group
    scores = outcomes - total[:, 0] / args.eta if args.method == "grpo-kl-reward" else outcomes
    weights = outcomes if args.method in ("raft", "prm") else group_advantages(scores, args.group_size)
    advantages = torch.where(response_mask, weights[:, None], 0)
    return advantages - process if args.method in ("prl", "frpo", "prm") else advantages, process, steps             # F5


def pass_at_k(n, c, k):
    """The chance that k of n samples, drawn without replacement, hold at least one of the c right ones."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)                                                                 # F10


def bootstrap(values):
    """Mean over problems and its 95 % interval: 1,000 resamples of the problems, the same ones for each run and metric."""
    values = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(values), (1000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.mean().item(), [round(low, 6), round(high, 6)]


def report(policy, tests, tokenizer, args):
    """What evaluate() finds on each test set {prefix: problems}, and avg@n and pass@k, k = 1, 2, 4 .. n, with their intervals;
    "right" holds the number of right samples of each problem, for paired comparisons of runs."""
    found, n = {}, args.samples
    for prefix, problems in tests.items():
        samples = draw_samples(policy, problems, tokenizer, n, args)
        right = [int(reward([answer for _, _, answer in drawn], [problem] * n, args).sum())
                 for drawn, problem in zip(samples, problems)]
        metrics = {f"avg@{n}": [c / n for c in right]}
        metrics |= {f"pass@{k}": [pass_at_k(n, c, k) for c in right] for k in sorted({2**i for i in range(n.bit_length())} | {n})}
        part = evaluate(policy, problems, tokenizer, args)
        for name, values in metrics.items():
            part[name], part[f"{name}_95%"] = bootstrap(values)
        found |= {prefix + name: value for name, value in part.items()} | {prefix + "right": " ".join(map(str, right))}
    return found


def plot_pass(args, state):
    """passk.png: pass@k against k on each test set, before and after, with the intervals."""
    prefixes = [name[:-len("right")] for name in state["after"] if name.endswith("right")]
    figure = Figure(figsize=(5 * len(prefixes), 3.6), layout="constrained")
    for i, prefix in enumerate(prefixes):
        title = f"{prefix.replace('_', ' ')}test problems"
        axes = figure.add_subplot(1, len(prefixes), i + 1, title=title, xlabel="k", ylabel="pass@k")
        for moment in "before", "after":
            found = {int(name.rpartition("@")[2]): name for name in state[moment] if re.fullmatch(rf"{prefix}pass@\d+", name)}
            axes.plot(list(found), [state[moment][name] for name in found.values()], marker=".", label=moment)
            axes.fill_between(list(found), *zip(*[state[moment][f"{name}_95%"] for name in found.values()]), alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.legend()
    figure.savefig(Path(args.out) / "passk.png", dpi=100)


def settle(args):
    """Flags that follow from the method; InputError for values that cannot be used."""
    args.steps = "token" if args.method in ("frpo", "prm") else args.steps
    args.iterations = 0 if args.method == "base" else args.iterations
    if not args.eta:
        raise InputError("--eta 0.0: must be above 0; without any KL it is --method grpo")
    if args.dual_clip <= 1:
        raise InputError(f"--dual-clip {args.dual_clip}: must be above 1")
    if args.operations_hard <= args.operations_high:
        raise InputError("--operations-hard must be above --operations-high")


def hard_problems(max_len, tokenizer, args):
    """A second test set with more operations than any question of the reinforcement learning, and demonstrations of other such
    problems for the warm-up: a small GPT has no idea of lengths that it never saw. Neither for data from files."""
    if args.train_data:
        return [], []
    low, high = args.operations_high + 1, args.operations_hard
    test = builtin_records(args.eval_size, low, high, 4, args)
    shown = builtin_records(args.train_size // 8, low, high, 5, args, without=test)
    test, shown = ([encode_record(parse_record(r, "built-in", args), tokenizer, args) for r in part] for part in (test, shown))
    longest = max(len(p["prompt"]) + max(len(p["response"]), len(p["given"]) + args.max_new_tokens) for p in test + shown)
    if longest > max_len:
        raise InputError(f"--operations-hard {high}: {longest} tokens with the response, the model's context holds {max_len}")
    return test, shown


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
def rollout(policy, ref, problems, tokenizer, args):
    """A group of sampled responses per problem, checked and scored: (B, T-1) tensors for the update, and a dict to log."""
    prompts = [p["prompt"] + p["given"] for p in problems]
    tokens, response_mask = generate(policy, prompts, args.max_new_tokens, group_size=args.group_size)
    problems = [p for p in problems for _ in range(args.group_size)]
    texts = responses(tokens, response_mask, problems, tokenizer)
    answers = read_answers(texts, problems, args)
    outcomes = reward(answers, problems, args).to(tokens.device)
    data = {"tokens": tokens, "response_mask": response_mask}
    names = ("old_logprobs", "ref_logprobs", "kl", "entropy")
    scores = {name: torch.zeros(response_mask.shape, device=tokens.device) for name in names}
    for rows, micro in micro_batches(data, args.micro_batch_size):
        with autocast(tokens):
            (hidden, targets), (ref_hidden, _) = sampled(policy, micro), sampled(ref, micro)
            logprobs, entropy = linear_logprobs(hidden, policy.head_weight, targets)
            ref_logprobs, _ = linear_logprobs(ref_hidden, ref.head_weight, targets)
            kl = linear_kl(hidden, policy.head_weight, ref_hidden, ref.head_weight)      # exact, over the whole vocabulary
        for name, x in zip(names, (logprobs, ref_logprobs, kl, entropy)):
            scores[name][rows, :micro["response_mask"].shape[1]] = place(x.float(), micro["response_mask"])
    ref_log_ratio = scores["old_logprobs"] - scores["ref_logprobs"]
    newline = newline_tokens(tokenizer, policy.config.vocab_size).to(tokens.device)
    advantages, process, steps = token_advantages(outcomes, ref_log_ratio, tokens, response_mask, newline, args)
    data |= {"old_logprobs": scores["old_logprobs"], "ref_logprobs": scores["ref_logprobs"], "advantages": advantages}
    # what F6 compares: the answers to one question; without it, all of the batch
    groups = outcomes.view(-1, len(outcomes) if args.method in ("raft", "prm") or args.group_size == 1 else args.group_size)
    log = {"accuracy": (outcomes == 1).float().mean(), "outcome": outcomes.mean(),
           "shaped_reward": (outcomes - ref_log_ratio.sum(1) / args.eta).mean(),         # a sample of the objective
           "unparsed": sum(answer is None for answer in answers) / len(answers),
           "truncated": truncated(tokens, response_mask, tokenizer.eos_id).float().mean(),
           "no_signal": (groups.amin(1) == groups.amax(1)).float().mean(),                # share without a difference
           "response_length": response_mask.sum(1).float().mean(),
           "steps": (torch.where(response_mask, steps, 0).amax(1) + 1).float().mean(),
           "process_mean": masked_mean(process.abs(), response_mask), "process_max": process.abs().max(),
           "kl": scores["kl"].sum(1).mean(), "kl_k1": ref_log_ratio.sum(1).mean(),       # sums over a response
           "kl_k3": ((-ref_log_ratio).exp() - 1 + ref_log_ratio).sum(1).mean(),
           "entropy": masked_mean(scores["entropy"], response_mask)}
    return data, {k: float(v) for k, v in log.items()} | {"tokens": int(response_mask.sum()), "sample": texts[0]}


# ---- loss --------------------------------------------------------------------------------------------------------------------

def loss_fn(policy, args, micro, minibatch):
    """A micro-batch's share of the minibatch's loss: clipped policy loss, and the KL loss of grpo-kl-loss. Each is a sum over
    tokens over the number of tokens in the whole minibatch, or over a constant: then a token weighs the same in every update."""
    mask, advantages = micro["response_mask"], micro["advantages"]
    count = minibatch["response_mask"].sum() if args.agg == "token" else len(minibatch["tokens"]) * args.max_new_tokens
    hidden, targets = sampled(policy, micro)
    logprobs = place(linear_logprobs(hidden, policy.head_weight, targets)[0], mask)

    ratio = torch.where(mask, logprobs - micro["old_logprobs"], 0).clamp(-20, 20).exp()
    clipped_ratio = ratio.clamp(1 - args.clip_eps, 1 + args.clip_eps)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)                                         # F7
    losses = torch.where(advantages < 0, torch.minimum(losses, -args.dual_clip * advantages), losses)                # F8
    loss = policy_loss = losses.sum() / count
    stats = {"policy_loss": policy_loss,
             "clip_frac": torch.where(mask, ratio != clipped_ratio, False).sum() / minibatch["response_mask"].sum()}
    if args.method == "grpo-kl-loss":
        d = torch.where(mask, logprobs - micro["ref_logprobs"], 0).clamp(-20, 20)
        stats["kl_loss"] = args.kl_coef * ((-d).exp() - 1 + d).sum() / count                                         # F9
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


# ---- evaluation, log, plot, resume -------------------------------------------------------------------------------------------

@torch.no_grad()
def draw_samples(policy, problems, tokenizer, count, args):
    """`count` samples (ids, text, answer) of each problem at temperature 1, the same ones each time for one seed and policy."""
    torch.manual_seed(args.seed)
    samples = []
    for i in tqdm(range(0, len(problems), args.batch_size), "samples", disable=None, leave=False):
        batch = problems[i:i + args.batch_size]
        tokens, mask = generate(policy, [p["prompt"] + p["given"] for p in batch], args.max_new_tokens, group_size=count)
        repeated = [p for p in batch for _ in range(count)]
        texts = responses(tokens, mask, repeated, tokenizer)
        ids = [p["given"] + row[chosen].tolist() for p, row, chosen in zip(repeated, tokens[:, 1:].cpu(), mask.cpu())]
        drawn = list(zip(ids, texts, read_answers(texts, repeated, args)))
        samples += [drawn[j:j + count] for j in range(0, len(drawn), count)]
    return samples


def contradicts(text, problem):
    """Multiple choice: whether the last number that the rationale arrives at is not the right option's. A wrong chain with the
    right letter earns the full reward."""
    option = re.search(rf"\b{problem['gold']} \) (\S+)", problem["question"]) if isinstance(problem["gold"], str) else None
    reached = re.findall(r"= (\S+)", text)
    return bool(option and reached and parse_number(reached[-1]) != parse_number(option[1]))


@torch.no_grad()
def evaluate(policy, problems, tokenizer, args, temperature=0):
    """Accuracy on problems, greedy or of one sample each, and what goes with it; the last entry is a sample to look at."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt"]))       # like lengths together: less padding
    right = unparsed = cut = length = contradictions = 0
    size = args.batch_size * args.group_size
    for i in tqdm(range(0, len(order), size), "evaluation", disable=None, leave=False):
        batch = [problems[j] for j in order[i:i + size]]
        tokens, response_mask = generate(policy, [p["prompt"] + p["given"] for p in batch], args.max_new_tokens, temperature)
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
    settle(args)
    policy, tokenizer, train, dev, test = prepare(args)
    hard, shown = hard_problems(policy.config.max_len, tokenizer, args)
    tests = {"": test} | ({"hard_": hard} if hard else {})
    state, saved = open_run(args)
    out, rows = Path(args.out), [sft_row(problem) for problem in train + shown]

    print_ids("first prompt", train[0]["prompt"] + train[0]["given"], tokenizer)
    print_ids("its demonstration", train[0]["response"], tokenizer)

    # warm-up
    if state["phase"] == "warmup":
        modules, optimizer = {"policy": policy}, adamw([policy], args.warmup_lr)
        if saved:
            restore(saved, modules, optimizer)
        warmup(policy, rows, optimizer, state, lambda: save_run(args, state, modules, optimizer), args)
        save_checkpoint(out / "warmup", policy, tokenizer)
        state["before"] = report(policy, tests, tokenizer, args)
        write_log(args, state, {"event": "warmup", "steps": state["step"], "loss": state.get("loss")} | state["before"])
        state, saved = state | {"phase": "train", "warmup_steps": state["step"], "step": 0}, {}
    else:
        policy = load_checkpoint(out / "warmup")[0].to(args.device)
    print(f"warm-up: accuracy {state['before']['accuracy']:.3f} on {len(test)} test problems")
    print(f"  a response: {state['before']['sample']!r}")

    # the warm-up model is the initial policy and the frozen reference
    ref = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(args.seed)
    modules, optimizer = {"policy": policy}, adamw([policy], args.lr)
    if saved:
        restore(saved, modules, optimizer)
    else:
        save_checkpoint(out / "model", policy, tokenizer)
        state["best"] = {"iteration": 0, "accuracy": evaluate(policy, dev, tokenizer, args, temperature=1)["accuracy"]}
        save_run(args, state, modules, optimizer)
    loss_of = functools.partial(loss_fn, policy, args)

    for iteration in range(state["step"] + 1, args.iterations + 1):
        began = time.time()
        torch.manual_seed(1_000_003 * args.seed + iteration)         # so a resumed run needs no random state
        with located(f"iteration {iteration}", args):
            batch = [train[i] for i in draw(len(train), args.batch_size, iteration - 1, args.seed)]
            data, log = rollout(policy, ref, batch, tokenizer, args)
            stats = update(loss_of, data, optimizer, args)
            if iteration == 1:
                print_ids("first sample", data["tokens"][0, 1:][data["response_mask"][0]].tolist(), tokenizer)
        record = {"event": "iteration", "iteration": iteration} | log | stats
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            drawn = evaluate(policy, dev, tokenizer, args, temperature=1)
            record |= {"dev_accuracy": drawn["accuracy"], "dev_sample": drawn["sample"]}
            if drawn["accuracy"] > state["best"]["accuracy"]:
                save_checkpoint(out / "model", policy, tokenizer)
                state["best"] = {"iteration": iteration, "accuracy": drawn["accuracy"]}
        finish_iteration(record, state, began, args)
        if iteration % args.save_every == 0 or iteration == args.iterations or STOP:
            save_run(args, state, modules, optimizer)
            leave_if_stopped(args)

    # the checkpoint that was best on the dev split, tested once
    if state["phase"] == "train":
        best = load_checkpoint(out / "model")[0].to(args.device)
        state["after"] = report(best, tests, tokenizer, args)
        write_log(args, state, {"event": "end", "best_iteration": state["best"]["iteration"]} | state["after"])
        write_summary(args, state, len(test))
        plot_pass(args, state)
        state["phase"] = "done"
        save_run(args, state, modules, optimizer)
    names = [name for name in state["after"] if re.fullmatch(f"hard_accuracy|(hard_)?(avg|pass)@{args.samples}", name)]
    extra = "".join(f", {name} {state['before'][name]:.3f} -> {state['after'][name]:.3f}" for name in names)
    print(f"{args.method}: accuracy {state['before']['accuracy']:.3f} -> {state['after']['accuracy']:.3f}{extra} on {len(test)} "
          f"test problems (sampled dev {state['best']['accuracy']:.3f} at iteration {state['best']['iteration']}); {out}")


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
