"""Several processes, as torchrun starts them, with gloo on the CPU: one update is that of one process; kills, resumes, refusals."""
import contextlib
import functools
import importlib
import json
import math
import os
import shutil
import signal
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from model import load_checkpoint
from processes import ROOT, Running, code_of, fork
from test_scripts import MORE, TINY, assert_same_run, lines_of, read_log, weights


@contextlib.contextmanager
def torchrun(ranks):
    """[the environment that torchrun gives to each of its processes], with the store that its own process keeps for them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
              "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    yield [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    del store


def start(script, environments, out, *flags):
    argv, running = [str(flag) for flag in (*TINY, *MORE.get(script, []), "--out", out, *flags)], []
    for environment in environments:
        with mock.patch.dict(os.environ, environment):
            running.append(Running(script, argv))
    return running


def run(script, ranks, out, *flags):
    with torchrun(ranks) as environments:
        return [process.wait() for process in start(script, environments, out, *flags)]


def check(results):
    """All ended well, and the first alone has spoken."""
    assert [result.returncode for result in results] == [0] * len(results), [result.stderr for result in results]
    assert results[0].stdout and not any(result.stdout or result.stderr for result in results[1:])


# ---- one update --------------------------------------------------------------------------------------------------------------

SMALL = ["--train-size", "40", "--eval-size", "9", "--batch-size", "7", "--micro-batch-size", "2", "--max-new-tokens", "10",
         "--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--device", "cpu", "--lr", "0.01"]
GROUPS = ["--group-size", "3", "--batch-size", "3"]
CASES = {"reft": ("ppo_reft", 0, []), "r3": ("r3", 0, []), "prl": ("prl", 0, GROUPS), "score, stage I": ("score", 1, GROUPS),
         "reft, exact KL": ("ppo_reft", 0, ["--kl", "exact", "--value", "separate", "--minibatch-size", "3"]),
         "prl, KL loss": ("prl", 0, [*GROUPS, "--method", "grpo-kl-loss", "--agg", "const"]),
         "score, stage II": ("score", 2, [*GROUPS, "--offline-fraction", "0.5", "--norm-std", "joint"])}
SHARDED = ("reft, exact KL", "r3", "prl, KL loss", "score, stage II")            # with --shard, too


def imported(script):
    """The script's module, run again: the clean process has imported it without RANK and WORLD_SIZE, and its forks hold that."""
    module = importlib.import_module(script)
    exec(code_of(ROOT / f"{script}.py"), vars(module))
    return module


def update_once(script, stage, flags, file, links):
    """What a process has after one update on the rollout in file, which is made where there is none."""
    module = imported(script)
    module.LINKS = links
    args = module.parse_args([*SMALL, *flags])
    _, tokenizer, train, _, _ = module.prepare(args)
    policy = module.initial_policy(args)[0]
    torch.manual_seed(1)
    ref = policy.frozen()
    for p in ref.parameters():                         # a reference that is not the policy: the KL counts
        p.data += 0.05 * torch.randn_like(p)
    critic = ()
    if script in ("ppo_reft", "r3"):
        critic = (module.add_critic(policy, args),)
        torch.nn.init.normal_(critic[0].value_head.weight, std=0.1)
    module.spread([policy, *critic, ref], args)
    optimizer = module.adamw([policy, *critic], args.lr)
    optimizer.param_groups[0]["eps"] = 1e-4            # Adam's own, 1e-8, makes steps of the last bits of a gradient next to 0
    batch, stages = [p | {"stage": 0} for p in train[:args.batch_size]], [stage] if stage else []
    if not file.exists():
        with mock.patch.object(module, "reward", lambda answers, *_: torch.arange(len(answers)) % 3 / 2):
            data = module.rollout(policy, *critic, ref, batch, *stages, tokenizer, args)[0]
        gap = {name: x + torch.rand(x.shape) for name, x in data.items() if name == "sampled_logprobs"}
        torch.save(data | gap, file)
    data = torch.load(file)
    stats = module.token_stats(policy, ref, data, args, *critic)
    parts = {"prl": (policy, args), "score": (policy, ref)}.get(script, (policy, *critic, ref, args))
    torch.manual_seed(2)
    log = getattr(module, "update", module.optimiser_step)(functools.partial(module.loss_fn, *parts), data, optimizer, args)
    cost = {"phases": dict.fromkeys(module.PHASES, 0.0), "flops": 0.0}
    module.lap(cost)
    log |= {"flops": cost["flops"]}
    state = {f"{i} {name}": module.whole(p) for i, model in enumerate((policy, *critic)) for name, p in model.state_dict().items()}
    respond = functools.partial(module.respond, policy, tokenizer=tokenizer, args=args, temperature=0)
    twins = module.respond(policy, [train[0] | {"question": str(i)} for i in range(6)], tokenizer, args)[1]
    return state, stats, log, respond([*train[:5], *train[4:6]], group_size=2), respond(train[:1]), twins, torch.rand(())


def all_updates(environment, folder):
    """In a process of its own."""
    os.environ.update(environment)
    module = imported("ppo_reft")
    module.connect()
    found = {name: update_once(*case, folder / f"{name}.pt", module.LINKS) for name, case in CASES.items()}
    for name in SHARDED if module.RANKS > 1 else ():
        script, stage, flags = CASES[name]
        found[f"{name}, sharded"] = update_once(script, stage, [*flags, "--shard"], folder / f"{name}.pt", module.LINKS)
    torch.save(found, folder / f"{module.RANKS} {module.RANK}.pt")
    module.disconnect()


@pytest.fixture(scope="module")
def updated(tmp_path_factory):
    """What one process found, and what each of three."""
    folder, found = tmp_path_factory.mktemp("updates"), []
    for ranks in 1, 3:
        with (torchrun(ranks) if ranks > 1 else contextlib.nullcontext([{}])) as environments:
            processes = [fork(all_updates, environment, folder) for environment in environments]
            [process.start() for process in processes], [process.join() for process in processes]
        assert not any(process.exitcode for process in processes)
        found.append([torch.load(folder / f"{ranks} {rank}.pt") for rank in range(ranks)])
    return found


def close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        here, there = torch.as_tensor(a[name]), torch.as_tensor(b[name])
        torch.testing.assert_close(here, there, rtol=1e-5, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", [*CASES, *(f"{name}, sharded" for name in SHARDED)])
def test_an_update_of_several_processes_is_that_of_one(case, updated):
    """Weights to 1e-6, and all that is computed with rows or sampled: scores, logged means, FLOPs, greedy responses, random state
    after."""
    alone, found = updated[0][0][case.removesuffix(", sharded")], [process[case] for process in updated[1]]
    for state, stats, log, greedy, few, twins, after in found:
        close(state, alone[0], 1e-6), close(stats, alone[1], 1e-6), close(log, alone[2], 1e-6)
        for here, there in (greedy, alone[3]), (few, alone[4]):
            assert here[1:] == there[1:]
            close(here[0], there[0], 1e-5)
        assert all(torch.equal(p, found[0][0][name]) for name, p in state.items())           # one another's to the bit
        assert len({tuple(twins[i:i + 2]) for i in (0, 2, 4)}) == 3              # each process has draws of its own
    assert len({float(after) for *_, after in found}) == 1                       # what they draw together stays the same


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_a_group_is_never_split(ranks, monkeypatch):
    import score
    problems = [{"question": question, "n": n} for n, question in enumerate("aaabbbcccdddeefffff")]
    monkeypatch.setattr(score, "RANKS", ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(score, "RANK", rank)
        shares.append(score.share(problems))
    assert sum(shares, []) == problems
    groups = [len({p["question"] for p in part}) for part in shares]
    assert sum(groups) == 6 and max(groups) == math.ceil(6 / ranks)


# ---- whole runs --------------------------------------------------------------------------------------------------------------

@functools.lru_cache(None)
def whole_run(script, folder):
    results = run(script, 2, folder)
    check(results)
    return results[0].stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("script", ["ppo_reft", "r3", "score", "prl"])
def test_a_run_of_two_writes_one_folder(script, folder):
    out = folder / script
    printed = whole_run(script, out)
    written = {p.name for p in out.iterdir()} - {"stages.png", "passk.png", "turns.png"}
    assert written == {".lock", "args.json", "log.jsonl", "summary.json", "curves.png", "model", "warmup", "state.pt"}
    log = read_log(out)
    assert [r["event"] for r in log] == ["warmup", "iteration", "iteration", "iteration", "end"]
    assert printed.count("\niteration ") == 3


def wait_for(out, lines, running):
    began = time.time()
    while lines_of(out) < lines and not any(process.ended() for process in running) and time.time() < began + 60:
        time.sleep(0.003)


@pytest.mark.parametrize("killed", [[0], [0, 1]])
def test_killed_processes_end_the_run_and_it_goes_on(killed, folder, tmp_path):
    """kill -9 of one, or all, in the second iteration: the others end within seconds, with one line; then --resume with as many:
    log and weights bit for bit as if nothing had happened."""
    whole_run("ppo_reft", folder / "ppo_reft")
    out = tmp_path / "run"
    with torchrun(2) as environments:
        running = start("ppo_reft", environments, out)
        wait_for(out, 2, running)
        for rank in killed:
            running[rank].kill(signal.SIGKILL)
        began = time.time()
        results = [process.wait() for process in running]
    assert time.time() < began + 5
    for rank, result in enumerate(results):
        lines = result.stderr.splitlines()
        assert (result.returncode, len(lines)) == ((-9, 0) if rank in killed else (1, 1)), result.stderr
        assert all("another process of this run has ended" in line for line in lines)
    check(run("ppo_reft", 2, out, "--resume"))
    assert_same_run(folder / "ppo_reft", out)


def test_a_signal_to_one_process_stops_all_at_the_same_step(folder, tmp_path):
    """And the run goes on: with one process from the same weights and optimiser, with two as if nothing had happened."""
    whole_run("ppo_reft", folder / "ppo_reft")
    out = tmp_path / "run"
    with torchrun(2) as environments:
        running = start("ppo_reft", environments, out)
        wait_for(out, 2, running)
        running[1].kill(signal.SIGTERM)
        results = [process.wait() for process in running]
    assert [result.returncode for result in results] == [128 + signal.SIGTERM] * 2
    said = "".join(result.stderr for result in results)
    assert "torchrun --nproc-per-node 2" in said and len(said.splitlines()) == 1
    shutil.copytree(out, tmp_path / "alone")
    before = read_log(out)
    check(run("ppo_reft", 2, out, "--resume"))
    assert_same_run(folder / "ppo_reft", out)
    check([Running("ppo_reft", [*TINY, "--out", str(tmp_path / "alone"), "--resume"]).wait()])
    assert read_log(tmp_path / "alone")[:len(before)] == before and len(read_log(tmp_path / "alone")) == 5


def test_a_signal_to_one_process_is_looked_at_by_all_in_an_evaluation(tmp_path):
    out = tmp_path / "run"
    with torchrun(2) as environments:
        running = start("ppo_reft", environments, out, "--eval-size", "1500", "--minibatch-size", "2")
        began = time.time()
        while not (out / "warmup/model.safetensors").exists() and time.time() < began + 60:
            time.sleep(0.003)
        running[1].kill(signal.SIGTERM)
        results = [process.wait(30) for process in running]
    assert [result.returncode for result in results] == [128 + signal.SIGTERM] * 2
    said = "".join(result.stderr for result in results)
    assert "stopped in the evaluation; what was saved last is kept" in said and len(said.splitlines()) == 1


def test_evaluate_only_finds_what_one_process_finds(folder, tmp_path):
    whole_run("ppo_reft", folder / "ppo_reft")
    flags = ["--evaluate-only", "--model", folder / "ppo_reft/model"]
    check(run("ppo_reft", 2, tmp_path / "two", *flags))
    check([Running("ppo_reft", [*TINY, *map(str, flags), "--out", str(tmp_path / "one")]).wait()])
    two, one = [json.loads((tmp_path / name / "summary.json").read_text())["after"] for name in ("two", "one")]
    assert two == one and two["response_length"] > 0


def stored(out):
    """The tensors of the distributed checkpoint of a run."""
    folder = out / torch.load(out / "state.pt", weights_only=True)["shards"]
    dcp_to_torch_save(folder, out / "stored.pt")
    found = torch.load(out / "stored.pt")
    moments = {f"{i} {name}": x for i, state in found.pop("moments", {}).items() for name, x in state.items()}
    return moments | {f"{part} {name}": x for part, weights in found.items() for name, x in weights.items()}


SHARD = ["--shard", "--iterations", "2", "--eval-every", "2", "--warmup-epochs", "1"]


@functools.lru_cache(None)
def sharded_run(folder):
    check(run("ppo_reft", 2, folder, *SHARD))
    return folder


def test_a_sharded_run_is_killed_and_goes_on(folder, tmp_path):
    """With as many processes log and weights bit for bit, with another number from the same weights and moments."""
    whole, out = sharded_run(folder / "sharded"), tmp_path / "run"
    assert len(list(whole.glob("shards*"))) == 1
    with torchrun(2) as environments:
        running = start("ppo_reft", environments, out, *SHARD)
        wait_for(out, 2, running)
        running[1].kill(signal.SIGKILL)
        assert [process.wait().returncode for process in running] == [1, -9]
    saved = torch.load(out / "state.pt", weights_only=True)["log_lines"]
    shutil.copytree(out, tmp_path / "three")
    check(run("ppo_reft", 2, out, *SHARD, "--resume"))
    assert read_log(out) == read_log(whole)
    close(stored(out), stored(whole), 0)
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    before = read_log(tmp_path / "three")[:saved]
    check(run("ppo_reft", 3, tmp_path / "three", *SHARD, "--resume"))
    assert before and read_log(tmp_path / "three")[:saved] == before and len(read_log(tmp_path / "three")) == 4


def test_weights_and_moments_are_the_same_for_another_number(folder, tmp_path):
    """A finished run of two, read and saved again by three."""
    shutil.copytree(sharded_run(folder / "sharded"), tmp_path / "run")
    with torchrun(3) as environments:
        processes = [fork(save_again, environment, tmp_path / "run") for environment in environments]
        [process.start() for process in processes], [process.join() for process in processes]
    assert not any(process.exitcode for process in processes)
    before, after = stored(folder / "sharded"), stored(tmp_path / "run")
    moments = [x for name, x in after.items() if "exp_avg" in name]
    assert moments and all(x.any() for x in moments)                   # there is something to keep
    close(after, before, 0)


def test_rounds_of_star_begin_at_the_base_with_shard_too(tmp_path):
    check(run("score", 1, tmp_path / "run", "--method", "star", "--shard", "--iterations", "2", "--rounds", "2"))
    first, second = [record["kept"] for record in read_log(tmp_path / "run") if record["event"] == "iteration"]
    assert first > 0 == second
    last = stored(tmp_path / "run")                                    # the second round has kept nothing: the base's weights
    base = load_checkpoint(tmp_path / "run/warmup")[0].state_dict()
    close({f"policy {name}": last[f"policy {name}"] for name in base}, {f"policy {name}": x for name, x in base.items()}, 0)


def save_again(environment, out):
    os.environ.update(environment)
    module = imported("ppo_reft")
    module.connect()
    args = module.parse_args([*TINY, "--shard", "--out", str(out)])
    state, policy = module.load_state(args), module.initial_policy(args)[0]
    policy.add_value_head()
    module.spread([policy], args)
    modules, optimizer = {"policy": policy, "critic": policy}, module.adamw([policy], args.lr)
    module.load_run(modules, optimizer, state.pop("weights"), state, args)
    module.save_run(modules, optimizer, state, args)
    module.disconnect()


@pytest.mark.parametrize("flags, words", [
    (["--lr", "nan"], "--lr nan"), (["--max-new-tokens", "5000"], "context"), ([], "holds a run already")])
def test_bad_input_is_refused_in_one_line(flags, words, folder):
    whole_run("ppo_reft", folder / "ppo_reft")
    results = run("ppo_reft", 2, folder / "ppo_reft", *flags)
    said = "".join(result.stderr for result in results)
    assert all(result.returncode for result in results) and len(said.splitlines()) == 1 and words in said, said
