"""The rest of the paper: rationales that are programs, multiple choice, self-training, voting, reranking; the two KL forms'
variance; and that the loop learns."""
import dataclasses
import functools
import itertools
import math
import re

import pytest
import torch

import ppo_reft as reft
from test_losses import TINY_MODEL, TOY, Words, close, tiny, toy_rollout

ARGS = dataclasses.replace(reft.Args(), device="cpu", train_size=400, eval_size=60)


# ---- programs ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("problems", ["numeric", "choice"])
@pytest.mark.parametrize("cot", ["text", "program"])
def test_builtin_demonstrations_earn_1(problems, cot):
    args = dataclasses.replace(ARGS, problems=problems, cot=cot)
    tokenizer = reft.builtin_tokenizer(args)
    for split in reft.load_problems(args):
        encoded = [reft.encode_problem(problem, tokenizer, args) for problem in split]
        texts = [tokenizer.decode(p["response"][:-1]) for p in encoded]
        assert (reft.reward(reft.read_answers(texts, encoded, args), encoded, args) == 1).all()
        wrong = reft.read_answers(texts[1:] + texts[:1], encoded, args)                 # someone else's rationale
        assert (reft.reward(wrong, encoded, args) < 1).float().mean() > 0.5
        assert all(bool(p["header"]) == (cot == "program") for p in encoded)
        if problems == "choice":
            options = [dict(re.findall(r"([a-e]) \) (\d+)", p["question"])) for p in encoded]
            assert all(len(set(o.values())) == 5 for o in options) and {p["gold"] for p in encoded} == set("abcde")
            if cot == "text":                                                           # looks through them up to the right one
                assert all(p["cot"].endswith(f"{p['gold']} ) {o[p['gold']]}") for p, o in zip(encoded, options))
            found = reft.contradictions({"outcomes": torch.ones(len(encoded))}, texts, encoded)
            assert not any(found["contradictions"]) if cot == "text" else found == {}   # a program has no last number


SVAMP = {"question": "Ann has 3 pens and\nbuys 4. How many?", "answer_value": "7.0",
         "answer_cot": 'def solution():\n    """Ann has 3 pens and\nbuys 4. How many?"""\n    pens = 3\n\n    return pens + 4'}


def test_a_program_starts_in_the_prompt_and_runs_as_a_whole():
    """The def line and the docstring, with the question as it is, are given; the demonstration is the rest."""
    args = dataclasses.replace(ARGS, cot="program")
    letters = reft.Tokenizer.from_pieces([chr(i) for i in range(32, 127)] + ["\n"])
    problem = reft.encode_problem(reft.parse_record(SVAMP, args), letters, args)
    assert letters.decode(problem["prompt"]).endswith('Answer reasoning:\ndef solution():\n'
                                                      '    """Ann has 3 pens and\nbuys 4. How many?"""\n')
    body = letters.decode(problem["response"][:-1])
    assert body == "    pens = 3\n\n    return pens + 4" and problem["response"][-1] == letters.eos_id
    texts = [body, body.replace("+ 4", "+ 5"), "    return 7", body.replace("+ 4", "+ float('nan')"), "return 7"]
    outcomes = reft.reward(reft.read_answers(texts, [problem] * 5, args), [problem] * 5, args)
    close(outcomes, [1, 0.1, 1, 0, 0])


def test_contradictions_among_answers_of_all_kinds():
    problems = [{"question": "Which?\na ) 1 , b ) 2", "gold": "b"}, {"question": "Which area?", "gold": r"\boxed{4\pi}"},
                {"question": "5.0 ) 3", "gold": 5.0}]
    texts, right = ["x = 1\nTherefore, the answer is: b", r"x = 2 is \boxed{4\pi}", "x = 4\n5"], {"outcomes": torch.ones(3)}
    for order in itertools.permutations(range(3)):                    # a batch of several files, whichever comes first
        found = reft.contradictions(right, [texts[i] for i in order], [problems[i] for i in order])
        assert found == {"contradictions": [i == 0 for i in order]}
    assert reft.contradictions(right, texts[1:], problems[1:]) == {}


def test_choice_pays_nothing_for_a_wrong_letter_and_counts_contradictions(monkeypatch):
    args = dataclasses.replace(ARGS, problems="choice")
    problem = {"gold": "b", "question": "What is 3 + 4?\na ) 5 , b ) 7 , c ) 9 , d ) 1 , e ) 2"}
    texts = [f"3 + 4 = {n}{reft.ANSWER}{letter}" for n, letter in ((7, "b"), (9, "b"), (7, "c"), (9, "none"))]
    close(reft.reward(reft.read_answers(texts, [problem] * 4, args), [problem] * 4, args), [1, 1, 0, 0])
    policy, ref = tiny(), tiny(seed=1)
    for said, share in ((texts, 1 / 4), (texts[:1] * 4, 0), (texts[1:2] * 4, 1), (texts[3:] * 4, 0)):
        words = Words()
        words.decode = lambda ids, goes_on, left=iter(said): next(left)
        log = reft.rollout(policy, policy, ref, [problem | {"prompt": [5]}] * 4, words, TOY)[1]
        assert log["contradictions"] == share                                           # of the rollouts that earn 1


# ---- voting and reranking ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answers, chosen", [([18.0, 18.001, 20.0, None, None, None], 18.0), ([5.0, 7.0, 7.0, 5.0], 5.0),
                                             ([None, None], None), ([], None), (["b", "a", "a"], "a"), ([3.0], 3.0)])
def test_vote(answers, chosen):
    assert reft.vote(answers) == chosen


@pytest.mark.parametrize("scores, answers, chosen", [([0.9, 0.6, 0.7], [None, 20.0, 18.0], 2), ([0.1, 0.2], [None, None], None)])
def test_rerank(scores, answers, chosen):
    assert reft.rerank(scores, answers) == chosen


def test_reranker_scores_the_last_token_of_each_row():
    """A longer batch-mate and its padding change nothing."""
    gpt, head = tiny(value_head=False), torch.nn.Linear(16, 2)
    rows = [[5, 6, 7], [5, 6, 7, 8, 9, 3]]
    batch = reft.pack([(ids, [True] * len(ids)) for ids in rows], TINY_MODEL)
    found = reft.reranker_scores(gpt, head, batch)
    for row, ids in zip(found, rows):
        close(row, head(gpt(torch.tensor([ids]))[0, -1]))


def test_the_reranker_learns_to_tell_right_from_wrong(monkeypatch):
    """Samples whose second token gives them away: after training the right ones score higher."""
    policy = tiny(value_head=False)
    train = [{"prompt": [5, 4 + i % 3], "gold": 1.0} for i in range(60)]
    drawn = [[([7, 8, 2], "r", 1.0), ([7, 9, 2], "w", 3.0), ([7, 8, 2], "r", 1.0)] for _ in train]
    monkeypatch.setattr(reft, "draw_samples", lambda *a: drawn)
    args = dataclasses.replace(ARGS, rerank_lr=1e-2, rerank_epochs=10)
    reranker, head = reft.train_reranker(policy, policy, train, Words(), args)
    batch = reft.pack([([5, 4, 7, last], [True] * 4) for last in (8, 9)], TINY_MODEL)
    p_right = reft.reranker_scores(reranker, head, batch).softmax(-1)[:, 1]
    assert p_right[0] > 0.9 and p_right[1] < 0.1


# ---- self-training -----------------------------------------------------------------------------------------------------------

def test_offline_rows_are_the_first_right_samples_that_differ_from_each_other_and_the_demonstration(monkeypatch):
    train = [{"prompt": [5], "response": [6, 2], "cot": "gold", "gold": 1.0},
             {"prompt": [6], "response": [7, 2], "cot": "x", "gold": 1.0}]
    drawn = [[([8, 2], "a", 1.0), ([8, 2], "a", 1.0), ([9, 2], "b", 3.0), ([6, 2], "gold and answer", 1.0),
              ([3, 2], "c", 1.0), ([4, 2], "d", 1.0)],
             [([8, 2], "e", None), ([9, 2], "f", 2.0), ([7, 2], "x and answer", 1.0)]]
    monkeypatch.setattr(reft, "draw_samples", lambda *a: drawn)
    rows = reft.self_training_rows(None, train, Words(), dataclasses.replace(ARGS, keep=2))
    assert [ids for ids, _ in rows] == [[5, 8, 2], [5, 3, 2]]
    assert all(flags == [False, True, True] for _, flags in rows)


def test_sample_batches_count_samples_and_not_questions(monkeypatch):
    sizes = []

    def respond(policy, problems, tokenizer, args, temperature=1.0, group_size=1):
        sizes.append(len(problems) * group_size)
        rows = torch.zeros(sizes[-1], 3, dtype=torch.long)
        return {"tokens": rows, "response_mask": rows[:, 1:] == 0}, ["a"] * len(rows), [float(len(sizes))] * len(rows)

    monkeypatch.setattr(reft, "respond", respond)
    problems = [{"prompt": [5]}] * 60
    found = reft.draw_samples(None, problems, Words(), 100, dataclasses.replace(ARGS, minibatch_size=256, batch_size=256))
    assert max(sizes) <= 256 and sum(sizes) == 6000 and [len(f) for f in found] == [100] * 60
    assert len(reft.draw_samples(None, problems[:2], Words(), 300, dataclasses.replace(ARGS, minibatch_size=256))) == 2


def test_online_loss_is_half_right_samples_half_demonstrations():
    policy = tiny()
    batch = reft.pack([([5, 6, 7, 2], [False, False, True, True]), ([5, 8, 2], [False, True, True]),
                       ([5, 9, 9, 2], [False, True, True, True])],
                      TINY_MODEL) | {"right": torch.tensor([True, False, False])}
    logp = policy.logits(batch["tokens"]).log_softmax(-1)
    right = -(logp[0, 1, 7] + logp[0, 2, 2]) / 2
    gold = -(logp[1, 0, 8] + logp[1, 1, 2] + logp[2, 0, 9] + logp[2, 1, 9] + logp[2, 2, 2]) / 5
    loss, parts = reft.online_st_loss(policy, batch, batch)
    close(loss.detach(), (right / 2 + gold / 2).detach())
    nothing_right = batch | {"right": torch.tensor([False, False, False])}
    assert reft.online_st_loss(policy, nothing_right, nothing_right)[1]["right_loss"] == 0


def test_online_update_trains_on_right_samples_only():
    policy, _, data, _ = toy_rollout(TOY)
    data["outcomes"] = torch.tensor([1.0, 0.1] * 6)
    seen = []
    original = reft.online_st_loss
    try:
        reft.online_st_loss = lambda policy, micro, minibatch: (seen.append(minibatch), original(policy, micro, minibatch))[1]
        problems = [{"prompt": [5, 6], "response": [7, 2]}] * 12
        reft.online_st_update(policy, problems, data, torch.optim.SGD(policy.parameters(), lr=0.0), TOY)
    finally:
        reft.online_st_loss = original
    batch = seen[0]
    assert batch["right"].tolist() == [True] * 6 + [False] * 12
    for row, i in zip(batch["tokens"], range(0, 12, 2)):
        mask = data["response_mask"][i]
        assert row[:mask.nonzero().max() + 2].tolist() == data["tokens"][i, :mask.nonzero().max() + 2].tolist()


# ---- exact KL has the lower variance -----------------------------------------------------------------------------------------

def test_exact_kl_has_the_lower_variance(capsys):
    """The single-sample gradient of the penalty alone on a tabular policy, enumerated: same mean, less variance."""
    beta, theta = 0.1, torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64).logit().requires_grad_()
    logp = lambda s, a: torch.nn.functional.logsigmoid(theta[s] if a == 0 else -theta[s])
    ratio = lambda s, a: logp(s, a) - math.log(0.5)
    kl = lambda s: sum(logp(s, a).exp() * ratio(s, a) for a in (0, 1))
    moments = {}
    for kind in ("k1", "exact"):
        mean = square = 0
        for a, b in itertools.product((0, 1), (0, 1)):
            probability = (logp(0, a) + logp(1 + a, b)).exp().detach()
            states = [(0, a), (1 + a, b)]
            args = dataclasses.replace(ARGS, kl=kind, kl_coef=beta)
            rewards = reft.token_rewards(torch.zeros(1, dtype=torch.float64),
                                         torch.stack([ratio(*s) for s in states]).detach()[None],
                                         torch.stack([kl(s) for s, _ in states]).detach()[None],
                                         torch.ones(1, 2, dtype=torch.bool), args)
            weights = reft.gae(rewards, torch.zeros_like(rewards), torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)[0][0]
            value = sum(w * logp(*s) for w, s in zip(weights, states)) - (beta * sum(kl(s) for s, _ in states)
                                                                          if kind == "exact" else 0)
            gradient = torch.autograd.grad(value, theta)[0]
            mean, square = mean + probability * gradient, square + probability * gradient.square().sum()
        moments[kind] = mean, (square - mean.square().sum()).item()
    close(moments["k1"][0], moments["exact"][0], 1e-12)
    with capsys.disabled():
        print(f"\nvariance of the KL gradient: k1 {moments['k1'][1]:.2e}, exact {moments['exact'][1]:.2e}")
    assert moments["exact"][1] < 0.5 * moments["k1"][1]


# ---- the loop learns ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["reft", "online-st"])
def test_a_policy_finds_the_rewarded_style(method):
    """Of two styles that a toy policy writes equally often, one is right: within 25 updates it is the only one written.
    With a broken reward, mask, sign or optimiser step the share stays near a half, or falls."""
    args = dataclasses.replace(TOY, lr=3e-3, batch_size=32, minibatch_size=32, max_new_tokens=4, ppo_epochs=2)
    policy = tiny()
    styles = [[6, 7, 2], [8, 9, 2]]
    rows = [([5] + style, [False] + [True] * 3) for style in styles]
    warm = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    batch = reft.pack(rows, TINY_MODEL)
    for _ in range(150):
        reft.optimiser_step(functools.partial(reft.sft_loss, policy), batch, warm, args)
    import copy
    ref, optimizer = copy.deepcopy(policy).requires_grad_(False), reft.adamw([policy], args.lr)
    problems = [{"prompt": [5], "response": styles[1], "gold": 1.0}] * 32
    share = lambda data: (data["tokens"][:, 1] == 8).float().mean().item()

    def read(texts, problems, args):                                     # letters of tokens 8, 9: "ij"
        return [1.0 if text == "ij" else 2.0 for text in texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reft, "read_answers", read)
        shares = []
        for iteration in range(25):
            torch.manual_seed(iteration)
            data, _ = reft.rollout(policy, policy, ref, problems, Words(), args)
            shares.append(share(data))
            if method == "reft":
                reft.update(functools.partial(reft.loss_fn, policy, policy, ref, args), data, optimizer, args)
            else:
                reft.online_st_update(policy, problems, data, optimizer, args)
    assert 0.2 < shares[0] < 0.8 and shares[-1] > 0.95, shares


def test_the_default_loop_learns_within_a_minute(tmp_path):
    """Chains of 4 after a short warm-up, which leaves them unsolved (9 to 13 %): 5 iterations take them to 63, 45 and 90 % (seeds 0
    to 2), and nowhere when the sign of the policy's loss is wrong."""
    from test_scripts import run
    result = run("ppo_reft", tmp_path / "run", "--operations-low", 4, "--operations-high", 4, "--operations-train", 4,
                 "--warmup-epochs", 3, "--warmup-batch-size", 24, "--warmup-lr", 4e-3, "--iterations", 5, "--eval-every", 5,
                 "--eval-size", 100, "--max-new-tokens", 40, "--device", "cpu", tiny=False)
    assert result.returncode == 0, result.stderr
    before, after = map(float, re.search(r"accuracy ([\d.]+) -> ([\d.]+)", result.stdout).groups())
    assert before < 0.5 and after > before + 0.2, (before, after)
