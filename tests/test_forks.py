"""README's "Forking": its two patches fit prl.py as it stands, run in a folder of their own, and do what they say."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from processes import ROOT
from test_scripts import read_log, run


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(name): (the patched prl.py as a module, its folder)."""
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        shutil.copyfile(ROOT / "prl.py", folder / "prl.py")
        applied = subprocess.run(["git", "apply", ROOT / "tests" / "forks" / f"{name}.patch"],
                                 cwd=folder, capture_output=True, text=True)
        assert applied.returncode == 0, applied.stderr
        spec = importlib.util.spec_from_file_location(f"prl_{name.replace('-', '_')}", folder / "prl.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module                              # dataclasses look there
        spec.loader.exec_module(module)
        return module, folder
    return made


def finish(folder, *flags):
    """Runs the fork; its log's iterations and its summary."""
    result = run(str(folder / "prl"), folder / "run", "--demonstrations", "64", "--samples", "8", *flags)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return [record for record in read_log(folder / "run") if record["event"] == "iteration"], summary


def test_a_new_advantage(fork):
    """Dr. GRPO: r - mean of its group, each token by rows times longest response; the other methods as before."""
    module, folder = fork("dr-grpo")
    args = module.Args(method="dr-grpo", group_size=4, minibatch_size=4, batch_size=1, max_new_tokens=10)
    outcomes, mask = torch.tensor([1.0, 0, 0, 0]), torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    newline, tokens = torch.zeros(9, dtype=torch.bool), torch.ones(4, 3, dtype=torch.long)
    weights = module.token_advantages(outcomes, torch.rand(4, 2), tokens, mask, newline, args)[0]
    assert torch.equal(weights, torch.tensor([[0.75, 0.75], [-0.25, 0], [-0.25, -0.25], [-0.25, -0.25]]))
    torch.manual_seed(0)
    policy = module.GPT(module.GPTConfig(vocab_size=9, n_layer=1, n_head=2, n_embd=8, max_len=8, eos_id=0, pad_id=0))
    data = {"tokens": tokens, "response_mask": mask, "advantages": weights}
    data["old_logprobs"] = module.token_stats(policy, policy, data, args)["old_logprobs"]
    loss, _ = module.loss_fn(policy, args, data, data)
    assert loss.item() == pytest.approx(-(0.75 * 2 - 0.25 * 5) / (4 * 10))           # the ratio is 1
    grpo = module.group_advantages(outcomes, 4)
    assert grpo[0].item() == pytest.approx(0.75 / (0.5 + 1e-6)) and module.Args(method="grpo").agg == "token"
    log, summary = finish(folder, "--method", "dr-grpo")
    assert len(log) == 3 and summary["method"] == "dr-grpo"


def test_a_new_task_with_its_own_verifier(fork):
    """Countdown: any expression of the numbers counts, and nothing else does; the warm-up's demonstrations do."""
    module, folder = fork("countdown")
    flags = re.search(r"python prl.py (--operations-low .*) --out", (ROOT / "README.md").read_text())[1].split()
    args = module.parse_args([*flags, "--train-size", "300", "--eval-size", "20"])
    problem = {"numbers": [2, 7, 2], "gold": 7.0}
    say = lambda expression: module.reward(module.read_answers([f"2 + 7 + 2 = 11{module.ANSWER}{expression}"], [problem], args),
                                           [problem], args).item()
    assert [say(text) for text in ("2 + 7 - 2", "7 + 2 - 2", "2 - 2 + 7")] == [1, 1, 1]
    assert [say(text) for text in ("7", "2 + 7 + 2", "7 + 2 - 2 ", "14 - 7", "2 + 7 - 2 + 0",
                                   "2+7-2", "x", "", "- 2 + 7 + 2")] == [0] * 9
    assert module.read_answers(["2 + 7 - 2"], [problem], args) == [None]             # announced by nothing
    tokenizer = module.builtin_tokenizer(args)
    train, dev, test = module.load_problems(args)
    assert len({p["question"] for p in dev + test}) == len(dev + test) == 40
    for p in map(lambda p: module.encode_problem(p, tokenizer, args), train + dev + test):
        text = tokenizer.decode(p["response"][:-1])
        assert len(p["response"]) <= args.max_new_tokens, text
        assert module.reward(module.read_answers([text], [p], args), [p], args).item() == 1, text
        *lines, last = p["cot"].splitlines()
        assert all(eval(line.replace("=", "==")) for line in [*lines, last])
        assert eval(last.split("=")[1]) == p["gold"] and not any(eval(line.split("=")[1]) == p["gold"] for line in lines)
        assert [int(n) for n in re.findall(r"\d+", p["question"])] == [p["gold"], *p["numbers"]]
    log, summary = finish(folder, *flags)
    assert len(log) == 3 and 0 <= summary["after"]["accuracy"] <= 1


def test_readme_shows_the_patches_commands():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "tests" / "forks").iterdir():
        assert f"git apply tests/forks/{path.name}" in text
        added = [line for line in path.read_text().splitlines() if line.startswith("+") and not line.startswith("+++")]
        assert f"{len(added)} lines" in text, (path.name, len(added))
