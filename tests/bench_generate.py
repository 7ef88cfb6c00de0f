"""Tokens per second of `generate` beside transformers' generate: the same weights, prompts and threads, in one process.

    python tests/bench_generate.py [--out FILE] [--repeats N] [--threads N]        (needs transformers)

A Llama of about 1M parameters, prompts of different lengths, 48 new tokens from the full vocabulary at temperature 1. In
the last case a group of 8 samples shares each question and rows end at random lengths, about 25 tokens on average without the
limit; only tokens up to the end token count. The two take turns; the table has medians over the repeats.
"""
import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT, GPTConfig, Tokenizer, generate, save_checkpoint

V, EOS, NEW = 512, 511, 48
CASES = {"batch 64": (64, 1, False), "batch 8": (8, 1, False), "8 questions x 8 samples, ragged ends": (8, 8, True)}


def build():
    """A model whose end token has a probability of about 1/25 everywhere: its head row lies along a direction that all
    embeddings share."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=V, eos_id=EOS, n_layer=4, n_head=4, n_embd=128, max_len=256, tied_head=False))
    shared = torch.nn.functional.normalize(torch.randn(128), dim=0)
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 2:
                p *= 0.02 / gpt.config.init_std         # small enough for that direction to dominate
        gpt.embed += shared
        gpt.head[EOS] = shared * math.log((V - 1) / 19) / math.sqrt(128)
    return gpt


def ours(gpt, prompts, group_size):
    return int(generate(gpt, prompts, NEW, group_size=group_size)[1].sum())


def theirs(model, prompts, group_size, eos):
    longest = max(map(len, prompts))
    pads = [longest - len(p) for p in prompts]
    tokens = torch.tensor([[0] * pad + p for pad, p in zip(pads, prompts)])
    mask = torch.tensor([[0] * pad + [1] * len(p) for pad, p in zip(pads, prompts)])
    out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0,
                         top_p=1.0, num_return_sequences=group_size, use_cache=True, eos_token_id=eos, pad_token_id=0)
    new = out[:, longest:]
    ended = (new == EOS) if eos is not None else torch.zeros_like(new, dtype=torch.bool)
    return int((ended.cumsum(1) - ended.long() == 0).sum())         # tokens before the end token, and itself


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpt = build()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, gpt, Tokenizer.from_pieces([f"<{i}>" for i in range(EOS)]))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = torch.randint(0, EOS, (4, 20))
    with torch.no_grad():
        assert (gpt.logits(tokens) - model(tokens).logits).abs().max() < 1e-4

    parameters = sum(p.numel() for p in gpt.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {args.threads} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    print(f"{'tokens/s, median of ' + str(args.repeats):40}{'model.py':>12}{'transformers':>14}{'ratio':>8}")
    results = []
    for name, (questions, group_size, ends) in CASES.items():
        rates = {"model.py": [], "transformers": []}
        for repeat in range(args.repeats + 1):
            prompts = [torch.randint(0, EOS, (8 + (3 * i) % 17,)).tolist() for i in range(questions)]
            gpt.config.eos_id = EOS if ends else -1
            for who, run in (("model.py", lambda: ours(gpt, prompts, group_size)),
                             ("transformers", lambda: theirs(model, prompts, group_size, EOS if ends else None))):
                start = time.perf_counter()
                count = run()
                if repeat:                              # the first round warms up
                    rates[who].append(count / (time.perf_counter() - start))
        mine, other = (statistics.median(r) for r in rates.values())
        ratio = statistics.median(a / b for a, b in zip(*rates.values()))
        print(f"{name:40}{mine:12.0f}{other:14.0f}{ratio:8.2f}")
        results.append(dict(case=name, tokens_per_second=mine, transformers_tokens_per_second=other, ratio=ratio))
    if args.out:
        Path(args.out).write_text(json.dumps(dict(
            parameters=parameters, new_tokens=NEW, repeats=args.repeats, threads=args.threads, torch=torch.__version__,
            transformers=transformers.__version__, results=results), indent=1) + "\n")


if __name__ == "__main__":
    main()
