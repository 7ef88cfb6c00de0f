"""Why a best-of-16 reranker falls short after ReFT: its samples by question, as texts (README, ReFT's results).

    python tests/rerank_texts.py RUN_FOLDER [--samples N] [--own] [--out results/rerank-texts.json]

RUN_FOLDER is a run of `python ppo_reft.py` on its built-in problems. A reranker is trained as the run's own is, on its warm-up
model's samples (--own: on the policy's), N for each training question (default: the run's), and asked to choose among 16 samples
for each of 400 test problems; what is found goes behind what other runs left in --out. Minutes on one core.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_reft as reft
from model import load_checkpoint


def main(run, samples, own, out):
    info = json.loads((Path(run) / "args.json").read_text())
    args = reft.Args(**info["args"] | {"model": f"{run}/model", "device": "cpu", "vote_k": 16, "rerank": True})
    args.samples = samples or args.samples
    policy, tokenizer, train, _, test = reft.prepare(args)
    sampler = policy if own else load_checkpoint(f"{run}/warmup")[0]
    reranker, head = reft.train_reranker(policy, sampler, train, tokenizer, args)
    counts = {"right samples": [], "different right texts": [], "different wrong texts": [], "right share of the texts": []}
    chosen, pairs = [], []
    with torch.no_grad():
        for problem, drawn in zip(test[:400], reft.draw_samples(policy, test[:400], tokenizer, args.vote_k, args)):
            right = [float(reft.reward([answer], [problem], args)[0]) == 1 for *_, answer in drawn]
            batch = reft.pack([reft.reranker_row(problem, ids, tokenizer) for ids, *_ in drawn], policy)
            scores = reft.reranker_scores(reranker, head, batch).log_softmax(-1)[:, 1].tolist()
            texts = [{text for (_, text, _), r in zip(drawn, right) if r == wanted} for wanted in (True, False)]
            for name, x in zip(counts, (sum(right), *map(len, texts), len(texts[0]) / sum(map(len, texts)))):
                counts[name].append(x)
            best = reft.rerank(scores, [answer for *_, answer in drawn])
            chosen.append(best is not None and right[best])
            pairs += [a > b for a, r in zip(scores, right) if r for b, s in zip(scores, right) if not s]
    found = {name: round(statistics.mean(x), 3) for name, x in counts.items()}
    found |= {"reranked accuracy": statistics.mean(chosen), "pairs of right and wrong in order": round(statistics.mean(pairs), 3)}
    print(json.dumps(found, indent=1))
    if out:
        rows = json.loads(out.read_text()) if out.exists() else []
        rows.append({"seed": args.seed, "trained on": f"{args.samples} of the {'policy' if own else 'warm-up'}",
                     "problems": len(chosen)} | found | {"commit": info["commit"]})
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--own", action="store_true")
    parser.add_argument("--out", type=Path)
    main(**vars(parser.parse_args()))
