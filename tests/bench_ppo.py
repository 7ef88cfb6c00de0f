"""Seconds of one PPO iteration of ppo_reft.py beside TRL's PPOTrainer: the same weights, prompts and threads, in one process.

    python tests/bench_ppo.py [--out FILE] [--repeats N] [--threads N]        (needs trl 1.12, transformers, datasets, accelerate)

A Llama of about 1M parameters on a CPU in float32. An iteration: 64 prompts of 16 tokens, one response of exactly 48 tokens
each (no end token on either side, temperature 1), then 4 passes, each one optimiser step on all 64 rows at once, fused AdamW.

    ours   rollout() and update(): generate; decode and check the answers; one pass of policy and of reference for log-probs,
           values, entropy and the exact KL; GAE; updates with the value head on the policy's trunk and gradient clipping
    TRL    train() of a trainer of one batch: generate, keeping its logits for the log-probs; one pass of the reference, of the
           value model and of the reward model; GAE; updates with entropy, without gradient clipping; log and gc.collect()

TRL asks for a reward model: here one multiplication, its share is in the table. It asks for a value model too, in one of three
forms. `own trunk` is what its examples do: a sequence classifier made from the policy's checkpoint. `shared trunk` has the
policy's modules as its trunk: no weights of its own, but TRL runs the trunk for the policy and for the value separately. `no
trunk` is one multiplication: a floor for TRL, below what any value function costs that looks at the text. The ratio to quote is
that of `shared trunk`, the same network as ours. TRL's bfloat16, gradient checkpointing, sample tables and reports are off. All
take turns; the table has medians over the repeats, and medians of the ratios to ours in the same round. CPU is the process's
time on all its threads: with one thread it says on a busy machine what the clock says on an idle one.
"""
import argparse
import copy
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
import transformers
import trl
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_reft
from model import GPT, GPTConfig, Tokenizer, save_checkpoint

V, EOS, ROWS, PROMPT, NEW, PASSES, LR = 512, 511, 64, 16, 48, 4, 3e-6
SECONDS = defaultdict(float)                            # of the pieces of the iteration at hand


def timed(piece, function):
    """function, with the seconds it takes added to a piece: a name, or a function of the first argument that gives one."""
    def wrapper(first, *args, **kwargs):
        start = time.perf_counter()
        result = function(first, *args, **kwargs)
        SECONDS[piece(first) if callable(piece) else piece] += time.perf_counter() - start
        return result
    return wrapper


class Tiny(nn.Module):
    """A model in the form TRL asks for, whose trunk does nothing: a score for each token id, by one linear map."""
    base_model_prefix = "trunk"

    class Trunk(nn.Module):
        def forward(self, input_ids, **ignored):
            return SimpleNamespace(hidden_states=[input_ids[..., None] / V])

    def __init__(self, piece):
        super().__init__()
        self.trunk, self.score, self.piece = self.Trunk(), nn.Linear(1, 1), piece


def ours(gpt, tokenizer, prompts):
    """A function that does one iteration of ppo_reft.py."""
    args = ppo_reft.Args(batch_size=ROWS, minibatch_size=ROWS, micro_batch_size=ROWS, ppo_epochs=PASSES, max_new_tokens=NEW,
                         lr=LR)
    ref = copy.deepcopy(gpt).requires_grad_(False)
    gpt.add_value_head()
    gpt.config.eos_id = -1                              # no token ends a response
    optimizer = ppo_reft.adamw([gpt], LR)
    loss_of = functools.partial(ppo_reft.loss_fn, gpt, gpt, ref, args)
    problems = [{"prompt": prompt, "gold": 1.0} for prompt in prompts]

    def iteration():
        data, log = ppo_reft.rollout(gpt, gpt, ref, problems, tokenizer, args)
        assert log["tokens"] == ROWS * NEW
        update(loss_of, data, optimizer, args)

    update = timed("update", ppo_reft.update)
    return iteration


def theirs(folder, prompts, value, out):
    """A function that does one iteration of TRL's trainer; value: which value model."""
    policy, ref = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    policy.generation_config.eos_token_id = None
    if value == "no trunk":
        value_model = Tiny("values")
    else:
        value_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        if value == "shared trunk":
            value_model.model = policy.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == V                  # outside the head: TRL takes a sampled pad token for the end
    args = PPOConfig(
        output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True, num_sample_generations=0, per_device_train_batch_size=ROWS, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=PASSES, local_rollout_forward_batch_size=ROWS, total_episodes=ROWS,
        response_length=NEW, temperature=1.0, learning_rate=LR, lr_scheduler_type="constant", vf_coef=5.0)
    trainer = PPOTrainer(args, tokenizer, policy, ref, reward_model=Tiny("reward model"), value_model=value_model,
                         train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}))
    trainer.remove_callback(transformers.PrinterCallback)

    def iteration():
        trainer.train()
        SECONDS["update"] += time.perf_counter() - SECONDS.pop("update began")

    return iteration


def watch():
    """Puts stop-watches on the pieces of both sides. TRL's update begins with its first forward of policy and value together."""
    def began(model, *args):
        if isinstance(model, ppo_trainer.PolicyAndValueWrapper):
            SECONDS.setdefault("update began", time.perf_counter())
        return forward(model, *args)

    def generated(*args):
        result = generate(*args)
        assert result[0].shape == (ROWS, PROMPT + NEW)
        return result

    forward, generate = ppo_trainer.forward, ppo_trainer.batch_generation
    ppo_trainer.forward, ppo_trainer.batch_generation = began, timed("generation", generated)
    ppo_trainer.get_reward = timed(lambda model: getattr(model, "piece", "values"), ppo_trainer.get_reward)
    ppo_reft.generate = timed("generation", ppo_reft.generate)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    gpt = GPT(GPTConfig(vocab_size=V, eos_id=EOS, n_layer=4, n_head=4, n_embd=128, max_len=256, tied_head=False))
    parameters = sum(p.numel() for p in gpt.parameters())
    tokenizer = Tokenizer.from_pieces([f"<{i}>" for i in range(EOS)])
    prompts = torch.randint(0, EOS, (ROWS, PROMPT)).tolist()
    watch()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, gpt, tokenizer)
        model, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.tensor(prompts)
        with torch.no_grad():
            assert (gpt.logits(tokens) - model(tokens).logits).abs().max() < 1e-4
        sides = {"ours": ours(gpt, tokenizer, prompts)} | {
            f"TRL, {value}": theirs(folder, prompts, value, folder) for value in ("own trunk", "shared trunk", "no trunk")}

        runs = {name: [] for name in sides}
        for repeat in range(args.repeats + 1):
            for name, iteration in sides.items():
                SECONDS.clear()
                start, cpu = time.perf_counter(), time.process_time()
                iteration()
                seconds = {"iteration": time.perf_counter() - start, "CPU": time.process_time() - cpu}
                if repeat:                              # the first round warms up
                    runs[name].append(dict(SECONDS) | seconds)

    print(f"{parameters / 1e6:.2f}M parameters, {args.threads} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, trl {trl.__version__}")
    pieces = ("iteration", "generation", "update", "reward model", "CPU")
    head = "".join(f"{piece:>14}" for piece in pieces) + f"{'ratio':>9}{'CPU ratio':>11}"
    print(f"{'seconds, median of ' + str(args.repeats):24}{head}")
    results = []
    for name, measured in runs.items():
        row = {piece: statistics.median(m.get(piece, 0) for m in measured) for piece in pieces}
        ratio, cpu_ratio = (statistics.median(m[clock] / mine[clock] for m, mine in zip(measured, runs["ours"]))
                            for clock in ("iteration", "CPU"))
        print(f"{name:24}" + "".join(f"{row[piece]:14.4f}" for piece in pieces) + f"{ratio:9.2f}{cpu_ratio:11.2f}")
        results.append({"side": name} | row | {"ratio": ratio, "cpu_ratio": cpu_ratio})
    if args.out:
        Path(args.out).write_text(json.dumps(dict(
            parameters=parameters, rows=ROWS, prompt_tokens=PROMPT, new_tokens=NEW, passes=PASSES, repeats=args.repeats,
            threads=args.threads, torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__,
            results=results), indent=1) + "\n")


if __name__ == "__main__":
    main()
