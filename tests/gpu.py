"""All that needs a GPU, in one command: whether it is right there, and how fast. On a CPU the same at toy sizes.

    python tests/gpu.py [--minutes 8] [--out results/gpu] [--model FOLDER --train-data FILE --eval-data FILE] [--only SECTION,...]

    correctness   the tests of the kernels and all that are marked `cuda`, by pytest, a process for each file
    defaults      the default runs of the four scripts side by side: each must end within 3 points of what a CPU gives
    kernels       the tables of kernels/ beside torch and other libraries; whole in OUT/kernels.json
    decode        the parts of a decoding step, products too: microseconds, and share of the time that their bytes take
    generate      100 + 256 tokens, random weights in the shapes of real models, beside transformers and the byte floor
    iteration     one iteration of ppo_reft.py and prl.py: seconds and MFU by phase, peak memory; beside TRL's GRPO trainer
    train         with --model: ppo_reft.py on that checkpoint and that data, until the time is over

A section is a process of its own. It gets the time that is left in proportion to its weight, so what one leaves over goes to
those after it. One that fails or takes longer is reported with its reason, and the next goes on; the exit status is 1 then. Its
output is in OUT/SECTION.log. After each section OUT/gpu.json has all results so far, those of earlier calls with other sections
too. With trl, transformers and liger-kernel installed the tables have them for comparison.
"""
import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig, Tokenizer, generate, rope_table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WEIGHTS = {"correctness": 2, "defaults": 4, "kernels": 3, "decode": 1, "generate": 2, "iteration": 2,
           "train": 4}                                               # most valuable first
SHAPES = {"SmolLM2-135M": dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536),
          "Qwen2.5-0.5B": dict(vocab_size=151936, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864, qkv_bias=True),
          "Qwen2.5-1.5B": dict(vocab_size=151936, n_layer=28, n_head=12, n_kv_head=2, n_embd=1536, n_inner=8960, qkv_bias=True)}
BATCHES, GROUP, PROMPT, NEW, ROWS, MICRO = (64, 256, 1024), 8, 100, 256, 256, 32     # ROWS: of an iteration, MICRO: of a pass
RUN_FLAGS, KERNEL_TESTS = [], ["-n", "6"] if importlib.util.find_spec("xdist") else []
TRAIN_FLAGS = ("--warmup-epochs 3 --warmup-batch-size 32 --warmup-lr 2e-4 --micro-batch-size 128 --batch-size 256 "
               "--minibatch-size 256 --lr 5e-6 --kl-coef 0.02 --vf-coef 1 --max-new-tokens 128 --eval-every 10 --eval-size 300 "
               "--iterations 100000").split()
if not CUDA:
    SHAPES = {"toy Llama": dict(vocab_size=512, n_layer=2, n_head=4, n_kv_head=2, n_embd=64),
              "toy Qwen": dict(vocab_size=512, n_layer=2, n_head=4, n_kv_head=1, n_embd=64, qkv_bias=True)}
    BATCHES, GROUP, PROMPT, NEW, ROWS, MICRO = (16,), 4, 12, 16, 16, 8
    RUN_FLAGS = ("--device cpu --train-size 64 --warmup-epochs 2 --iterations 3 --batch-size 8 --minibatch-size 32 "
                 "--max-new-tokens 12 --eval-size 8 --n-layer 1 --n-embd 16 --n-head 2").split()
    KERNEL_TESTS = ["-k", "test_references"]
    TRAIN_FLAGS += "--device cpu --warmup-epochs 1 --batch-size 8 --minibatch-size 8 --max-new-tokens 16 --eval-size 8".split()


# ---- what the sections share -------------------------------------------------------------------------------------------------

FAILED = []                                                          # what failed in the section of this process
LATE = [float("inf")]                                                # when it has no time left for other packages


def tell(name, **numbers):
    """A result: a line in the section's log that main() reads into gpu.json and the last table."""
    print("ROW", json.dumps({"name": name} | numbers), flush=True)


def fail(name, reason):
    FAILED.append(name)
    tell(name, failed=reason)


def attempt(name, measure, *args, package=None):
    """tell(name, **measure(*args)). What goes wrong is told as well; it fails the section unless it is another package's fault."""
    if package and not importlib.util.find_spec(package):
        return tell(name, left_out=f"{package} is not installed")
    if package and time.time() > LATE[0]:
        return tell(name, left_out="no time left")
    try:
        tell(name, **measure(*args))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        tell(name, left_out=reason) if package else fail(name, reason)


def stream(name, *command, seconds=threading.TIMEOUT_MAX):
    """Runs a command with its output, as it comes, in the log under a name; after so many seconds it is asked to end. Returns
    exit status and last line."""
    process, last = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), ""
    timer = threading.Timer(seconds, process.terminate)
    timer.start()
    for line in process.stdout:
        print(f"{name}: {line}", end="", flush=True)
        last = line.strip() or last
    timer.cancel()
    return process.wait(), last


def seconds_of(call):
    """Wall time of a call, with all that it started on the GPU."""
    torch.cuda.synchronize() if CUDA else None
    start = time.perf_counter()
    call()
    torch.cuda.synchronize() if CUDA else None
    return time.perf_counter() - start


def peak_GiB():
    """Most GPU memory allocated since the last call of this function."""
    if not CUDA:
        return {}
    peak = torch.cuda.max_memory_allocated() / 2 ** 30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {"peak_GiB": peak}


def ceilings():
    """Bytes a second of a copy, read and written, and FLOP a second of a product, measured here and now: in bfloat16, on a CPU in
    float32, in which the scripts compute there."""
    size, side, dtype = (2 ** 31, 8192, torch.bfloat16) if CUDA else (2 ** 25, 512, torch.float32)
    x, a = torch.empty(size, dtype=torch.uint8, device=DEVICE), torch.randn(side, side, device=DEVICE, dtype=dtype)
    y = torch.empty_like(x)
    copied, product = (statistics.median(seconds_of(call) for _ in range(20)) for call in (lambda: y.copy_(x), lambda: a @ a))
    tell("ceilings", copy_GB_per_s=2e-9 * size / copied,
         **{f"{'bf16' if CUDA else 'fp32'}_TFLOP_per_s": 2e-12 * side ** 3 / product})
    return 2 * size / copied, 2 * side ** 3 / product


def random_model(shape):
    """A GPT with random weights that ends no response, and a tokenizer for it: the text of id i is <i>."""
    V = SHAPES[shape]["vocab_size"]
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPES[shape], eos_id=V - 1, max_len=512)).to(DEVICE)
    gpt.config.eos_id = -1
    files = dict(Tokenizer.from_pieces(["<0>"]).files)               # the same kind with more pieces, found by their form
    spec = json.loads(files["tokenizer.json"])
    spec["model"]["vocab"] = {f"<{i}>": i for i in range(V - 1)}
    spec["added_tokens"][0]["id"] = V - 1
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "<[0-9]+>"
    return gpt, Tokenizer(files | {"tokenizer.json": json.dumps(spec)})


def random_prompts(n, shape):
    return torch.randint(0, SHAPES[shape]["vocab_size"] - 1, (n, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def transformers_model(c, dtype):
    """transformers' model of the same shape."""
    import transformers
    transformers.logging.set_verbosity_error()
    family = transformers.Qwen2Config if c.qkv_bias else transformers.LlamaConfig
    config = family(vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
                    num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.max_len,
                    tie_word_embeddings=c.tied_head, bos_token_id=None, eos_token_id=c.vocab_size - 1, pad_token_id=c.pad_id)
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


# ---- the sections ------------------------------------------------------------------------------------------------------------

def correctness(args):
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in file.read_text()]
    jobs = {"test_kernels.py": KERNEL_TESTS} | ({file.name: ["-m", "cuda"] for file in files} if CUDA else {})

    def job(name):
        status, last = stream(name, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}", *jobs[name])
        fail(name, last) if status else tell(name, result=last)

    with ThreadPoolExecutor() as pool:
        list(pool.map(job, jobs))


def defaults(args):
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // 4))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        def job(script):
            out = Path(folder) / script
            status, last = stream(script, sys.executable, f"{script}.py", "--out", str(out), *RUN_FLAGS)
            if status:
                return fail(script, last)
            summary, flags = (json.loads((out / name).read_text()) for name in ("summary.json", "args.json"))
            found, on_cpu = summary["after"]["accuracy"], accuracies_on_a_cpu(script, flags["args"])
            bounds = {"cpu_lowest": min(on_cpu), "cpu_highest": max(on_cpu), "cpu_seeds": len(on_cpu)} if on_cpu else {}
            tell(script, before=summary["before"]["accuracy"], after=found, seconds=summary["seconds"], **bounds)
            if CUDA and not bounds:
                fail(script, "results/ has no run on a CPU with these flags")
            if bounds and not bounds["cpu_lowest"] - 0.03 <= found <= bounds["cpu_highest"] + 0.03:
                fail(script, f"ends at {found:.3f}, more than 3 points outside of what a CPU gives"
                     + " (a quarter of its warm-ups do not learn the lines: results/evidence-r3.json)" * (script == "r3"))

        list(pool.map(job, ("ppo_reft", "r3", "score", "prl")))


def accuracies_on_a_cpu(script, flags):
    """At which accuracies the runs in results/ ended that had these flags, whatever their seed; not those of r3.py whose warm-up
    has not learned the careful lines, which end where they began."""
    rows = [row for file in (ROOT / "results").glob("*.json") for row in json.loads(file.read_text()) if isinstance(row, dict)]
    flags = {name: value for name, value in flags.items() if name not in ("seed", "device", "out", "resume")}
    return [row["after"]["accuracy"] for row in rows if row.get("script") == script and row.get("args", {}).get("device") == "cpu"
            and row["before"].get("careful_right", 1) > 0.9
            and all(flags[name] == value for name, value in row["args"].items() if name in flags)]


def kernels(args):
    out = args.out / "kernels.json"
    out.unlink(missing_ok=True)
    for name in ("kl", "logprob", "linear"):
        status, last = stream(name, sys.executable, "-m", f"kernels.{name}", "--out", str(out))
        lines = json.loads(out.read_text()).get(name, {}).get("lines", []) if out.exists() else []
        shown = "forward_ms", "both_ms", "unit", "rates", "peak_MiB"
        for line in lines:
            if line["name"] == "ours":
                tell(line["table"], **{key: line[key] for key in shown if line.get(key)})
        if status:
            fail(f"kernels.{name}", last)


def decode_parts(args):
    bandwidth, _ = ceilings()
    for shape in list(SHAPES)[:2]:
        for rows in BATCHES:
            attempt(f"{shape}, {rows} rows", decode_step, shape, rows, bandwidth)


@torch.inference_mode()
def decode_step(shape, B, bandwidth):
    """Microseconds of each part of a decoding step, half way through its NEW tokens: a part runs once for each layer, so that
    weights and cache come from memory as they do in a step, in one CUDA graph."""
    from kernels import decode, sample
    c = GPTConfig(**SHAPES[shape], eos_id=0)
    H, K, D, C, L, dtype = c.n_head, c.n_kv_head, c.head_dim, c.n_embd, c.n_layer, torch.bfloat16 if CUDA else torch.float32
    normal = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    length, found = PROMPT + NEW // 2, {}

    def measure(name, part, nbytes, times=L):
        part(0)                                                      # compiles
        run = lambda: [part(layer) for layer in range(times)]
        if CUDA:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        run()
        microseconds = 1e6 * statistics.median(seconds_of(run) for _ in range(9)) / times
        found.update({f"{name}_us": microseconds, f"{name}_share": 1e6 * nbytes / bandwidth / microseconds})

    size, x, weight = torch.tensor([], dtype=dtype).itemsize, normal(B, C).float(), torch.ones(C, device=DEVICE)
    lengths, alive = torch.full((B,), length, device=DEVICE), torch.ones(B, dtype=torch.bool, device=DEVICE)
    cache, qkv, rope = normal(L, 2, B, K, PROMPT + NEW, D), normal(B, (H + 2 * K) * D), rope_table(c, PROMPT + NEW, DEVICE)
    measure("attention", lambda layer: decode.decode_attention(qkv, cache[layer], lengths, alive, rope),
            size * (2 * B * K * length * D + B * (2 * H + 4 * K) * D))
    del cache
    delta, h = normal(B, C), normal(B, 2 * c.n_inner)
    measure("add_norm", lambda layer: decode.add_norm(x, delta, weight, None, 1e-5, dtype), B * C * (8 + 2 * size))
    measure("activation", lambda layer: decode.activation(h, True), size * B * 3 * c.n_inner)
    for name, rows, columns in (("qkv", (H + 2 * K) * D, C), ("out", C, H * D), ("up", 2 * c.n_inner, C), ("down", C, c.n_inner)):
        weights, inputs = normal(L, rows, columns), normal(B, columns)
        measure(name, lambda layer: inputs @ weights[layer].T, size * (weights[0].numel() + B * (rows + columns)))
    logits, seed = normal(B, c.vocab_size).float(), torch.tensor(1, device=DEVICE)
    for greedy in (False, True):
        measure("greedy" if greedy else "sample", lambda layer: sample.sample_tokens(logits, seed, lengths, greedy=greedy),
                4 * logits.numel(), times=4)
    return found


def generation(args):
    bandwidth, _ = ceilings()

    def ours(gpt, prompts):
        run = lambda: generate(gpt, prompts, NEW, group_size=GROUP)
        run()                                                        # compiles and warms up
        peak_GiB()
        return rates(seconds_of(run), gpt, len(prompts) * GROUP) | peak_GiB()

    def theirs(gpt, prompts):
        other = transformers_model(gpt.config, torch.bfloat16 if CUDA else torch.float32)
        tokens = torch.tensor(prompts, device=DEVICE)
        other.generation_config.eos_token_id = None
        run = lambda n: other.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=True,
                                       top_k=0, num_return_sequences=GROUP, pad_token_id=0)
        assert run(4).shape == (len(prompts) * GROUP, PROMPT + 4)
        peak_GiB()
        return rates(seconds_of(lambda: run(NEW)), gpt, len(prompts) * GROUP) | peak_GiB()

    def rates(seconds, gpt, rows):
        """The floor: in each step the weights (bf16 on a GPU) and the keys and values of all tokens so far are read once."""
        c, size = gpt.config, 2 if CUDA else 4
        weights = sum(p.numel() for p in gpt.parameters()) * size
        cache = rows * (PROMPT + NEW / 2) * 2 * c.n_layer * c.n_kv_head * c.head_dim * size
        floor = (weights + cache) / bandwidth
        return {"tokens_per_s": rows * NEW / seconds, "ms_a_step": 1e3 * seconds / NEW, "floor_ms": 1e3 * floor,
                "share_of_floor": floor * NEW / seconds}

    # what decides first, should the time end: both beside each other at the middle size, then ours, then the rest of theirs
    sides, middle = {"": (ours, None), ", transformers": (theirs, "transformers")}, BATCHES[len(BATCHES) // 2]
    others = [rows for rows in BATCHES if rows != middle]
    for whose, sizes in ((sides, [middle]), ([""], others), ([", transformers"], others)):
        for shape in SHAPES:
            gpt, _ = random_model(shape)
            for rows in sizes:
                for who in whose:
                    measure, package = sides[who]
                    attempt(f"{shape}, {rows} rows{who}", measure, gpt, random_prompts(rows // GROUP, shape), package=package)


def iteration(args):
    _, peak = ceilings()
    shapes = list(SHAPES)[:2][::-1]
    for shape in shapes:                                             # the two that are compared first
        attempt(f"{shape}, prl.py", our_iteration, "prl", shape, peak, True)
        attempt(f"{shape}, TRL's GRPO trainer", trl_iteration, shape, package="trl")
    for shape in shapes:
        attempt(f"{shape}, ppo_reft.py", our_iteration, "ppo_reft", shape, peak, True)
        attempt(f"{shape}, prl.py --no-compile", our_iteration, "prl", shape, peak, False)


def our_iteration(name, shape, peak, compiled):
    """Seconds and MFU by phase of the second of two iterations: ROWS responses of NEW tokens each, one pass over them. All that
    knows the inside of a script is here."""
    script, (policy, tokenizer), group = importlib.import_module(name), random_model(shape), 1 if name == "ppo_reft" else GROUP
    flags = (f"--device {DEVICE} --batch-size {ROWS // group} --minibatch-size {ROWS} --micro-batch-size {MICRO} --lr 1e-6 "
             f"--max-new-tokens {NEW} --ppo-epochs 1 --train-size {ROWS} --eval-size 8").split()
    args = script.parse_args(flags + (["--group-size", str(group)] if group > 1 else []))
    problems = [problem | {"prompt": ids} for problem, ids in zip(script.prepare(args)[2], random_prompts(ROWS // group, shape))]
    GPT.compiled = CUDA and compiled
    known = {"policy": policy, "ref": policy.frozen(), "tokenizer": tokenizer, "problems": problems,
             "args": args, "critic": script.add_critic(policy, args) if hasattr(script, "add_critic") else None}
    optimizer, spent = script.adamw([policy], args.lr), {}

    def bind(function):
        """With its first arguments, those that are known by their names."""
        return functools.partial(function, *[known[key] for key in inspect.signature(function).parameters if key in known])

    def watch(phase):
        function = getattr(script, phase)

        def timed(*args, **kwargs):
            result = []
            spent[phase] = seconds_of(lambda: result.append(function(*args, **kwargs)))
            return result[0]
        return timed

    def one():
        data, log = rollout()
        assert log["tokens"] == ROWS * NEW
        script.update(loss_of, data, optimizer, args)

    rollout, loss_of = bind(script.rollout), bind(script.loss_fn)
    with mock.patch.multiple(script, **{phase: watch(phase) for phase in ("generate", "respond", "token_stats", "update")}):
        first = seconds_of(one)                                      # and all that is compiled
        peak_GiB()
        whole = seconds_of(one)

    # FLOP of a forward: 2 a weight of the blocks and token, 2 a weight of the head and sampled token, 4 H D a layer for each
    # column that a token attends to, half of them in the mean. Training takes 3 forwards, 6 FLOP a weight; what is computed a
    # second time to save memory is not counted. The score is a forward of the policy and one of the reference
    c, blocks = policy.config, sum(p.numel() for p in policy.blocks.parameters())
    forward = lambda rows, length, sampled: 2 * rows * (blocks * length + c.vocab_size * c.n_embd * sampled
                                                        + c.n_layer * c.n_head * c.head_dim * length ** 2)
    rows = forward(ROWS, PROMPT + NEW, NEW)
    spent |= {"check": spent.pop("respond") - spent["generate"], "score": spent.pop("token_stats")}
    work = {"generate": rows - forward(ROWS, PROMPT, 0) + forward(ROWS // group, PROMPT, 0), "score": 2 * rows, "update": 3 * rows}
    return {"seconds": whole, "first_s": first} | {f"{phase}_s": value for phase, value in spent.items()} | {
        f"{phase}_MFU": flop / spent[phase] / peak for phase, flop in work.items()} | {
        "MFU": sum(work.values()) / whole / peak} | peak_GiB()


def trl_iteration(shape):
    """Seconds of the second step of TRL's trainer: the same shape, rows, group and lengths, its own generate, one pass."""
    import datasets
    import transformers
    import trl
    gpt, tokenizer = random_model(shape)
    began, steps = [], []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            peak_GiB()
            torch.cuda.synchronize() if CUDA else None
            began.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize() if CUDA else None
            steps.append({"seconds": time.perf_counter() - began[-1]} | peak_GiB())

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        transformers_model(gpt.config, torch.float32).save_pretrained(folder)
        del gpt
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=not CUDA, bf16=CUDA, gradient_checkpointing=False, report_to="none", save_strategy="no",
            disable_tqdm=True, per_device_train_batch_size=MICRO, gradient_accumulation_steps=ROWS // MICRO, num_generations=GROUP,
            max_completion_length=NEW, max_steps=2, learning_rate=1e-6, beta=0.05, num_iterations=1, temperature=1.0)
        prompts = ["".join(f"<{i}>" for i in ids) for ids in random_prompts(2 * ROWS // GROUP, shape)]
        trainer = trl.GRPOTrainer(
            folder, reward_funcs=lambda completions, **_: [len(text) % 7 / 7 for text in completions], args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(folder), callbacks=[Watch()])
        trainer.train()
    return steps[-1]


def train(args):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        status, last = stream("ppo_reft", sys.executable, "ppo_reft.py", "--model", args.model, "--train-data", args.train_data,
                              "--eval-data", args.eval_data, "--out", str(out), *TRAIN_FLAGS,
                              seconds=max(0.6 * args.seconds, args.seconds - 25))        # the rest is for saving and reading
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if (out / "log.jsonl").exists() else []
    for i, record in enumerate(log):
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
        if record["event"] != "iteration" or record["iteration"] == 1 or i == len(log) - 1 or "dev_accuracy" in record:
            tell(record["event"], **numbers)
        else:
            print(json.dumps(record))
    if status not in (0, 128 + signal.SIGTERM):
        fail("ppo_reft.py", last)


SECTIONS = {"correctness": correctness, "defaults": defaults, "kernels": kernels, "decode": decode_parts, "generate": generation,
            "iteration": iteration, "train": train}


# ---- all of them -------------------------------------------------------------------------------------------------------------

def machine():
    """Where and when this is, and of what."""
    git = subprocess.run("git describe --always --dirty --abbrev=40", shell=True, cwd=ROOT, capture_output=True, text=True)
    packages = ("torch", "triton", "transformers", "trl", "liger-kernel")
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages
                                                        if importlib.util.find_spec(p.replace("-", "_"))}
    name = torch.cuda.get_device_name() if CUDA else f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return {"machine": name, "versions": versions | {"torch": torch.__version__}, "commit": git.stdout.strip() or "no git here",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": "python " + " ".join(sys.argv)}


def run_section(name, budget, args):
    """One section in a process of its own: {"status", "reason", "seconds", "rows"}."""
    log, began = args.out / f"{name}.log", time.time()
    flags = ["--section", name, "--seconds", str(budget), "--out", str(args.out), "--model", args.model,
             "--train-data", args.train_data, "--eval-data", args.eval_data]
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, __file__, *flags], stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            status = process.wait(budget)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)               # with all that it started
    lines = log.read_text(errors="replace").splitlines()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    failed = [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]
    other = [line.strip() for line in lines if line.strip() and not line.startswith("ROW ")]
    reason = f"over its budget of {budget:.0f} s" if status is None else (failed or other or ["no output"])[-1] if status else ""
    return {"status": "failed" if reason else "passed", "reason": reason, "seconds": time.time() - began, "rows": rows}


def show(sections):
    for name, section in sections.items():
        print(f"\n{name:14}{section['status']} in {section['seconds']:.0f} s  {section['reason']}")
        for row in section["rows"]:
            values = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
            print(f"  {row['name']:44}  {'  '.join(values[1:])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu")
    parser.add_argument("--only", default="", help="sections, with commas between")
    for name in ("model", "train-data", "eval-data"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--section", help=argparse.SUPPRESS)         # the process of one section, as run_section() starts it
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.section:
        LATE[0] = time.time() + 0.75 * args.seconds
        SECTIONS[args.section](args)
        sys.exit(bool(FAILED))

    chosen = args.only.split(",") if args.only else [name for name in WEIGHTS if name != "train" or args.model]
    if unknown := [name for name in chosen if name not in WEIGHTS]:
        parser.error(f"--only {','.join(unknown)}: the sections are {', '.join(WEIGHTS)}")
    if "train" in chosen and not (args.model and args.train_data and args.eval_data):
        parser.error("the section train needs --model, --train-data and --eval-data")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))       # so that run_section() takes its process along
    args.out.mkdir(parents=True, exist_ok=True)
    file, where, end = args.out / "gpu.json", machine(), time.time() + 60 * args.minutes
    results, done = json.loads(file.read_text()) if file.exists() else {}, {}
    print(json.dumps(where, indent=1), flush=True)
    for i, name in enumerate(chosen):
        budget = max(end - time.time(), 0) * WEIGHTS[name] / sum(WEIGHTS[rest] for rest in chosen[i:])
        done[name] = run_section(name, budget, args)
        print(f"{name}: {done[name]['status']} in {done[name]['seconds']:.0f} s  {done[name]['reason']}", flush=True)
        results[name] = where | done[name]
        file.with_suffix(".tmp").write_text(json.dumps(results, indent=1) + "\n")
        os.replace(file.with_suffix(".tmp"), file)
    show(done)
    sys.exit(any(section["status"] == "failed" for section in done.values()))


if __name__ == "__main__":
    main()
