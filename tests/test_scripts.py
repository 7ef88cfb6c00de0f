"""The scripts as a user meets them: shared code identical, equation table tagged, imports few; runs, resumes, refusals."""
import ast
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from model import InputError
from processes import NO_GPU, ROOT, SCRIPTS, Running

SHARED = "# ==== the same in all four scripts from here on"
# above that line: the papers' differences and those of their tasks, nothing else
DIFFERS = {"Args", "reward", "rollout", "loss_fn", "main", "attempt", "demonstration", "builtin_problem", "builtin_tokenizer",
           "parse_record", "encode_problem", "read_answers", "judged"}

TINY = ["--train-size", "64", "--warmup-epochs", "2", "--warmup-batch-size", "8", "--iterations", "3", "--batch-size", "8",
        "--minibatch-size", "8", "--micro-batch-size", "4", "--max-new-tokens", "12", "--eval-size", "8", "--eval-every", "3",
        "--save-every", "1", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--device", "cpu"]
# of score the optimiser takes the whole rollout in one step, and some attempts must be right, or nothing is trained
MORE = {"score": ["--minibatch-size", "32", "--warmup-epochs", "4", "--warmup-lr", "0.01", "--operations-low", "1",
                  "--operations-high", "1"],
        "prl": ["--demonstrations", "32", "--samples", "8"]}


def start(script, out, *flags, tiny=True, pictures=False):
    return Running(script, [str(flag) for flag in (*(TINY + MORE.get(script, []) if tiny else []), "--out", out, *flags)], pictures)


def run(script, out, *flags, tiny=True, pictures=False):
    return start(script, out, *flags, tiny=tiny, pictures=pictures).wait()


def read_log(out):
    """log.jsonl without the fields that a clock wrote."""
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "phases", "tokens_per_second")} for r in records]


def weights(out):
    return torch.load(Path(out) / "state.pt", weights_only=True)["weights"]["policy"]


def assert_same_run(a, b):
    assert read_log(a) == read_log(b)
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    assert (Path(a) / "model/model.safetensors").read_bytes() == (Path(b) / "model/model.safetensors").read_bytes()


# ---- the text of the scripts -------------------------------------------------------------------------------------------------

@functools.cache
def definitions(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    return {n.name: "\n".join(lines[n.lineno - 1:n.end_lineno]) for n in ast.parse("\n".join(lines)).body if hasattr(n, "name")}


def test_the_scripts_end_with_the_same_text():
    ends = {script: (ROOT / f"{script}.py").read_text().partition(SHARED) for script in SCRIPTS}
    assert all(shared and "def main" not in end for _, shared, end in ends.values())
    for script, (_, _, end) in ends.items():
        for number, (here, there) in enumerate(zip(end.split("\n"), ends["ppo_reft"][2].split("\n"))):
            assert here == there, f"{script}.py, line {number} after the ruler"
        assert end == ends["ppo_reft"][2], script


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_what_has_one_name_is_one_text(a, b):
    a, b = definitions(a), definitions(b)
    for name in sorted((a.keys() & b.keys()) - DIFFERS):
        assert a[name] == b[name], name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_paper_comes_first(script):
    """Order of the sections; the paper and its loop, every tagged equation but those of reports, within the first 320 lines."""
    text = (ROOT / f"{script}.py").read_text()
    rulers = re.findall(r"^# ==== (.*?) =+$", text, re.M)
    kept = [ruler for ruler in rulers if ruler in ("the loop", "baselines", "the task: problems, prompts, answers")
            or ruler.startswith(("the paper", SHARED[7:]))]
    assert kept[0].startswith("the paper") and kept[-4:-1] == ["the loop", "baselines", "the task: problems, prompts, answers"]
    lines = text.split("\n")
    assert max(map(len, lines)) <= 132 and next(i for i, line in enumerate(lines) if line.startswith("def main")) < 320
    baselines = next(i for i, line in enumerate(lines) if line.startswith("# ==== baselines"))
    assert all(i < baselines for i, line in enumerate(lines) if re.search(r"  # (Eq\. 1|[FS][1-9])$", line))


def test_no_line_is_wider_than_132_columns():
    assert not [f"{path.relative_to(ROOT)}:{i}" for pattern in ("*.py", "kernels/*.py", "tests/*.py")
                for path in sorted(ROOT.glob(pattern))
                for i, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 132]


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
def test_nothing_is_there_that_the_script_does_not_use(script):
    """Every import, function and constant, in the shared block as well."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for top in tree.body if isinstance(top, ast.Assign) for node in ast.walk(top)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {(alias.asname or alias.name).split(".")[0] for top in tree.body if isinstance(top, (ast.Import, ast.ImportFrom))
              for alias in top.names}
    assert sorted((bound | definitions(script).keys()) - loaded) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    allowed = set(sys.stdlib_module_names) | {"torch", "model", "kernels", "tqdm", "filelock"}
    late = allowed | {"matplotlib", "pydantic_monty", "rapidfuzz", "huggingface_hub", "jinja2"}           # only some runs need them
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    for node in ast.walk(tree):
        names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                 [node.module] if isinstance(node, ast.ImportFrom) else [])
        assert {name.split(".")[0] for name in names} <= (allowed if node in tree.body else late)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script):
    text = run(script, "unused", "--help", tiny=False).stdout
    assert "Eq. 1" in text and "arXiv" in text
    flags = re.findall(r"^  --([\w-]+)", text, re.M)
    assert len(flags) > 25
    assert {"run", "problems", "reinforcement learning", "reports"} <= set(re.findall(r"^(\w[\w ]*):$", text, re.M))    # by block
    for flag in flags:                                                       # each with a word of explanation and its default
        assert re.search(rf"--{flag}\b[^\n]*\s+\w+", text)


# ---- runs, resumes -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(None)
def whole_run(script, method, folder):
    """What it printed and how many seconds it took; once for all tests that compare with it. Pictures, which take longer than the
    rest, are drawn for the script's own method; for the others all but their last step, which is matplotlib's."""
    began, result = time.time(), run(script, folder, "--method", method, pictures=method in OWN)
    assert result.returncode == 0, result.stderr
    return result.stdout, time.time() - began


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


CASES = [("ppo_reft", method) for method in ("reft", "sft", "offline-st", "online-st")]
CASES += [("r3", method) for method in ("r3", "staged", "rl")]
CASES += [("prl", method) for method in ("prl", "frpo", "grpo-kl-loss")]
CASES += [("score", method) for method in ("score", "multi-turn", "pair-sft", "star-stage2")]
OWN = "reft", "r3", "prl", "score"


@pytest.mark.parametrize("script, method", CASES)
def test_a_run_writes_its_folder(script, method, folder):
    out = folder / f"{script}-{method}"
    printed, _ = whole_run(script, method, out)
    assert all(p.read_bytes().startswith(b"\x89PNG" if method in OWN else b"") for p in out.glob("*.png"))
    picture = {"r3": {"stages.png"}, "prl": {"passk.png"}, "score": {"turns.png"}}.get(script, set())
    assert {p.name for p in out.iterdir()} == picture | {
        ".lock", "args.json", "log.jsonl", "summary.json", "curves.png", "model", "warmup", "state.pt"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["script"], summary["method"], summary["seed"], summary["problems"]) == (script, method, 0, 8)
    assert 0 <= summary["before"]["accuracy"] <= 1 and 0 <= summary["after"]["accuracy"] <= 1 and summary["seconds"] > 0
    assert {"last_t1", "last_t2"} <= summary["after"].keys() if script == "score" else 0 <= summary["after"]["last_accuracy"] <= 1
    assert ("last_hasty_right" in summary["after"]) == (script == "r3")
    info = json.loads((out / "args.json").read_text())
    assert info["args"]["method"] == method and {"torch", "python", "device", "commit", "clean", "inputs"} <= info.keys()
    log = read_log(out)
    assert [r["event"] for r in log] == ["warmup", "iteration", "iteration", "iteration", "end"]
    assert [r["iteration"] for r in log[1:-1]] == [1, 2, 3] and "dev_accuracy" in log[3]
    assert any(r["grad_norm"] for r in log[1:-1])                              # it was trained
    assert "->" in printed and printed.count("iteration ") >= 3
    assert "first prompt" in printed and "its ids: [" in printed
    if "sft" not in method and "offline" not in method:
        assert "first sample" in printed
        assert {"accuracy", "outcome", "kl", "kl_k1", "response_length", "truncated", "unparsed", "no_signal", "entropy",
                "grad_norm"} <= log[1].keys() and log[1]["kl"] >= 0
    if method == "reft":
        assert {"policy_loss", "value_loss", "explained_variance"} <= log[1].keys()
        assert log[1]["clip_frac"][0] == 0                                    # the ratio is 1


@pytest.mark.parametrize("script, method", CASES[:1])
def test_same_seed_same_log(script, method, folder, tmp_path):
    whole_run(script, method, folder / f"{script}-{method}")
    assert run(script, tmp_path / "again", "--method", method).returncode == 0
    assert_same_run(folder / f"{script}-{method}", tmp_path / "again")
    assert run(script, tmp_path / "other", "--method", method, "--seed", "1").returncode == 0
    assert read_log(tmp_path / "other") != read_log(tmp_path / "again")


@pytest.mark.parametrize("script, method", CASES)
def test_kill_and_resume_equals_an_unbroken_run(script, method, folder, tmp_path):
    """kill -9 at a random moment up to the first iteration, in training when the second iteration is logged, so that one is saved,
    and at a random moment of what is left; then --resume: log and weights bit for bit as if nothing had happened."""
    _, seconds = whole_run(script, method, folder / f"{script}-{method}")
    out = tmp_path / "killed"
    resume = lambda: ["--resume"] if (out / "state.pt").exists() else []
    # the log's first line is the warm-up's
    for lines, moment in (2, random.uniform(0, seconds)), (3, 60), (math.inf, random.uniform(0, seconds)):
        running, began = start(script, out, "--method", method, *resume()), time.time()
        while time.time() < began + moment and lines_of(out) < lines and not running.ended():
            time.sleep(0.003)
        running.kill(signal.SIGKILL)
        running.wait()
    result = run(script, out, "--method", method, *resume())
    assert result.returncode == 0, result.stderr
    assert_same_run(folder / f"{script}-{method}", out)


def lines_of(out):
    return len((out / "log.jsonl").read_text().splitlines()) if (out / "log.jsonl").exists() else 0


def test_the_state_is_saved_with_the_checkpoint_that_is_best(monkeypatch):
    """Else a killed run might go on to something else, with a model/ of iterations that have never been."""
    import ppo_reft as reft
    saved, state = [], {"step": 0}
    monkeypatch.setattr(reft, "save_run", lambda modules, optimizer, state, args: saved.append(state["step"]))
    for step in reft.resumable(7, 5, {}, None, state, reft.Args()):
        if step in (2, 3, 6):
            state["best"] = {"iteration": step}
    assert saved == [0, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, folder, tmp_path):
    whole_run("ppo_reft", "reft", folder / "ppo_reft-reft")
    out = tmp_path / "stopped"
    running = start("ppo_reft", out)
    while not (out / "log.jsonl").exists() and not running.ended():
        time.sleep(0.003)
    assert "its demonstration" in Path(running.files[0].name).read_text()            # lines come at once, also into a file
    running.kill(number)
    result = running.wait()
    assert result.returncode == 128 + number, result.stderr
    assert result.stderr.startswith("stopping after this step; once more: at once")
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
    (tmp_path / "done" / "state.pt").rename(tmp_path / "state.pt")                   # a large file that nobody needs any more
    refuse(run("ppo_reft", tmp_path / "done"), "holds a run already")
    (tmp_path / "state.pt").rename(tmp_path / "done" / "state.pt")
    refuse(run("ppo_reft", tmp_path / "done", "--resume", "--lr", "0.5"), "--lr was")
    refuse(run("ppo_reft", tmp_path / "none", "--resume"), "no run to resume")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("script, method", [("ppo_reft", "reft"), ("r3", "r3"), ("prl", "prl"), ("score", "multi-turn")])
def test_a_finished_run_goes_on_with_more_iterations(script, method, folder, tmp_path):
    """As if it had been as long from the start; also when it is killed before anything new is saved."""
    whole_run(script, method, folder / f"{script}-{method}")
    shutil.copytree(folder / f"{script}-{method}", tmp_path / "longer")
    flags = ["--method", method, "--iterations", "5"]
    running = start(script, tmp_path / "longer", *flags, "--resume")
    while lines_of(tmp_path / "longer") == 5 and not running.ended():                 # until the line of the end is gone
        time.sleep(0.001)
    running.kill(signal.SIGKILL), running.wait()
    result = run(script, tmp_path / "longer", *flags, "--resume")
    assert result.returncode == 0, result.stderr
    assert run(script, tmp_path / "whole", *flags).returncode == 0
    assert_same_run(tmp_path / "longer", tmp_path / "whole")
    refuse(run(script, tmp_path / "longer", "--method", method, "--iterations", "4", "--resume"), "--iterations was 5")


def test_a_schedule_over_the_iterations_cannot_grow(folder, tmp_path):
    for script, method in ("ppo_reft", "sft"), ("r3", "staged"), ("score", "score"):
        whole_run(script, method, folder / f"{script}-{method}")
        shutil.copytree(folder / f"{script}-{method}", tmp_path / method)
        refuse(run(script, tmp_path / method, "--method", method, "--iterations", "5", "--resume"), "--iterations was 3")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_is_looked_at_in_an_evaluation(script, monkeypatch, capsys, tmp_path):
    module = importlib.import_module(script)
    measured = {"accuracy": [1.0] * 4}, "text"
    monkeypatch.setattr(module, "attempt", lambda *_: module.STOP.append(signal.SIGTERM) or measured)      # a signal while it works
    monkeypatch.setattr(module, "STOP", [])
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", "here"])
    groups = dict(batch_size=1, group_size=4) if script in ("score", "prl") else {}
    problems, args = [{"prompt": [1], "question": ""}] * 4, module.Args(out="here", minibatch_size=4, **groups)
    assert module.evaluate(None, problems, None, args)["accuracy"] == 1              # the last batch ends, as a step does
    with pytest.raises(SystemExit) as ended:
        module.evaluate(None, problems, None, args)
    assert ended.value.code == 128 + signal.SIGTERM
    assert ("stopped in the evaluation; what was saved last is kept in here; go on with: "
            "python x.py --out here --resume") in capsys.readouterr().err


def test_long_work_says_a_line_each_minute_where_there_is_no_terminal(monkeypatch, capsys):
    import ppo_reft as reft
    clock = iter(range(0, 10000, 25))
    monkeypatch.setattr(reft.time, "time", lambda: next(clock))
    assert list(reft.progress(range(3, 10), "warm-up", reft.Args(), 2, 9)) == list(range(3, 10))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["warm-up 5/9  ETA 2:13", "warm-up 8/9  ETA 0:29"]
    assert list(reft.progress(iter([]), "warm-up", reft.Args(), 0, 0)) == []         # a warm-up of no steps


def test_a_folder_in_which_nothing_was_saved_is_free(tmp_path):
    """A run that died before its first saved state blocks nothing; nor does its half-written args.json."""
    (tmp_path / "run").mkdir()
    for rest in "", '{"args":':
        (tmp_path / "run" / "args.json").write_text(rest)
        (tmp_path / "run" / "log.jsonl").write_text('{"event": "war')
    assert run("ppo_reft", tmp_path / "run").returncode == 0
    assert read_log(tmp_path / "run")[0]["event"] == "warmup"


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("damage, words", [
    (lambda out: cut_in_half(out / "state.pt"), ["state.pt"]),
    (lambda out: (out / "state.pt").write_text(""), ["state.pt"]),
    (lambda out: torch.save(None, out / "state.pt"), ["state.pt"]),
    (lambda out: (out / "args.json").write_text(""), ["args.json"]),
    (lambda out: (out / "args.json").write_text("[]"), ["args.json"]),
    (lambda out: cut_in_half(out / "args.json"), ["args.json"]),
    (lambda out: (out / "log.jsonl").unlink(), ["log.jsonl", "0 lines, 5"]),
    (lambda out: cut_in_half(out / "log.jsonl"), ["log.jsonl", "5 when the run was saved"]),
    (lambda out: shutil.rmtree(out / "warmup"), ["warmup"]),
])
def test_a_damaged_folder_is_refused_in_one_line(damage, words, folder, tmp_path):
    whole_run("ppo_reft", "reft", folder / "ppo_reft-reft")
    shutil.copytree(folder / "ppo_reft-reft", tmp_path / "run")
    damage(tmp_path / "run")
    refuse(run("ppo_reft", tmp_path / "run", "--resume"), *words)


def test_one_process_a_folder(tmp_path):
    first = start("ppo_reft", tmp_path / "run", "--train-size", "4000")
    while not (tmp_path / "run" / "args.json").exists():
        time.sleep(0.01)
    for flags in ([], ["--resume"]):
        refuse(run("ppo_reft", tmp_path / "run", "--train-size", "4000", *flags), "another process")
    first.kill(signal.SIGKILL)
    first.wait()
    (tmp_path / "run" / "log.jsonl").unlink()
    first = start("ppo_reft", tmp_path / "run", "--train-size", "4000")              # the lock died with its process
    while not (tmp_path / "run" / "log.jsonl").exists() and not first.ended():
        time.sleep(0.01)
    assert not first.ended()
    first.kill(signal.SIGTERM)
    assert first.wait().returncode == 128 + signal.SIGTERM


def test_the_command_to_go_on_can_be_pasted(tmp_path):
    out = tmp_path / "my runs" / "it's one"
    running = start("ppo_reft", out, "--train-size", "4000")
    while not (out / "log.jsonl").exists():
        time.sleep(0.01)
    running.kill(signal.SIGINT)
    words = shlex.split(running.wait().stderr.partition("go on with: ")[2])
    assert words[0] == "python" and words[-1] == "--resume" and words[words.index("--out") + 1] == str(out)


@pytest.mark.parametrize("which", ["train_data", "eval_data", "model"])
def test_resume_with_other_inputs_is_refused(which, checkpoint, tmp_path):
    flags = {"model": tmp_path / "model", "train_data": write(tmp_path / "train.jsonl", GSM),
             "eval_data": write(tmp_path / "test.jsonl", GSM[:9])}
    shutil.copytree(checkpoint, tmp_path / "model")
    whole = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)] + [
        "--iterations", "1", "--warmup-epochs", "1", "--batch-size", "4", "--minibatch-size", "4",
        "--max-new-tokens", "4", "--eval-size", "4"]
    result = run("ppo_reft", tmp_path / "run", *whole, tiny=False)
    assert result.returncode == 0 and "warning: 4 of 4 test questions" in result.stdout, result.stderr         # those of both files
    assert run("ppo_reft", tmp_path / "run", *whole, "--resume", tiny=False).returncode == 0
    if which == "model":
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))
    else:
        write(flags[which], GSM[1:])
    refuse(run("ppo_reft", tmp_path / "run", *whole, "--resume", tiny=False), f"--{which.replace('_', '-')}", "has changed")


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


GSM = [{"question": f"Ann has {i} pens and buys {i}. How many?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
       for i in range(30)]
REFT = [{"item_id": str(i), "question": f"Ann has {i} pens and buys {i}. How many?",
         "answer_cot": f"{i} + {i} = {2 * i}\n\nTherefore, the answer is <{2 * i}>.",
         "answer_value": f"{2 * i}.0"} for i in range(30)]


def write(path, records, form="lines"):
    path.write_text("\n".join(json.dumps(r) for r in records) if form == "lines" else json.dumps(records))
    return path


@pytest.mark.parametrize("form, records", [("lines", GSM), ("list", REFT)])
def test_files_of_both_forms_train(form, records, checkpoint, tmp_path):
    data = write(tmp_path / "data", records, form)
    result = run("ppo_reft", tmp_path / "run", "--model", checkpoint, "--train-data", data, "--eval-data", data,
                 "--iterations", "1", "--warmup-epochs", "1", "--batch-size", "8", "--minibatch-size", "8",
                 "--max-new-tokens", "16", "--eval-size", "8", tiny=False)
    assert result.returncode == 0, result.stderr


MATH = [{"problem": f"What is half of ${i}$?", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
         "answer": f"\\frac{{{i}}}{{2}}"} for i in range(30)]
SHORT = ["--iterations", "1", "--warmup-epochs", "1", "--batch-size", "4", "--minibatch-size", "16", "--max-new-tokens", "4"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_several_test_files_and_latex(script, checkpoint, tmp_path):
    """Each file of --eval-data has its own shares, and in prl.py its own avg@n and pass@k; answers may be of different kinds."""
    shutil.copytree(checkpoint, checkpoint := tmp_path / "model")                    # with room for the second turn's long prompt
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    files = write(tmp_path / "train.jsonl", MATH), write(tmp_path / "math.jsonl", MATH[:6]), write(tmp_path / "gsm.jsonl", GSM[:3])
    result = run(script, tmp_path / "run", "--model", checkpoint, "--train-data", files[0], "--eval-data", f"{files[1]},{files[2]}",
                 *SHORT, tiny=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    after = summary["after"]
    assert summary["problems"] == 9
    for name in ("accuracy", "strict_accuracy") + (("avg@8", "pass@1", "pass@8") if script == "prl" else ()):
        assert after[name] == pytest.approx((6 * after[f"math_{name}"] + 3 * after[f"gsm_{name}"]) / 9), name
    if script == "prl":
        assert after["right"] == after["math_right"] + " " + after["gsm_right"] and len(after["gsm_right"].split()) == 3
    files[2].write_text(json.dumps(GSM[4]))
    refuse(run(script, tmp_path / "run", "--model", checkpoint, "--train-data", files[0], "--eval-data", f"{files[1]},{files[2]}",
               *SHORT, "--resume", tiny=False), "--eval-data", "has changed")


@pytest.mark.parametrize("script, method", [case for case in CASES if case[1] in OWN])
def test_evaluate_only(script, method, folder, tmp_path):
    """The best checkpoint of a run: what the run found of it "after", in the same summary, and no weights."""
    trained, out = folder / f"{script}-{method}", tmp_path / "tested"
    whole_run(script, method, trained)
    result = run(script, out, "--model", trained / "model", "--evaluate-only")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in out.iterdir()} == {".lock", "args.json", "log.jsonl", "summary.json"}
    was, found = [json.loads((path / "summary.json").read_text()) for path in (trained, out)]
    assert found.keys() == was.keys() and found["before"] == found["after"] and found["problems"] == 8
    shared = found["after"].keys() & was["after"].keys()
    assert {"accuracy", "strict_accuracy", "truncated"} <= shared
    assert {name: found["after"][name] for name in shared} == {name: was["after"][name] for name in shared}
    assert [record["event"] for record in read_log(out)] == ["end"] and "warm-up" not in result.stdout
    assert f"evaluation: accuracy {found['after']['accuracy']:.3f} on 8 test problems;" in result.stdout
    assert "tokens/s" not in result.stdout
    refuse(run(script, out, "--model", trained / "model", "--evaluate-only"), "holds a run already")


@pytest.mark.parametrize("script, flags, more", [("ppo_reft", ["--vote-k", "3"], {"vote_3", "sampled_accuracy"}), ("r3", [], set()),
                                                 ("score", ["--vote-k", "2"], {"t1", "vote_4_parallel", "vote_2_corrected"}),
                                                 ("prl", ["--samples", "3"], {"avg@3", "pass@3", "gsm_pass@3"})])
def test_evaluate_only_needs_no_training_data_and_takes_whole_files(script, flags, more, checkpoint, tmp_path):
    shutil.copytree(checkpoint, checkpoint := tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    long = GSM[0] | {"answer": "0 + 0 = 0\n" * 200 + "#### 0"}                        # a solution that the context would not hold
    files = write(tmp_path / "gsm.jsonl", [long, *GSM[1:]]), write(tmp_path / "reft.json", REFT[:5], "list")
    command = ["--model", checkpoint, "--eval-data", f"{files[0]},{files[1]}", "--max-new-tokens", "4", "--evaluate-only", *flags]
    result = run(script, tmp_path / "run", *command, tiny=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["problems"] == 35 and more <= summary["after"].keys()
    result = run(script, tmp_path / "fewer", *command, "--eval-size", "3", tiny=False)
    assert result.returncode == 0 and json.loads((tmp_path / "fewer" / "summary.json").read_text())["problems"] == 6, result.stderr


def test_test_questions_known_from_training_are_counted(tmp_path, capsys):
    """Also where only blanks and capitals differ, and among the problems that are tested."""
    import ppo_reft as reft
    known = [{**GSM[3], "question": GSM[3]["question"].upper() + " "}, GSM[4], GSM[5]]
    fresh = [{**GSM[i], "question": f"New {i}?"} for i in range(5)]
    files = write(tmp_path / "train.jsonl", GSM), write(tmp_path / "test.jsonl", known + fresh)
    args = reft.Args(train_data=str(files[0]), eval_data=str(files[1]))
    assert len(reft.load_problems(args)[2]) == 8
    assert f"warning: 3 of 8 test questions are in {files[0]}" in capsys.readouterr().out
    reft.load_problems(dataclasses.replace(args, eval_size=1))
    assert "warning: 1 of 1 " in capsys.readouterr().out
    write(files[1], fresh)
    reft.load_problems(args)
    assert "warning" not in capsys.readouterr().out


def test_each_test_file_counts_for_itself(monkeypatch):
    import ppo_reft as reft
    problems = [{"prompt": [0] * n, "question": "", "set": name} for n, name in ((3, "a"), (1, "b"), (2, "a"))]
    monkeypatch.setattr(reft, "attempt", lambda policy, batch, *_: ({"accuracy": [len(p["prompt"]) for p in batch]}, ""))
    found = reft.evaluate(None, problems, None, reft.Args())
    assert (found["accuracy"], found["a_accuracy"], found["b_accuracy"]) == (2, 2.5, 1)


def test_test_files_of_one_name_are_told_apart(tmp_path):
    import ppo_reft as reft
    paths = [tmp_path / name / "test.jsonl" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        write(path, GSM[:2])
    tests = reft.read_tests(reft.Args(train_data="x", eval_data=f"{paths[0]},{paths[1]}"))
    assert [problem["set"] for problem in tests] == [str(path) for path in paths for _ in range(2)]


@pytest.mark.parametrize("flags, words", [
    (["--method", "grpo"], ["--method", "reft", "online-st"]),
    (["--kl", "k9"], ["k1", "exact"]),
    (["--kl-co", "1"], ["--kl-co"]),                                 # no flag by its beginning: --kl would be --kl-coef in prl.py
    (["--batch-size", "0"], ["--batch-size 0"]),
    (["--micro-batch-size", str(2 ** 31)], ["--micro-batch-size", "to 1000000000"]),
    (["--lam", "1.5"], ["--lam"]),
    (["--model", "x", "--out", "x"], ["--out", "--model"]),          # whose config.json would change
    (["--model", "x", "--train-data", "x", "--eval-data", "a/strict.jsonl,b.jsonl"], ["--eval-data", "strict"]),
    (["--model", "x", "--train-data", "x", "--eval-data", "a.jsonl,a_strict.jsonl"], ["--eval-data", "a_strict"]),
    (["--lr", "-1"], ["--lr"]),
    (["--lr", "nan"], ["--lr"]),
    (["--lr", "much"], ["--lr"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--warmup-epochs", "0"], ["--model"]),
    (["--model", "no/such/folder"], ["no/such/folder"]),
    (["--train-data", "x"], ["--eval-data"]),
    (["--model", "x", "--eval-data", "x"], ["--train-data"]),
    (["--evaluate-only"], ["--model"]),
    (["--model", "x", "--eval-data", "x", "--evaluate-only", "--vote-k", "2", "--rerank"], ["--rerank", "--train-data"]),
    (["--max-new-tokens", "5000"], ["context"]),
    (["--n-embd", "10"], ["--n-embd 10 --n-head 2"]),                # heads of 5: RoPE turns pairs
    (["--n-embd", "64", "--n-head", "3"], ["--n-head 3"]),
    (["--n-head", "32"], ["--n-head 32"]),
    (["--seed", "20250926113000"], ["--seed 20250926113000"]),
    (["--seed", str(2 ** 70)], ["--seed"]),
    (["--lr", "inf"], ["--lr inf"]),
    (["--grad-clip", "0"], ["--grad-clip 0"]),
    (["--rerank"], ["--vote-k"]),
    (["--train-size", "0"], ["--train-size 0"]),
    (["--shard"], ["--shard", "torchrun"]),
    (["--operations-low", "1", "--operations-high", "1", "--eval-size", "2000"], ["--operations-low", "found"]),
    (["--device", "cuda"], ["no GPU"]),
])
def test_impossible_flags_are_refused_and_nothing_is_written(flags, words, tmp_path):
    refuse(run("ppo_reft", tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_is_not_finite_says_after_which_iteration(tmp_path):
    """The update itself ends well: its loss is that of the weights before it."""
    result = run("ppo_reft", tmp_path / "run", "--method", "online-st", "--ppo-epochs", "1", "--lr", "1e15", "--eval-every", "1")
    assert result.returncode == 1 and "stopped: iteration 1: generate" in result.stderr, result.stderr


def test_a_question_without_a_prompt_is_refused():
    import ppo_reft as reft
    with pytest.raises(InputError, match="' ' gives an empty prompt"):
        reft.fits([{"question": " ", "prompt": [], "response": [1]}], None, reft.Args())


@pytest.mark.parametrize("out", ["file", "file/run", "/dev/null/run"])
def test_a_run_folder_that_cannot_be_made_is_refused(out, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(run("ppo_reft", tmp_path / out), "--out")
    assert (tmp_path / "file").read_text() == "" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disc_ends_a_run_in_one_line(monkeypatch, tmp_path):
    """It leaves no half-written file, and a screen that is a full disc does not matter."""
    import ppo_reft as reft
    def write(path):
        path.write_text("half")
        torch.save(torch.zeros(1000), "/dev/full")
    (tmp_path / "state.pt").write_text("before")
    with pytest.raises(OSError, match="state.pt: cannot be written"):
        reft.write_whole(tmp_path / "state.pt", write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    screens = []
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "wb", buffering=0))                     # any write fails
    monkeypatch.setattr(reft.tqdm, "write", lambda text: sys.stdout.write(text.encode()))
    monkeypatch.setattr(os, "dup2", lambda new, old: screens.append(old))
    reft.say("a line")
    assert screens == [sys.stdout.fileno()]
    result = run("ppo_reft", tmp_path / ("long" * 99), "--resume")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "File name too long" in result.stderr


@pytest.mark.parametrize("char, mark", [("\u2028", ""), ("\u2029", ""), ("\x85", ""), ("\x0c", ""), ("", "\ufeff")])
def test_lines_end_at_line_feeds_alone(char, mark, tmp_path):
    """JSON lines that hold Unicode's other line separators as such, or begin with a byte order mark."""
    import ppo_reft as reft
    records = [{"question": f"A{char}b?", "answer": f"{i}\n#### {i}"} for i in range(3)]
    text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records).replace("\\f", char)
    (tmp_path / "data").write_text(mark + text.replace("\x0c", "\\f"), encoding="utf-8", newline="")
    assert [record["question"] for _, record in reft.read_records(tmp_path / "data")] == [f"A{char}b?"] * 3
    (tmp_path / "list").write_text(mark + json.dumps(records), encoding="utf-8")
    assert [record for _, record in reft.read_records(tmp_path / "list")] == records


@pytest.mark.parametrize("text, words", [
    ("", ["holds no records"]),
    ('{"question": "a", "answer": "b\\n#### 1"}\n{"question": ', [":2: not JSON"]),
    ('[{"question": "a"', ["not JSON"]),
    ('{"question": "a", "answer": "b\\n#### 1"}\n' + "9" * 5000, [":2: not JSON", "5000 digits"]),
    ('{"question": "a", "answer": "b\\n#### 1"}\n' + "[" * 99999, [":2: not JSON", "recursion"]),
    ('{"question": "a", "answer": "b"}', [":1:", "neither GSM8K's form"]),
    ('{"answer": "b\\n#### 1"}', [":1:", "question"]),
    ('{"question": "a", "answer": "b\\n#### 1"}\n{"question": "a", "answer": "b\\n#### many"}', [":2:", "'many'"]),
    ('[{"question": "a", "answer_cot": "b", "answer_value": "1"}, 7]', ["record 2"]),
    ('{"question": "a", "answer_cot": "b", "answer_value": [1]}', [":1:", "neither GSM8K's form"]),
    ('{"question": "a", "answer_cot": ["b"], "answer_value": "1"}', [":1:", "neither GSM8K's form"]),
    ("\n".join(json.dumps(r) for r in GSM).replace("Ann", "Änne"), ["Ä"]),
    ("\n".join(json.dumps(r | {"question": r["question"] * 9}) for r in GSM), ["context"]),
])
def test_bad_data_is_refused_with_its_line(text, words, checkpoint, tmp_path):
    (tmp_path / "train.jsonl").write_text(text)
    good = write(tmp_path / "good.jsonl", GSM)
    result = run("ppo_reft", tmp_path / "run", "--model", checkpoint, "--train-data", tmp_path / "train.jsonl", "--eval-data", good)
    refuse(result, *words)
    assert not (tmp_path / "run").exists()
    refuse(run("ppo_reft", tmp_path / "run", "--model", checkpoint, "--train-data", tmp_path / "none", "--eval-data", good),
           "none: cannot be read")


def test_the_commands_of_readme_are_accepted():
    """Every flag of the recipes exists and fits to the others."""
    part = (ROOT / "README.md").read_text().partition("## Real models and data")[2].partition("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    python (.*)$", part.replace("\\\n", " "), re.M)]
    assert len(commands) == 9
    for script, *flags in commands:
        args = importlib.import_module(script[:-3]).parse_args(flags)
        assert args.model == "FOLDER" and args.eval_size == 0
    assert {command[0] for command in commands} == {f"{script}.py" for script in SCRIPTS}


# ---- promises about the log --------------------------------------------------------------------------------------------------

def test_warning_after_ten_iterations_without_signal(tmp_path, capsys):
    import ppo_reft as reft
    args = reft.Args(out=str(tmp_path), iterations=40)
    state = {"seconds": 0.0, "tokens": 0, "log_lines": 0, "flat": 0, "rollouts": 0, "flops": 0.0,
             "phases": dict.fromkeys(reft.PHASES, 0.0)}
    for iteration in range(1, 11):
        assert "nothing to learn from" not in capsys.readouterr().out
        reft.finish_iteration({"no_signal": 1.0, "tokens": 5}, iteration, state, args)
    assert "nothing to learn from" in capsys.readouterr().out


NOTHING = {"log_lines": 0, "seconds": 0.0, "tokens": 0, "rollouts": 0, "flat": 0, "flops": 0.0}


def test_seconds_by_phase(tmp_path, capsys):
    """A phase within another counts as the outer one, whatever ends it; evaluating and saving are no training time."""
    import ppo_reft as reft
    state = NOTHING | {"phases": dict.fromkeys(reft.PHASES, 0.0)}
    reft.lap(state)
    with reft.phase("evaluate"):
        for name in "generate", "check":
            with pytest.raises(KeyError), reft.phase(name):
                time.sleep(0.05)
                raise KeyError
    with reft.phase("update"):
        time.sleep(0.02)
    time.sleep(0.01)
    reft.finish_iteration({"tokens": 6, "rollouts": 2}, 1, state, reft.Args(out=str(tmp_path)))
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert list(record["phases"]) == ["generate", "check", "score", "update", "evaluate", "save"]
    assert record["phases"]["generate"] == record["phases"]["check"] == record["phases"]["score"] == record["phases"]["save"] == 0
    assert 0.1 <= record["phases"]["evaluate"] < 0.2 and 0.02 <= record["phases"]["update"] < record["seconds"] - 0.009 < 0.1
    assert record["tokens_per_second"] == pytest.approx(6 / record["seconds"], rel=1e-4)
    bill = reft.bill(state)
    assert bill["rollouts_per_second"] == pytest.approx(2 / record["seconds"], rel=0.01) and "mfu" not in bill
    reft.finish_iteration({"loss": 0.5}, 2, state, reft.Args(out=str(tmp_path)))                 # supervised: nothing is sampled
    assert "tokens_per_second" not in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
    first, second = capsys.readouterr().out.splitlines()
    assert " tok/s  ETA " in first and "tok/s" not in second and "loss 0.5  ETA " in second


@pytest.mark.parametrize("script, method", [case for case in CASES if case[1] in OWN])
def test_every_line_says_what_it_cost(script, method, folder):
    out = folder / f"{script}-{method}"
    printed, _ = whole_run(script, method, out)
    warmup, *iterations, end = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert warmup["phases"]["update"] > 0 and warmup["phases"]["evaluate"] > 0 == warmup["phases"]["generate"]
    assert end["phases"]["evaluate"] > 0 == end["phases"]["generate"]
    for record in iterations:
        training = sum(record["phases"][name] for name in ("generate", "check", "score", "update"))
        assert 0 < training <= record["seconds"] + 1e-3 and record["phases"]["generate"] > 0 < record["phases"]["update"]
        assert (record["phases"]["evaluate"] > 0) == (record["iteration"] in (1, 3))              # 1: of 0, the start
        assert record["phases"]["save"] > 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rollouts_per_second"] > 0 < summary["tokens_per_second"] and summary["seconds"] == pytest.approx(
        sum(record["seconds"] for record in iterations), abs=0.01)
    for name, value in summary["phases"].items():
        assert value == pytest.approx(sum(r["phases"][name] for r in (warmup, *iterations, end)), abs=0.06), name
    assert f"seconds: generate {summary['phases']['generate']}" in printed
    assert f"{summary['rollouts_per_second']} rollouts/s" in printed


def test_flops_of_an_update_and_the_share_of_the_peak(checkpoint, monkeypatch):
    """Two rows of 5 and 3 tokens, of which 3 and 1 are trained, through one block of width 16 and a vocabulary of V."""
    import ppo_reft as reft
    gpt = reft.load_checkpoint(checkpoint)[0]
    blocks, vocabulary = sum(p.numel() for name, p in gpt.named_parameters() if "blocks" in name), gpt.config.vocab_size
    batch = reft.pack([([1] * 5, [False] * 2 + [True] * 3), ([1] * 3, [False] * 2 + [True])], gpt)
    state = NOTHING | {"phases": dict.fromkeys(reft.PHASES, 0.0)}
    reft.lap(state)
    before = state["flops"]                                          # of what other tests left behind
    reft.optimiser_step(functools.partial(reft.sft_loss, gpt), batch, reft.adamw([gpt], 1e-3), reft.Args(micro_batch_size=1))
    with torch.no_grad():
        reft.sampled(gpt, batch)                                     # no training
    reft.lap(state)
    assert state["flops"] - before == 6 * (8 * blocks + 4 * 16 * vocabulary + 16 * (5 ** 2 + 3 ** 2))
    for name, peak in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L40S": 362e12,
                       "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GeForce RTX 4090": 165e12,
                       "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA L40": None, "NVIDIA A10G": None,
                       "NVIDIA GH200 480GB": None, "NVIDIA L4": 121e12, "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        busy = state | {"peak_gib": 1.2345, "flops": 989e12, "phases": state["phases"] | {"update": 2.0}}
        bill = reft.bill(busy)
        assert bill["peak_gib"] == 1.23 and bill.get("mfu") == (peak and round(989e12 / 2 / peak, 4))


def test_a_gpu_without_bf16_is_left_alone(monkeypatch):
    import ppo_reft as reft
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for capability, device in ((7, 5), "cpu"), ((8, 0), "cuda"), ((12, 0), "cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert reft.parse_args([]).device == device
    assert used == [0, 0] and reft.parse_args(["--device", "cpu"]).device == "cpu" and len(used) == 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(InputError, match="--device cuda: this GPU does not compute in bf16"):
        reft.parse_args(["--device", "cuda"])


def test_demonstrations_longer_than_responses_are_counted_at_the_start(capsys):
    import ppo_reft as reft
    args = reft.Args(device="cpu", train_size=200, eval_size=5)
    train = reft.prepare(args)[2]
    assert "warning" not in capsys.readouterr().out
    longer = sum(len(problem["response"]) > 30 for problem in train)
    reft.prepare(dataclasses.replace(args, max_new_tokens=30))
    assert 0 < longer < 200
    assert f"warning: {longer} of 200 demonstrations are longer than --max-new-tokens 30" in capsys.readouterr().out


def test_truncated_share_is_red_above_a_fifth(capsys, monkeypatch):
    import ppo_reft as reft
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False), monkeypatch.setenv("TERM", "xterm")
    state = {"seconds": 1.0, "phases": {"evaluate": 1.0, "save": 1.0}}
    record = {"iteration": 1, "truncated": 0.21, "unparsed": 0.5, "tokens_per_second": 1.0}
    reft.show(record, state, reft.Args())
    reft.show(record | {"truncated": 0.19}, state, reft.Args())
    first, second = capsys.readouterr().out.splitlines()
    assert "\033[31mcut 0.21" in first and "unread 0.5" in first and "\033[31m" not in second
    for name, value in ("NO_COLOR", "1"), ("TERM", "dumb"):
        with monkeypatch.context() as plain:
            plain.setenv(name, value)
            reft.show(record, state, reft.Args())
            assert "cut 0.21" in (out := capsys.readouterr().out) and "\033[" not in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_explains_the_line(script):
    text = " ".join((ROOT / "README.md").read_text().split())
    for key, name in importlib.import_module(script).SHOWN.items():
        assert f"`{key}`" in text and (key == name or re.search(rf"`{key}`(?: is)? {name}\b", text)), key


def test_the_log_keeps_small_numbers(tmp_path):
    import ppo_reft as reft
    reft.write_log({"lr": 3e-7, "kl": 1.23456789e-9, "long": 12.3456789, "none": math.nan},
                   {"log_lines": 0}, reft.Args(out=str(tmp_path)))
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"lr": 3e-7, "kl": 1.23457e-9, "long": 12.3457, "none": None}


def test_screens_of_all_kinds(checkpoint, tmp_path):
    """A screen that is not UTF-8, closed, or read by `head`, and a notebook's MPLBACKEND: the run goes on and ends well."""
    records = [r | {"question": r["question"].replace("Ann has", "Ann~s tab:")} for r in GSM]
    data = write(tmp_path / "data.jsonl", records)
    flags = ["--model", checkpoint, "--train-data", data, "--eval-data", data, "--warmup-epochs", "1", "--iterations", "1",
             "--batch-size", "4", "--minibatch-size", "4", "--max-new-tokens", "4", "--eval-size", "2", "--device", "cpu"]
    command = lambda name: shlex.join(map(str, [sys.executable, ROOT / "ppo_reft.py", *flags, "--out", tmp_path / name]))
    environment = os.environ | NO_GPU | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"}
    lines = [command("closed") + " >&- 2>&-", "set -o pipefail; " + command("piped") + " | head -n 1"]
    running = [subprocess.Popen(["bash", "-c", line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for line in lines]
    for process, name in zip(running, ("closed", "piped")):
        _, errors = process.communicate()
        assert process.returncode == 0 and not errors and (tmp_path / name / "summary.json").exists(), (name, errors)


def test_curves_have_legends_and_the_warm_up(monkeypatch, tmp_path):
    import ppo_reft as reft
    records = [{"event": "warmup", "accuracy": 0.5, "steps": 8},
               {"event": "iteration", "iteration": 1, "accuracy": 0.25, "explained_variance": None},
               {"event": "iteration", "iteration": 2, "accuracy": 0.5, "dev_accuracy": 0.75, "kl": 0.1}]
    write(tmp_path / "log.jsonl", records)
    pictures, figure = [], reft.figure
    monkeypatch.setattr(reft, "figure", lambda *size: pictures.append(figure(*size)) or pictures[0])
    reft.plot(reft.Args(out=str(tmp_path)))
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in pictures[0].axes]
    assert legends == [["accuracy", "accuracy: warm-up, test", "dev_accuracy"], ["kl"], ["explained_variance"]]
    star = next(line for line in pictures[0].axes[0].lines if "warm-up" in line.get_label())
    assert star.get_xydata().tolist() == [[0, 0.5]]


def test_the_screen_of_a_notebook(monkeypatch):
    """%run puts a stream of its own in place of stdout and stderr, without what a real one has."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    monkeypatch.setattr(sys, "argv", ["ppo_reft.py", "--lr", "much"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "ppo_reft.py"), run_name="__main__")
    assert "error: argument --lr: invalid float value: 'much'" in sys.stderr.getvalue()


def test_a_notebook_goes_on_with_a_run_and_gets_its_signals_back(tmp_path, monkeypatch):
    """%run twice in one process: the folder's lock is free again, and Ctrl-C interrupts a cell as before."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for more in ["--iterations", "1"], ["--iterations", "2", "--resume"]:
        monkeypatch.setattr(sys, "argv", ["ppo_reft.py", *TINY, "--out", str(tmp_path / "run"), *more])
        runpy.run_path(str(ROOT / "ppo_reft.py"), run_name="__main__")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [r["iteration"] for r in read_log(tmp_path / "run") if r["event"] == "iteration"] == [1, 2]


def test_builtin_problems_are_right_each_seed_has_its_own_test_and_the_splits_are_apart():
    import ppo_reft as reft
    splits = reft.load_problems(reft.Args(train_size=3000, eval_size=300))
    questions = [{p["question"] for p in split} for split in splits]
    assert not any(a & b for a, b in itertools.combinations(questions, 2))
    train, dev, test = reft.load_problems(reft.Args(train_size=3000, eval_size=300, seed=5))
    assert dev == splits[1] and len({p["question"] for p in test} & questions[2]) < 20 and test != splits[2]
    assert len({p["question"] for p in train} & questions[0]) > 0.95 * len(questions[0])         # all but what a test asks
    for problem in sum(splits, []):
        chain = re.fullmatch(r"What is ([\d +-]+)\?", problem["question"])[1]
        assert eval(chain) == problem["gold"]
        for line in problem["cot"].splitlines():
            left, right = line.split(" = ")
            assert eval(left) == int(right)


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_gets_the_numbers_of_the_log(script, monkeypatch, tmp_path):
    """Of each line, those of a list or dict by place; a resumed run puts aside what followed the log's last line. Without the
    package: one line."""
    module, events, written = importlib.import_module(script), types.ModuleType("torch.utils.tensorboard"), []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))
            self.add_scalar, self.flush = lambda *point: written.append(point), lambda: None

    monkeypatch.setattr(events, "SummaryWriter", SummaryWriter, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", events)
    args, state = module.Args(out=str(tmp_path), tensorboard=True, iterations=3), {"log_lines": 0}
    (tmp_path / "log.jsonl").write_text("")
    for record in ({"event": "warmup", "accuracy": 0.5},
                   {"event": "iteration", "iteration": 1, "kl": 0.25, "clip_frac": [0.0, 0.125], "sample": "a",
                    "phases": {"check": 0.5}},
                   {"event": "end", "accuracy": 0.75}):
        module.write_log(record, state, args)
    points = [("test/accuracy", 0.5, 0), ("iteration", 1, 1), ("kl", 0.25, 1), ("clip_frac/0", 0.0, 1), ("clip_frac/1", 0.125, 1),
              ("phases/check", 0.5, 1), ("test/accuracy", 0.75, 3)]
    assert written == [("events", 0), *points]
    module.event_writer.cache_clear(), written.clear()
    module.write_log({"event": "iteration", "iteration": 2, "kl": 0.5}, state, args)
    assert written == [("events", 2), ("iteration", 2, 2), ("kl", 0.5, 2)]
    module.event_writer.cache_clear(), written.clear()
    module.write_log({"event": "iteration", "iteration": 3}, state, dataclasses.replace(args, tensorboard=False))
    assert not written
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(module.InputError, match="--tensorboard.*pip install tensorboard"):
        module.parse_args(["--tensorboard"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_data_from_files_take_the_papers_defaults(script, capsys):
    """Of a pair the first for the built-in problems, also with a checkpoint, the second with --train-data; what is said counts."""
    module = importlib.import_module(script)
    pairs = {f.name: f.default for f in dataclasses.fields(module.Args) if isinstance(f.default, tuple)}
    assert pairs.keys() >= {"lr", "warmup_lr", "max_new_tokens", "iterations", "batch_size", "minibatch_size", "train_size"}
    assert pairs["lr"][1] == {"ppo_reft": 3e-7, "r3": 3e-7, "score": 5e-6, "prl": 1e-6}[script]
    files = ["--model", "x", "--train-data", "x", "--eval-data", "x"]
    for argv, which in ([], 0), (["--model", "x"], 0), (files, 1):
        args = module.parse_args(argv)
        assert {name: getattr(args, name) for name in pairs} == {name: pair[which] for name, pair in pairs.items()}
    args = module.parse_args([*files, "--lr", "5e-4", "--train-size", "7"])
    assert (args.lr, args.train_size, args.max_new_tokens) == (5e-4, 7, pairs["max_new_tokens"][1])
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    shown = "".join(capsys.readouterr().out.split())                         # which argparse wraps, also at a hyphen
    assert all(f"(default:{toy};with--train-data{paper})" in shown for toy, paper in pairs.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_for_a_checkpoint_works_as_printed(script, tmp_path):
    """The command in the script's docstring, its three names put in; cut short, and on a checkpoint with room for its tokens."""
    from model import GPT, GPTConfig, Tokenizer, save_checkpoint
    tokenizer = Tokenizer.from_pieces([chr(i) for i in range(32, 127)] + ["\n"])
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, max_len=4096,
                       eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    gpt = GPT(config)
    with torch.no_grad():                                            # so that a response ends soon
        gpt.embed += 0.3
        gpt.embed[config.eos_id] = 0.45
    save_checkpoint(tmp_path / "FOLDER", gpt, tokenizer)
    for name in "train.jsonl", "test.jsonl":
        write(tmp_path / name, GSM)
    words = re.search(rf"^    python {script}.py (--model FOLDER .*)$", (ROOT / f"{script}.py").read_text(), re.M)[1].split()
    flags = [str(tmp_path / word) if word[0] != "-" else word for word in words]
    flags += ["--samples", "2"] if script == "prl" else []
    result = run(script, tmp_path / "run", *flags, "--iterations", "1", "--batch-size", "1",
                 "--train-size", "2", "--eval-size", "1", tiny=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["max_new_tokens"] >= 400


def test_train_size_limits_the_rows_of_a_file(tmp_path):
    import ppo_reft as reft
    flags = dict(model="x", train_data=write(tmp_path / "data", GSM), eval_data=str(tmp_path / "data"))
    whole, few = reft.load_problems(reft.Args(**flags)), reft.load_problems(reft.Args(**flags, train_size=5))
    assert [len(split) for split in whole] == [27, 3, 30] and [len(split) for split in few] == [5, 3, 30]
    assert few[1:] == whole[1:] and all(problem in whole[0] for problem in few[0]) and few[0] != whole[0][:5]
    assert few == reft.load_problems(reft.Args(**flags, train_size=5, seed=1))
    assert len(reft.load_problems(reft.Args(**flags, train_size=500))[0]) == 27
