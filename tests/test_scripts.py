"""The scripts as a user meets them: shared code identical, equation table tagged, imports few; runs, resumes, refusals."""
import ast
import dataclasses
import functools
import itertools
import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from processes import ROOT, SCRIPTS, Running

DIFFERS = {"Args", "reward", "rollout", "loss_fn", "evaluate", "main"}        # the papers' differences, nothing else

TINY = ["--train-size", "64", "--warmup-epochs", "2", "--warmup-batch-size", "8", "--iterations", "3", "--batch-size", "8",
        "--minibatch-size", "8", "--micro-batch-size", "4", "--max-new-tokens", "12", "--eval-size", "8", "--eval-every", "3",
        "--save-every", "1", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--device", "cpu"]


def start(script, out, *flags, tiny=True):
    whole = ["--minibatch-size", "32"] if script == "score" else []           # which takes the whole rollout in one step
    return Running(script, [str(flag) for flag in (*(TINY + whole if tiny else []), "--out", out, *flags)])


def run(script, out, *flags, tiny=True):
    return start(script, out, *flags, tiny=tiny).wait()


def read_log(out):
    """log.jsonl without the two fields that a clock wrote."""
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def weights(out):
    return torch.load(Path(out) / "state.pt", weights_only=True)["policy"]


def assert_same_run(a, b):
    assert read_log(a) == read_log(b)
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    assert (Path(a) / "model/model.safetensors").read_bytes() == (Path(b) / "model/model.safetensors").read_bytes()


# ---- the text of the scripts -------------------------------------------------------------------------------------------------

def definitions(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    return {n.name: "\n".join(lines[n.lineno - 1:n.end_lineno]) for n in ast.parse("\n".join(lines)).body if hasattr(n, "name")}


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_shared_code_is_identical(a, b):
    a, b = definitions(a), definitions(b)
    for name in sorted((a.keys() & b.keys()) - DIFFERS):
        assert a[name] == b[name], name


@pytest.mark.parametrize("script", SCRIPTS)
def test_equation_table(script):
    """Every function in the docstring's table exists, and every number in it tags a line of that function."""
    text = (ROOT / f"{script}.py").read_text()
    rows = re.findall(r"^    .*\s{2,}((?:Eq\. )?\w+)\s{2,}(\w+)\(\)$", ast.get_docstring(ast.parse(text), clean=False), re.M)
    assert len(rows) >= 5
    for number, function in rows:
        assert re.search(rf"# {re.escape(number)}$", definitions(script)[function], re.M), (number, function)
    tags = set(re.findall(r"  # ((?:Eq\. )?[A-Z]?\d+)$", text, re.M))
    assert tags == {number for number, _ in rows}


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    allowed = set(sys.stdlib_module_names) | {"torch", "model", "kernels", "tqdm", "matplotlib"}
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script):
    text = run(script, "unused", "--help", tiny=False).stdout
    assert "Eq. 1" in text and "arXiv" in text
    flags = re.findall(r"^  --([\w-]+)", text, re.M)
    assert len(flags) > 25
    for flag in flags:                                                       # each with a word of explanation and its default
        assert re.search(rf"--{flag}\b[^\n]*\s+\w+", text)


# ---- runs, resumes -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(None)
def whole_run(script, method, folder):
    result = run(script, folder, "--method", method)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


CASES = [("ppo_reft", method) for method in ("reft", "sft", "offline-st", "online-st")]
CASES += [("r3", method) for method in ("r3", "staged", "rl")]
CASES += [("prl", method) for method in ("prl", "frpo", "grpo-kl-loss")]
CASES += [("score", method) for method in ("score", "multi-turn", "pair-sft", "star-stage2")]


@pytest.mark.parametrize("script, method", CASES)
def test_a_run_writes_its_folder(script, method, folder):
    out = folder / f"{script}-{method}"
    printed = whole_run(script, method, out)
    written = {p.name for p in out.iterdir()} - {"stages.png", "passk.png", "turns.png"}   # pictures of r3, prl, score
    assert written == {"args.json", "log.jsonl", "summary.json", "curves.png", "model", "warmup", "state.pt"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["script"], summary["method"], summary["seed"], summary["problems"]) == (script, method, 0, 8)
    assert 0 <= summary["before"]["accuracy"] <= 1 and 0 <= summary["after"]["accuracy"] <= 1 and summary["seconds"] > 0
    info = json.loads((out / "args.json").read_text())
    assert info["args"]["method"] == method and {"torch", "python", "device", "commit"} <= info.keys()
    log = read_log(out)
    assert [r["event"] for r in log] == ["warmup", "iteration", "iteration", "iteration", "end"]
    assert [r["iteration"] for r in log[1:-1]] == [1, 2, 3] and "dev_accuracy" in log[3]
    assert "->" in printed and printed.count("iteration ") >= 3
    assert "first prompt" in printed and "its ids: [" in printed
    if "sft" not in method and "offline" not in method:
        assert "first sample" in printed
        assert {"accuracy", "outcome", "kl", "kl_k1", "response_length", "truncated", "unparsed", "no_signal", "entropy",
                "grad_norm"} <= log[1].keys() and log[1]["kl"] >= 0
    if method == "reft":
        assert {"policy_loss", "value_loss", "explained_variance"} <= log[1].keys() and log[1]["clip_frac"][0] == 0   # the ratio is 1


@pytest.mark.parametrize("script, method", CASES[:1])
def test_same_seed_same_log(script, method, folder, tmp_path):
    whole_run(script, method, folder / f"{script}-{method}")
    assert run(script, tmp_path / "again", "--method", method).returncode == 0
    assert_same_run(folder / f"{script}-{method}", tmp_path / "again")
    assert run(script, tmp_path / "other", "--method", method, "--seed", "1").returncode == 0
    assert read_log(tmp_path / "other") != read_log(tmp_path / "again")


@pytest.mark.parametrize("script, method", CASES)
@pytest.mark.parametrize("where", ["a random moment", "training"])
def test_kill_and_resume_equals_an_unbroken_run(script, method, where, folder, tmp_path):
    """kill -9, twice, then --resume: log and weights bit for bit as if nothing had happened."""
    whole_run(script, method, folder / f"{script}-{method}")
    out, rng = tmp_path / "killed", random.Random()
    resume = lambda: ["--resume"] if (out / "args.json").exists() else []
    for attempt in range(2):
        running, began = start(script, out, "--method", method, *resume()), time.time()
        deadline = rng.uniform(0.05, 2.5) if where == "a random moment" else 60
        while time.time() < began + deadline and not (where == "training" and lines_of(out) > attempt + 1):
            time.sleep(0.003)
        running.kill(signal.SIGKILL)
        running.wait()
    result = run(script, out, "--method", method, *resume())
    assert result.returncode == 0, result.stderr
    assert_same_run(folder / f"{script}-{method}", out)


def lines_of(out):
    return len((out / "log.jsonl").read_text().splitlines()) if (out / "log.jsonl").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, folder, tmp_path):
    whole_run("ppo_reft", "reft", folder / "ppo_reft-reft")
    out = tmp_path / "stopped"
    running = start("ppo_reft", out)
    while not (out / "log.jsonl").exists():
        time.sleep(0.003)
    running.kill(number)
    result = running.wait()
    assert result.returncode == 128 + number, result.stderr
    assert "go on with" in result.stderr and "--resume" in result.stderr and "Traceback" not in result.stderr
    assert run("ppo_reft", out, "--resume").returncode == 0
    assert_same_run(folder / "ppo_reft-reft", out)


def test_a_finished_run_can_be_resumed_and_a_used_folder_is_refused(folder, tmp_path):
    whole_run("ppo_reft", "reft", folder / "ppo_reft-reft")
    shutil.copytree(folder / "ppo_reft-reft", tmp_path / "done")
    before = read_log(tmp_path / "done")
    result = run("ppo_reft", tmp_path / "done", "--resume")
    assert result.returncode == 0 and "->" in result.stdout
    assert read_log(tmp_path / "done") == before
    refuse(run("ppo_reft", tmp_path / "done"), "holds a run already")
    refuse(run("ppo_reft", tmp_path / "done", "--resume", "--lr", "0.5"), "--lr was")
    refuse(run("ppo_reft", tmp_path / "none", "--resume"), "no run to resume")


# ---- refusals ----------------------------------------------------------------------------------------------------------------

def refuse(result, *words):
    """Exit status 2, one line on stderr, with these words in it."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint whose vocabulary is the printable characters."""
    from model import GPT, GPTConfig, Tokenizer, save_checkpoint
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pieces([chr(i) for i in range(32, 127)] + ["\n"])
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, max_len=256, eos_id=tokenizer.eos_id,
                        pad_id=tokenizer.pad_id))
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save_checkpoint(path, gpt, tokenizer)
    return path


GSM = [{"question": f"Ann has {i} pens and buys {i}. How many?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(30)]
REFT = [{"item_id": str(i), "question": f"Ann has {i} pens and buys {i}. How many?",
         "answer_cot": f"{i} + {i} = {2 * i}\n\nTherefore, the answer is <{2 * i}>.", "answer_value": f"{2 * i}.0"} for i in range(30)]


def write(path, records, form="lines"):
    path.write_text("\n".join(json.dumps(r) for r in records) if form == "lines" else json.dumps(records))
    return path


@pytest.mark.parametrize("form, records", [("lines", GSM), ("list", REFT)])
def test_files_of_both_forms_train(form, records, checkpoint, tmp_path):
    data = write(tmp_path / "data", records, form)
    result = run("ppo_reft", tmp_path / "run", "--model", checkpoint, "--train-data", data, "--eval-data", data, "--iterations", "1",
                 "--warmup-epochs", "1", "--batch-size", "8", "--minibatch-size", "8", "--max-new-tokens", "16", "--eval-size", "8", tiny=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("flags, words", [
    (["--method", "grpo"], ["--method", "reft, sft"]),
    (["--kl", "k9"], ["k1, exact"]),
    (["--batch-size", "0"], ["--batch-size 0"]),
    (["--lr", "-1"], ["--lr"]),
    (["--lr", "nan"], ["--lr"]),
    (["--lr", "much"], ["--lr"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--warmup-epochs", "0"], ["--model"]),
    (["--model", "no/such/folder"], ["no/such/folder"]),
    (["--train-data", "x"], ["--eval-data"]),
    (["--max-new-tokens", "5000"], ["context"]),
    (["--device", "cuda"], ["no GPU"]),
])
def test_impossible_flags_are_refused_and_nothing_is_written(flags, words, tmp_path):
    refuse(run("ppo_reft", tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, words", [
    ("", ["holds no records"]),
    ('{"question": "a", "answer": "b\\n#### 1"}\n{"question": ', [":2: not JSON"]),
    ('[{"question": "a"', ["not JSON"]),
    ('{"question": "a", "answer": "b"}', [":1:", "neither GSM8K's form"]),
    ('{"answer": "b\\n#### 1"}', [":1:", "question"]),
    ('{"question": "a", "answer": "b\\n#### 1"}\n{"question": "a", "answer": "b\\n#### many"}', [":2:", "'many'"]),
    ('[{"question": "a", "answer_cot": "b", "answer_value": "1"}, 7]', ["record 2"]),
    ("\n".join(json.dumps(r) for r in GSM).replace("Ann", "Änne"), ["Ä"]),
    ("\n".join(json.dumps(r | {"question": r["question"] * 9}) for r in GSM), ["context"]),
])
def test_bad_data_is_refused_with_its_line(text, words, checkpoint, tmp_path):
    (tmp_path / "train.jsonl").write_text(text)
    good = write(tmp_path / "good.jsonl", GSM)
    result = run("ppo_reft", tmp_path / "run", "--model", checkpoint, "--train-data", tmp_path / "train.jsonl", "--eval-data", good)
    refuse(result, *words)
    assert not (tmp_path / "run").exists()
    refuse(run("ppo_reft", tmp_path / "run", "--model", checkpoint, "--train-data", tmp_path / "none", "--eval-data", good), "none: cannot be read")


# ---- promises about the log --------------------------------------------------------------------------------------------------

def test_warning_after_ten_iterations_without_signal(tmp_path, capsys):
    import ppo_reft as reft
    args, state = reft.Args(out=str(tmp_path), iterations=40), {"seconds": 0.0, "tokens": 0, "log_lines": 0}
    for iteration in range(1, 11):
        assert "nothing to learn from" not in capsys.readouterr().out
        reft.finish_iteration({"iteration": iteration, "no_signal": 1.0, "tokens": 5}, state, time.time() - 1, args)
    assert "nothing to learn from" in capsys.readouterr().out


def test_demonstrations_longer_than_responses_are_counted_at_the_start(capsys):
    import ppo_reft as reft
    args = reft.Args(device="cpu", train_size=200, eval_size=5)
    train = reft.prepare(args)[2]
    assert "warning" not in capsys.readouterr().out
    longer = sum(len(problem["response"]) > 30 for problem in train)
    reft.prepare(dataclasses.replace(args, max_new_tokens=30))
    assert 0 < longer < 200 and f"warning: {longer} of 200 demonstrations are longer than --max-new-tokens 30" in capsys.readouterr().out


def test_truncated_share_is_red_above_a_fifth(capsys, monkeypatch):
    import ppo_reft as reft
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    record = {"iteration": 1, "truncated": 0.21, "tokens_per_second": 1.0}
    reft.show(record, {"seconds": 1.0}, reft.Args())
    reft.show(record | {"truncated": 0.19}, {"seconds": 1.0}, reft.Args())
    first, second = capsys.readouterr().out.splitlines()
    assert "\033[31mcut 0.21" in first and "\033[31m" not in second


def test_builtin_problems_are_fixed_right_and_the_splits_apart():
    import ppo_reft as reft
    splits = reft.load_problems(reft.Args(train_size=3000, eval_size=300))
    questions = [{p["question"] for p in split} for split in splits]
    assert not any(a & b for a, b in itertools.combinations(questions, 2))
    assert splits == reft.load_problems(reft.Args(train_size=3000, eval_size=300, seed=5))
    for problem in sum(splits, []):
        chain = re.fullmatch(r"What is ([\d +-]+)\?", problem["question"])[1]
        assert eval(chain) == problem["gold"]
        for line in problem["cot"].splitlines():
            left, right = line.split(" = ")
            assert eval(left) == int(right)
