"""score.py: returns, advantages and KL against enumeration, masks and contexts of both turns, the warm-up's promise not to teach
correction, programs with tests, traces of the supervised baselines."""
import ast
import dataclasses
import functools
import itertools
import json
import math
import random

import pytest
import torch

import score
from model import GPT, GPTConfig, Tokenizer, save_checkpoint
from test_losses import Words, close, tiny
from test_scripts import TINY, read_log, refuse, run

ARGS = dataclasses.replace(score.Args(), device="cpu", alpha=10.0, beta1=0.01, beta2=0.1)
double = functools.partial(torch.tensor, dtype=torch.float64)


def flags(**changed):
    return dataclasses.replace(ARGS, **changed)


# ---- O1, O2, O4: a policy with three numbers, a = P(r1 = 1), f0 = P(flip | wrong), f1 = P(flip | right) -----------------------

PAIRS = [(r1, r2) for r1 in (0, 1) for r2 in (0, 1)]


def probability(p, r1, r2):
    """P(r1, r2), and d log P(y1) / d logits, d log P(y2 | x2) / d logits, each as three numbers."""
    a, flip = p[0], p[1 + r1]
    flipped = r1 != r2
    turn2 = [0.0, 0.0, 0.0]
    turn2[1 + r1] = (1 - flip) if flipped else -flip
    return (a if r1 else 1 - a) * (flip if flipped else 1 - flip), [(1 - a) if r1 else -a, 0.0, 0.0], turn2


def exact_gradient(p, weights):
    """The expected policy gradient with turn weights {(r1, r2): (w1, w2)}."""
    gradient = [0.0, 0.0, 0.0]
    for pair in PAIRS:
        P, turn1, turn2 = probability(p, *pair)
        w1, w2 = weights[pair]
        gradient = [g + P * (w1 * x + w2 * y) for g, x, y in zip(gradient, turn1, turn2)]
    return gradient


def script_weights(stage, **changed):
    """G1 and G2 of every pair of outcomes, from the script."""
    r1, r2 = double(PAIRS).T
    G1, G2 = score.turn_returns(r1, r2, 0 * r1, 0 * r1, stage, flags(**changed))
    return dict(zip(PAIRS, zip(G1.tolist(), G2.tolist())))


def joint_weights(alpha):
    """One scalar for both turns: what the script must not do."""
    return {(r1, r2): (r1 + r2 + alpha * (r2 - r1),) * 2 for r1, r2 in PAIRS}


def ascent(weights, steps=4000):
    theta = [math.log(p / (1 - p)) for p in (0.53, 0.10, 0.30)]
    for _ in range(steps):
        gradient = exact_gradient([1 / (1 + math.exp(-x)) for x in theta], weights)
        theta = [x + 0.05 * g for x, g in zip(theta, gradient)]
    a, f0, f1 = [1 / (1 + math.exp(-x)) for x in theta]
    return a, a * (1 - f1) + (1 - a) * f0, f0, f1


@pytest.mark.parametrize("weights, expected", [
    (script_weights(2, alpha=0.0), (0.995, 0.990, 0.182, 0.005)),
    (script_weights(2, alpha=1.0), (0.995, 0.994, 0.422, 0.003)),
    (script_weights(2), (0.995, 0.999, 0.978, 0.000)),
    (script_weights(2, alpha=1.0, gamma=0.8), (0.996, 0.995, 0.281, 0.003)),
    (script_weights(2, gamma=0.8), (0.001, 1.000, 1.000, 0.047)),                 # sandbagging: y1 is wrong on purpose
    (joint_weights(0.0), (0.997, 0.992, 0.142, 0.005)),
    (joint_weights(10.0), (0.001, 1.000, 1.000, 0.057)),                          # the same
    (script_weights(1), (0.530, 0.988, 0.986, 0.010)),
])
def test_where_exact_gradient_ascent_ends(weights, expected):
    assert ascent(weights) == pytest.approx(expected, abs=6e-4)


def test_no_sandbagging_on_the_way_either():
    assert ascent(script_weights(2), 400)[:3] == pytest.approx((0.938, 0.992, 0.949), abs=6e-4)
    assert ascent(joint_weights(10.0), 400)[0] == pytest.approx(0.006, abs=6e-4)


RATES = (0.526, 0.097, 0.30)


@pytest.mark.parametrize("stage, changed, expected", [
    (2, {}, [0.249324, 0.456699, -1.215060]), (2, {"alpha": 0.0}, [0.249324, 0.041518, -0.110460]),
    (2, {"method": "no-shaping"}, [0.249324, 0.041518, -0.110460]),
    (2, {"method": "multi-turn"}, [0.249324, 0.041518, -0.110460]),
    (2, {"method": "no-stage1"}, [0.249324, 0.456699, -1.215060]), (1, {}, [0.0, 0.041518, -0.110460]),
    (2, {"gamma": 0.8, "alpha": 1.0}, [0.290413, 0.083036, -0.220920]),
])
def test_expected_gradient_of_each_method(stage, changed, expected):
    close(exact_gradient(RATES, script_weights(stage, **changed)), expected, 1e-6)


def test_joint_credit_turns_against_the_first_answer():
    close(exact_gradient(RATES, joint_weights(10.0)), [-0.590150, 0.456699, -1.215060], 1e-6)


def enumerated_gradient(K, weights, args):
    """The mean gradient over a question's K episodes with the script's advantages, over every group of K outcomes: float64."""
    groups = list(itertools.product(PAIRS, repeat=K))
    args = dataclasses.replace(args, group_size=K)
    G = double([[weights[pair] for pair in group] for group in groups]).reshape(-1, 2)
    A1, A2 = [A.view(-1, K) for A in score.turn_advantages(*G.T, torch.ones(len(G), dtype=torch.bool), args)]
    parts = {pair: probability(RATES, *pair) for pair in PAIRS}
    P = double([math.prod(parts[pair][0] for pair in group) for group in groups])
    turn1, turn2 = [double([[parts[pair][i] for pair in group] for group in groups]) for i in (1, 2)]      # (groups, K, 3)
    return (P[:, None] * (A1[..., None] * turn1 + A2[..., None] * turn2).mean(1)).sum(0)


def test_the_bonus_is_a_factor_in_expectation_also_with_leave_one_out():
    """S9: r2 + alpha (r2 - r1) has the expected gradient of (1 + alpha) r2."""
    shaped = script_weights(2)
    eleven = {(r1, r2): (r1, 11 * r2) for r1, r2 in PAIRS}
    close(exact_gradient(RATES, shaped), exact_gradient(RATES, eleven), 1e-12)
    close(enumerated_gradient(2, shaped, ARGS), exact_gradient(RATES, eleven), 1e-12)
    control = enumerated_gradient(2, script_weights(2, method="no-shaping"), flags(turn2_weight=11.0))
    close(control, exact_gradient(RATES, eleven), 1e-12)


@pytest.mark.parametrize("norm_std, alpha, expected", [
    ("turn", 0.0, [0.3490, 0.0582, -0.1549]), ("turn", 10.0, [0.3490, 0.0627, -0.1942]),
    ("joint", 0.0, [0.3944, 0.0659, -0.1778]), ("joint", 10.0, [0.1813, 0.0894, -0.2769]),
])
def test_dividing_by_a_std_takes_the_bonus_away(norm_std, alpha, expected):
    found = enumerated_gradient(4, script_weights(2, alpha=alpha), flags(norm_std=norm_std))
    close(found * 3 / 4, expected, 6e-5)                                           # leave-one-out is K / (K - 1) times G - mean


# ---- O3: the code path on one question ---------------------------------------------------------------------------------------

R1, R2 = double([1, 0, 0, 1]), double([1, 1, 0, 0])
ALL = torch.ones(4, dtype=torch.bool)


def advantages(stage, on1=ALL, k1=(0 * R1, 0 * R1), **changed):
    args = flags(group_size=4, **changed)
    return score.turn_advantages(*score.turn_returns(R1, R2, *k1, stage, args), on1, args)


def test_stage_1_gives_the_first_attempt_nothing():
    A1, A2 = advantages(1)
    assert not A1.any()
    close(A2, [2 / 3, 2 / 3, -2 / 3, -2 / 3], 1e-12)


def test_stage_2_by_hand():
    close(score.turn_returns(R1, R2, 0 * R1, 0 * R1, 2, ARGS)[1], [1, 11, 0, -10])
    A1, A2 = advantages(2)
    close(A1, [2 / 3, -2 / 3, -2 / 3, 2 / 3], 1e-12)
    close(A2, [2 / 3, 14, -2 / 3, -14], 1e-12)


def test_discount_by_hand():
    close(score.turn_returns(R1, R2, 0 * R1, 0 * R1, 2, flags(gamma=0.8, alpha=1.0))[0], [1.8, 1.6, 0, 0.2])
    A1, A2 = advantages(2, gamma=0.8, alpha=1.0)
    close(A1, [1.2, 0.933333, -1.2, -0.933333], 1e-6)
    close(A2, [2 / 3, 2, -2 / 3, -2], 1e-12)
    close(advantages(1, gamma=0.8)[0], [0, 0, 0, 0])                               # stage I: not even a share of R2


def test_an_offline_first_attempt_counts_for_the_second_turn_alone():
    A1, A2 = advantages(2, on1=torch.tensor([True, True, True, False]))
    close(A1, [1, -0.5, -0.5, 0], 1e-12)
    close(A2, [2 / 3, 14, -2 / 3, -14], 1e-12)
    A1, _ = advantages(2, on1=torch.tensor([True, False, False, False]))
    close(A1, [0, 0, 0, 0])                                                        # no other to compare with


def test_log_ratios_in_the_reward():
    k1 = double([0.4, -0.2, 0, 0.2]), double([1, 0, 0.5, -0.5])
    A1, A2 = advantages(1, k1=k1, kl_mode="reward")
    close(A1, [-0.04, 0.04, 0.013333, -0.013333], 1e-6)
    close(A2, [0.656667, 0.67, -0.67, -0.656667], 1e-6)
    close(torch.stack(advantages(1, k1=k1)), torch.stack(advantages(1)))           # kl-mode loss: no part of the return


def test_metrics_are_shares_of_all_problems():
    found = score.turn_metrics((["ab"] * 4, [1.0, 2.0, None, 3.0], R1), (["ab", "abc", "", "ab"], [1.0, 2.5, None, None], R2))
    assert found == pytest.approx({"t1": 0.5, "t2": 0.5, "delta": 0.0, "i->c": 0.25, "c->i": 0.25, "changed": 0.5,
                                   "unparsed": 3 / 8, "edit_ratio": (0 + 1 / 5 + 1 + 0) / 4})


def test_edit_ratio():
    assert score.edit_ratio("kitten", "sitting") == 3 / 13
    assert score.edit_ratio("same", "same") == score.edit_ratio("", "") == 0
    assert score.edit_ratio("", "abc") == score.edit_ratio("abc", "") == 1

    def table(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            row, above = [i], row
            for j, y in enumerate(b, 1):
                row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
        return row[-1]

    rng = random.Random(0)
    for _ in range(500):
        a, b = ["".join(rng.choices("abc", k=rng.randrange(90))) for _ in range(2)]
        assert score.edit_distance(a, b) == table(a, b), (a, b)


# ---- O5: the KL --------------------------------------------------------------------------------------------------------------

def test_exact_kl_and_its_gradient():
    p, ref = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    z = p.log().requires_grad_()
    kl = score.linear_kl(z[None], torch.eye(3), ref.log()[None], torch.eye(3))
    kl.sum().backward()
    close(kl, [0.173287], 1e-6)
    close(z.grad, [0.259930, -0.043322, -0.216608], 1e-6)
    z.grad = None                                                                  # what a differentiated k3 would give instead
    d = ref.log() - z.log_softmax(-1)
    (p * (d.exp() - 1 - d)).sum().backward()
    close(z.grad, p - ref, 1e-6)


def test_the_two_places_of_the_kl_have_the_gradients_they_claim():
    """Three binary tokens as one turn: the reward form has the sequence KL's gradient, the loss form that with fixed states."""
    prefixes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    theta = double([0.5, -1, 1, 0.8, -0.4, 0.3, -1.2]).requires_grad_()
    ref = dict(zip(prefixes, double([0, 0.5, -0.5, 0, 1, -1, 0.2])))
    own = dict(zip(prefixes, theta))
    logp = lambda gpt, state, token: torch.nn.functional.logsigmoid(gpt[state] if token else -gpt[state])
    path = lambda y: [(y[:t], y[t]) for t in range(3)]
    paths = list(itertools.product((0, 1), repeat=3))
    total = {y: sum(logp(own, *step) for step in path(y)) for y in paths}
    ratio = {y: total[y] - sum(logp(ref, *step) for step in path(y)) for y in paths}
    KL = sum(total[y].exp() * ratio[y] for y in paths)
    true = torch.autograd.grad(KL, theta, retain_graph=True)[0]
    close(KL.detach(), 0.462695, 1e-6)

    zero = torch.zeros(len(paths), dtype=torch.float64)
    k1 = torch.stack([ratio[y] for y in paths]).detach()
    G1, _ = score.turn_returns(zero, zero, k1, zero, 1, flags(kl_mode="reward", beta2=1.0))
    value = -sum(total[y].exp().detach() * g * total[y] for y, g in zip(paths, G1))
    reward_form = torch.autograd.grad(value, theta, retain_graph=True)[0]
    close(reward_form, true, 1e-12)
    close(reward_form, [0.138930, -0.099142, 0.184200, 0.047232, -0.034153, 0.053201, -0.113332], 1e-6)

    rows = lambda gpt, y: torch.stack([torch.stack([torch.zeros((), dtype=torch.float64), gpt[state]]) for state, _ in path(y)])
    eye = torch.eye(2, dtype=torch.float64)
    loss = sum(total[y].exp().detach() * score.linear_kl(rows(own, y), eye, rows(ref, y).detach(), eye).sum() for y in paths)
    close(torch.autograd.grad(loss, theta)[0], [0.117502, -0.111344, 0.183574, *reward_form[3:].tolist()], 1e-6)


# ---- masks, contexts and gradients on a small GPT ----------------------------------------------------------------------------

AGAIN = [9, 10]
TOY = flags(max_new_tokens=7, micro_batch_size=4, minibatch_size=24, group_size=4)


def toy_problems(n=6):
    return [{"question": str(i), "prompt": [5] * (1 + i % 3) + [6], "given": [], "again": AGAIN, "gold": 1.0} for i in range(n)]


def toy_rollout(monkeypatch, stage, args=TOY, outcome=lambda text: len(text) % 2, seed=3):
    policy, ref = tiny(value_head=False), tiny(value_head=False, seed=1).requires_grad_(False)
    monkeypatch.setattr(score, "read_answers", lambda texts, problems, args: list(texts))
    outcomes = lambda answers, problems, args: torch.tensor([float(a is not None and outcome(a) > 0) for a in answers])
    monkeypatch.setattr(score, "reward", outcomes)
    torch.manual_seed(seed)
    data, log = score.rollout(policy, ref, toy_problems(), stage, Words(), args)
    return policy, ref, data, log


def test_a_row_is_question_attempt_correction_prompt_attempt():
    policy, problems = tiny(value_head=False), toy_problems()
    torch.manual_seed(0)
    tokens, turn1, turn2 = score.two_turns(policy, problems, TOY, group_size=4)
    seen = set()
    for row, m1, m2, problem in zip(tokens.tolist(), turn1.tolist(), turn2.tolist(), [p for p in problems for _ in range(4)]):
        y1, y2 = [[t for t, m in zip(row[1:], mask) if m] for mask in (m1, m2)]
        whole = problem["prompt"] + y1 + AGAIN + y2
        assert row == whole + [0] * (len(row) - len(whole))
        marks = [False] * (len(problem["prompt"]) - 1) + [True] * len(y1) + [False] * len(AGAIN) + [True] * len(y2)
        assert [a + b for a, b in zip(m1, m2)] == marks + [False] * (len(m1) - len(marks))
        for y in (y1, y2):                              # ends with its first end token, which is trained
            assert y.index(2) == len(y) - 1 if 2 in y else len(y) == TOY.max_new_tokens
            seen.add(2 in y)
    assert seen == {True, False}


def log_probs(policy, batch):
    hidden, targets = score.sampled(policy, batch)
    return score.place(score.linear_logprobs(hidden, policy.head_weight, targets)[0], batch["response_mask"])


def test_one_packed_row_is_two_rows():
    """Each turn's log-probs are those under its own context, x1 and x2 = x1 y1 p1."""
    policy = tiny(value_head=False, n_layer=2)
    torch.manual_seed(0)
    tokens, turn1, turn2 = score.two_turns(policy, toy_problems(), TOY, group_size=4)
    packed = log_probs(policy, {"tokens": tokens, "response_mask": turn1 | turn2})
    for row, m1, m2, found in zip(tokens, turn1, turn2, packed):
        for mask in (m1, m2):
            ids, start = row[1:][mask].tolist(), int(mask.int().argmax()) + 1
            alone = score.pack([(row[:start].tolist() + ids, [False] * start + [True] * len(ids))], 0, "cpu")
            expected = policy.logits(alone["tokens"])[0, :-1].log_softmax(-1)[range(start - 1, start - 1 + len(ids)), ids]
            close(found[mask].detach(), expected.detach(), 1e-5)


def test_offline_first_attempts_are_context():
    policy, ref = tiny(value_head=False), tiny(value_head=False, seed=1)
    with torch.no_grad():
        ref.head_weight.mul_(0)                                                   # uniform: tells whose rows they are
    torch.manual_seed(0)
    (tokens, mask), own = score.offline_first(policy, ref, toy_problems(), dataclasses.replace(TOY, offline_fraction=0.5))
    assert 0 < own.float().mean() < 1 and mask.any(1).all() and tokens.shape[1] == mask.shape[1] + 1
    packed, turn1, turn2 = score.two_turns(policy, toy_problems(), TOY, first=(tokens, mask))
    assert torch.equal(turn1[:, :mask.shape[1]], mask) and turn2.any(1).all()
    for row, whole in zip(packed.tolist(), tokens.tolist()):
        assert row[:len(whole)][:3] == whole[:3]


def test_own_tells_who_wrote_a_first_attempt(monkeypatch):
    policy, ref = tiny(value_head=False), tiny(value_head=False)
    author = {id(policy): 20, id(ref): 21}
    monkeypatch.setattr(score, "generate", lambda gpt, prompts, *_, group_size: (
        torch.tensor([[5, author[id(gpt)]] for _ in range(len(prompts) * group_size)]), torch.ones(len(prompts) * group_size, 1).bool()))
    torch.manual_seed(0)
    (tokens, _), own = score.offline_first(policy, ref, toy_problems(), dataclasses.replace(TOY, offline_fraction=0.5))
    assert tokens[:, 1].tolist() == [20 if mine else 21 for mine in own.tolist()] and 0 < own.float().mean() < 1


def test_offline_rows_have_no_first_turn_in_the_update(monkeypatch):
    _, _, online, _ = toy_rollout(monkeypatch, 2)
    *_, data, log = toy_rollout(monkeypatch, 2, dataclasses.replace(TOY, offline_fraction=1.0))
    turns = lambda d: (d["response_mask"][:, 1:] & ~d["response_mask"][:, :-1]).sum(1) + d["response_mask"][:, 0]
    assert (turns(online) == 2).all() and (turns(data) == 1).all()
    assert log["kl_1"] == 0 and log["kl_2"] > 0
    *_, data, _ = toy_rollout(monkeypatch, 1, dataclasses.replace(TOY, offline_fraction=1.0))
    assert (turns(data) == 2).all()                                               # stage I is on-policy


def turn_masks(data):
    """Both turns of a rollout's rows, told apart by the gap of p1."""
    mask = data["response_mask"]
    number = (mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]).cumsum(1)
    return mask & (number == 1), mask & (number == 2)


class Fixed:
    head_weight = None


def gradient_on_log_probs(monkeypatch, data, args):
    """d policy_loss / d logprobs (B, T-1), whatever the log-probs are."""
    logprobs = torch.zeros(data["response_mask"].shape, requires_grad=True)
    with monkeypatch.context() as m:
        m.setattr(score, "sampled", lambda gpt, micro: (micro["response_mask"], None))
        m.setattr(score, "linear_logprobs", lambda hidden, weight, targets: (logprobs[hidden], None))
        score.loss_fn(Fixed, None, dataclasses.replace(args, kl_mode="reward"), data, data)[0].backward()
    return logprobs.grad


@pytest.mark.parametrize("outcome", [lambda text: len(text) % 2, lambda text: 1, lambda text: "g" in text])
def test_stage_1_rewards_no_token_of_the_first_attempt(monkeypatch, outcome):
    *_, data, _ = toy_rollout(monkeypatch, 1, outcome=outcome)
    turn1, turn2 = turn_masks(data)
    gradient = gradient_on_log_probs(monkeypatch, data, TOY)
    close(gradient, -data["advantages"] / len(data["tokens"]))
    assert not gradient[turn1].any() and not gradient[~data["response_mask"]].any()
    assert (data["kl_weight"][turn1] == TOY.beta2).all() and (data["kl_weight"][turn2] == TOY.beta1).all()


def test_stage_2_rewards_the_first_attempt_by_its_own_outcome_alone(monkeypatch):
    """Changing every r2 moves nothing on y1; x1, p1 and padding get nothing at all."""
    found = []
    for second in (0, 1):
        outcomes = iter([lambda text: len(text) % 2, (lambda text: len(text) % 3) if second else (lambda text: 0)])
        policy, ref = tiny(value_head=False), tiny(value_head=False, seed=1).requires_grad_(False)
        monkeypatch.setattr(score, "read_answers", lambda texts, problems, args: list(texts))

        def reward(answers, problems, args):
            outcome = next(outcomes)
            return torch.tensor([float(a is not None and outcome(a) > 0) for a in answers])

        monkeypatch.setattr(score, "reward", reward)
        torch.manual_seed(3)
        data, _ = score.rollout(policy, ref, toy_problems(), 2, Words(), TOY)
        found.append((gradient_on_log_probs(monkeypatch, data, TOY), *turn_masks(data)))
    (one, turn1, turn2), (two, *_) = found
    assert torch.equal(one[turn1], two[turn1]) and one[turn1].any()
    assert not torch.equal(one[turn2], two[turn2])
    assert not one[~(turn1 | turn2)].any()


def test_single_turn_trains_the_first_attempt_alone(monkeypatch):
    *_, both, _ = toy_rollout(monkeypatch, 2, dataclasses.replace(TOY, method="multi-turn"))
    *_, data, log = toy_rollout(monkeypatch, 2, dataclasses.replace(TOY, method="single-turn"))
    turn1, turn2 = turn_masks(both)
    assert torch.equal(data["response_mask"], turn1) and not data["advantages"][turn2].any()
    close(data["advantages"][turn1], both["advantages"][turn1])


def loss_gradient(policy, ref, data, args):
    policy.zero_grad()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    stats = score.reinforce(policy, ref, data, optimizer, dataclasses.replace(args, grad_clip=1e9))
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), stats


def test_the_loss_by_plain_torch_and_micro_batches_change_nothing(monkeypatch):
    policy, ref, data, _ = toy_rollout(monkeypatch, 2)
    logp, ref_logp = [gpt.logits(data["tokens"])[:, :-1].log_softmax(-1) for gpt in (policy, ref)]
    chosen = logp.gather(2, data["tokens"][:, 1:, None])[..., 0]
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    turn1, turn2 = turn_masks(data)
    expected = (-(data["advantages"] * chosen).sum(1) + 0.01 * (kl * (turn1 | turn2)).sum(1)).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(policy.parameters()))])
    for micro_batch_size in (24, 2):
        found, stats = loss_gradient(policy, ref, data, dataclasses.replace(TOY, micro_batch_size=micro_batch_size))
        assert (found - gradient).norm() / gradient.norm() < 1e-4
        assert stats["policy_loss"] + stats["kl_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_stage_1_with_equal_second_outcomes_only_pulls_to_the_base(monkeypatch):
    """No outcome differs: without KL weights the gradient is exactly 0, and at the base the KL's is too."""
    args = dataclasses.replace(TOY, beta1=0.0, beta2=0.0)
    policy, ref, data, log = toy_rollout(monkeypatch, 1, args, outcome=lambda text: 0)
    gradient, _ = loss_gradient(policy, ref, data, args)
    assert not gradient.any() and log["no_signal"] == 1
    data["kl_weight"] = data["response_mask"].float()
    gradient, stats = loss_gradient(policy, tiny(value_head=False).requires_grad_(False), data, args)
    assert gradient.norm() < 1e-4 and abs(stats["kl_loss"]) < 1e-5


def test_stage_is_a_function_of_the_iteration():
    args = flags(iterations=10, stage1=0.3)
    assert [score.stage_of(i, args) for i in range(1, 11)] == [1] * 3 + [2] * 7
    for method in ("no-stage1", "multi-turn", "single-turn", "star"):
        assert score.stage_of(1, dataclasses.replace(args, method=method)) == 2
    assert score.stage_of(3, dataclasses.replace(args, method="star-stage2")) == 1


# ---- the warm-up -------------------------------------------------------------------------------------------------------------

def builtin_rows(n):
    tokenizer = score.builtin_tokenizer(score.Args())
    train = [score.encode_record(r, tokenizer, ARGS) for r in score.load_problems(flags(train_size=n, eval_size=10))[0]]
    return train, score.warmup_rows(train, tokenizer, ARGS), tokenizer


def test_warmup_rows_hold_complete_turns_and_train_the_attempts_alone():
    train, rows, tokenizer = builtin_rows(800)
    _, again, refine = score.turns(ARGS)
    assert len(rows) == len(train)
    kinds = {"": 0, again: 0, refine: 0}
    for problem, (ids, trained) in zip(train, rows):
        assert len(ids) == len(trained) and ids[:len(problem["prompt"])] == problem["prompt"]
        pieces = [(mark, [i for i, _ in group]) for mark, group in itertools.groupby(zip(ids, trained), key=lambda x: x[1])]
        assert [mark for mark, _ in pieces] == [False, True, False, True][:len(pieces)] and len(pieces) in (2, 4)
        assert all(y[-1] == tokenizer.eos_id and y.count(tokenizer.eos_id) == 1 for mark, y in pieces if mark)
        kinds[tokenizer.decode(pieces[2][1]) if len(pieces) == 4 else ""] += 1
    assert kinds == {"": 200, again: 400, refine: 200}                  # a quarter, a half, a quarter


def test_the_warmup_does_not_teach_correction():
    """y2 is right as often after a wrong y1 as after a right one, and as often as y1; in the same styles; not a copy."""
    train, rows, tokenizer = builtin_rows(12000)
    counts = {True: [], False: []}
    firsts, same = [], 0
    for problem, (ids, trained) in zip(train, rows):
        turns = [list(group) for mark, group in itertools.groupby(range(len(ids)), key=trained.__getitem__) if mark]
        if len(turns) == 2:
            texts = [tokenizer.decode([ids[i] for i in turn][:-1]) for turn in turns]
            right = [r == 1 for r in score.reward(score.read_answers(texts, [problem] * 2, ARGS), [problem] * 2, ARGS).tolist()]
            counts[right[0]].append(right[1])
            firsts.append(right[0])
            same += texts[0] == texts[1]
    rates = {first: sum(c) / len(c) for first, c in counts.items()}
    assert len(counts[False]) > 1000
    assert rates[False] == pytest.approx(rates[True], abs=4 * math.sqrt(0.2 / len(counts[False])))
    assert sum(firsts) / len(firsts) == pytest.approx(1 - ARGS.slips, abs=0.05)
    assert 0.1 < same / len(firsts) < 0.6


def test_a_slip_is_one_wrong_line_and_the_rest_follows_from_it():
    rng, wrong = random.Random(0), 0
    for _ in range(300):
        text = score.demonstration("What is 9 + 2 - 1 + 3 - 4?", rng, flags(slips=1.0))
        *lines, last, answer = text.split("\n")
        lines = [*lines, last]
        results = [line.split(" = ") for line in lines]
        off = [abs(eval(left) - int(result)) for left, result in results]
        assert sorted(off)[-1] == 1 and sum(off) == 1
        assert all(after[0].split()[0] == now[1] for now, after in zip(results, results[1:]))
        assert answer == f"{score.ANSWER}{results[-1][1]}".strip()
        wrong += 1
    clean = score.demonstration("What is 9 + 2 - 1?", rng, flags(slips=0.0))
    assert clean.endswith(f"{score.ANSWER}10") and wrong == 300


def test_a_file_has_one_turn_rows():
    _, rows, tokenizer = builtin_rows(20)
    problem = {"prompt": [1], "response": [2, 3]}
    assert score.warmup_rows([problem], tokenizer, flags(train_data="x")) == [([1, 2, 3], [False, True, True])]


# ---- traces of the supervised baselines --------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, expected", [
    ("star", {("w1", "R2")}), ("star-plus", {("w1", "R2"), ("r1", "R1")}),
    ("pair-sft", {("w1", "any"), ("w2", "any")}), ("pair-sft-plus", {("w1", "any"), ("w2", "any"), ("r1", "any"), ("r2", "any")}),
])
def test_which_traces_are_kept(method, expected):
    ids = {name: [20 + i] for i, name in enumerate(["r1", "r2", "w1", "w2", "w3", "R1", "R2", "W1", "W2"])}
    name = {v[0]: k for k, v in ids.items()}
    A, B = [{"question": q, "prompt": [5], "given": [], "again": AGAIN} for q in "AB"]
    traces = [(A, ids["r1"], ids["R1"], 1, 1), (A, ids["w1"], ids["R2"], 0, 1), (A, ids["w2"], ids["W1"], 0, 0),
              (A, ids["r2"], ids["W1"], 1, 0), (B, ids["w3"], ids["W2"], 0, 0)]      # B has no right answer
    found = set()
    for seed in range(20):
        for row, trained in score.trace_rows(traces, random.Random(seed), flags(method=method)):
            assert row[0] == 5 and row[2:4] == AGAIN and trained == [False] * 4 + [True]
            first, second = name[row[1]], name[row[4]]
            assert second in ("r1", "r2", "R1", "R2")
            found.add((first, "any" if "pair" in method else second))
    assert found == expected


@pytest.mark.parametrize("method, kept, trained", [
    ("star", 40, [1, 1, 1, 1, 1, 0] * 2), ("pair-sft", 40, [1, 1, 1, 1, 1] + [0] * 7), ("pair-sft", 100, [2, 2, 2, 2, 2, 2, 2] + [0] * 5),
    ("star-stage2", 40, [None] * 4 + [2, 2, 2, 0] * 2), ("star", 0, [0] * 12)])
def test_rounds_train_their_traces_once(method, kept, trained, monkeypatch):
    """Two rounds of six iterations, or one of twelve: ceil(kept / 8) steps each, from the base again but for star-stage2; and a
    run that was interrupted within a round, its rows kept in the state, has the same weights."""
    args = flags(method=method, iterations=12, stage1=0.33, rounds=2, warmup_batch_size=8, micro_batch_size=8, batch_size=2)
    row = ([5, 6, 7, 2], [False, False, True, True])
    monkeypatch.setattr(score, "draw_traces", lambda policy, batches, *_: (len(batches), {"tokens": 9}))
    monkeypatch.setattr(score, "trace_rows", lambda traces, rng, args: [row] * kept)
    steps, step = [], score.optimiser_step
    monkeypatch.setattr(score, "optimiser_step", lambda *a: steps.append(1) or step(*a))
    base, found = tiny(value_head=False), []
    for interrupted in (False, True):
        policy, ref = tiny(value_head=False), tiny(value_head=False)
        optimizer, state, counts = score.adamw([policy], 1e-3), {}, []
        with torch.no_grad():
            policy.head_weight.add_(0.01)                                         # as if stage I had trained it
        for iteration in range(1, 13):
            if not score.is_supervised(iteration, args):
                counts.append(None)
                continue
            if interrupted:
                state = json.loads(json.dumps(state))
            steps.clear()
            log, stats = score.trace_update(policy, ref, [{}] * 4, optimizer, state, iteration, None, args)
            counts.append(len(steps))
            assert log["kept"] == kept and bool(stats) == bool(steps)
            if not steps and not kept:                                            # back at the base, or where it was
                moved = not torch.equal(policy.head_weight, base.head_weight)
                assert moved == (method == "star-stage2")
        assert counts == trained
        found.append(policy.head_weight.detach().clone())
    assert torch.equal(*found)


# ---- code --------------------------------------------------------------------------------------------------------------------

CODE = [score.parse_code(raw, "built-in") for raw in score.builtin_code(12, 1)]
HUMANEVAL = {"task_id": "HumanEval/0", "entry_point": "double", "canonical_solution": "    return List and half(4 * x)\n",
             "prompt": "from typing import List\n\ndef half(x):\n    return x / 2\n\ndef double(x: int):\n"
                       "    \"\"\" >>> double(2)\n    4\n    \"\"\"\n",
             "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(5) == 10"}


def hollow(program):
    """The same functions without anything in them."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def test_right_programs_pass_and_empty_and_wrong_ones_fail():
    assert score.passes([p["cot"] for p in CODE], CODE).tolist() == [1.0] * len(CODE)
    assert score.passes([hollow(p["cot"]) for p in CODE], CODE).tolist() == [0.0] * len(CODE)
    wrong = [p["cot"].replace("return ", "return 1 - ") for p in CODE]
    assert score.passes(wrong, CODE).tolist() == [0.0] * len(CODE)
    assert score.passes([None, "", CODE[0]["cot"]], [CODE[0]] * 3).tolist() == [0, 0, 1]


def test_mbpp_setup_uses_the_program():
    raw = {"text": "t", "code": "class Node:\n    left = None", "test_list": ["assert root.left.left is None"],
           "test_setup_code": "root = Node()\r\nroot.left = Node()"}
    problem = score.parse_code(raw, "here")
    assert "Node()" not in problem["question"] and score.passes([raw["code"], "class Node: pass"], [problem] * 2).tolist() == [1, 0]


def test_humaneval_form():
    problem = score.parse_code(HUMANEVAL, "here")
    programs = [problem["cot"], "def double(x):\n    return 2 * half(2 * x)", "def double(x):\n    return x", None]
    assert score.passes(programs, [problem] * 4).tolist() == [1, 1, 0, 0]


TRICKS = ["def solution():\n    return 1.0\n((",                    # a solution of its own, in a text that does not parse
          "def solution():\n    return 1.0\n\"\"\"",
          "def plus(x):\n    raise SystemExit(0)", "plus = lambda x: globals().update(solution=lambda: 1.0)"]


@pytest.mark.parametrize("program", TRICKS)
def test_programs_that_would_rather_not_be_tested(program):
    record = {"text": "Add 1.", "code": "def plus(x):\n    return x + 1", "test_list": ["assert plus(1) == 2"]}
    problem = score.parse_code(record, "here")
    assert score.passes([program], [problem]).tolist() == [0]


def test_a_program_may_be_called_solution():
    record = {"text": "Add 1.", "code": "def solution(x):\n    return x + 1", "test_list": ["assert solution(1) == 2"]}
    problem = score.parse_code(record, "here")
    assert score.passes([problem["cot"], "def solution(x):\n    return x"], [problem] * 2).tolist() == [1, 0]


def test_read_program_takes_the_last_fenced_block():
    assert score.read_program("Sure:\n```python\na = 1\n```\nor\n```\nb = 2\n```\nDone.") == "b = 2"
    assert score.read_program("def f():\n    pass\n") == "def f():\n    pass"
    assert score.read_program("```python\na = 1") == "a = 1"
    assert score.read_program("\n") is None


@pytest.mark.parametrize("raw", [7, {}, {"text": "a", "code": "b"}, {"text": "a", "code": "b", "test_list": []},
                                 {"prompt": "a", "canonical_solution": "b", "test": "c", "entry_point": "d"}])
def test_code_records_of_another_form_are_refused(raw):
    with pytest.raises(score.InputError, match="here: neither MBPP"):
        score.parse_code(raw, "here")


# ---- runs --------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tiny checkpoint whose vocabulary is the printable characters."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pieces([chr(i) for i in range(32, 127)] + ["\n"])
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, max_len=1024, eos_id=tokenizer.eos_id,
                        pad_id=tokenizer.pad_id))
    path = tmp_path_factory.mktemp("letters") / "model"
    save_checkpoint(path, gpt, tokenizer)
    return path


SMALL = ["--iterations", "2", "--warmup-epochs", "1", "--batch-size", "4", "--group-size", "2", "--max-new-tokens", "8",
         "--eval-size", "4", "--device", "cpu"]


def test_code_runs_from_the_built_in_set_and_from_files(letters, tmp_path):
    result = run("score", tmp_path / "builtin", "--task", "code", "--model", letters, *SMALL, tiny=False)
    assert result.returncode == 0, result.stderr
    train = tmp_path / "mbpp.jsonl"
    train.write_text("\n".join(json.dumps(r | {"task_id": 505 + 10 * i}) for i, r in enumerate(score.builtin_code(20, 0))))
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(HUMANEVAL))
    data = ["--train-data", train, "--eval-data", tmp_path / "humaneval.jsonl"]
    result = run("score", tmp_path / "files", "--task", "code", "--model", letters, *data, *SMALL, tiny=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "files/summary.json").read_text())["problems"] == 1
    train.write_text(json.dumps({"question": "a", "answer": "#### 1"}))
    result = run("score", tmp_path / "bad", "--task", "code", "--model", letters, *data, *SMALL, tiny=False)
    refuse(result, "mbpp.jsonl:1: neither MBPP's form")
    assert not (tmp_path / "bad").exists()


def test_authors_split_of_mbpp(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("\n".join(json.dumps(r | {"task_id": i}) for i, r in zip(range(1, 975, 3), score.builtin_code(325, 0))))
    train, dev, _ = score.load_code(flags(train_data=str(path), eval_data=str(path)))
    assert {r["task_id"] for r in train} == set(range(601, 975, 3)) and {r["task_id"] for r in dev} == set(range(511, 601, 3))


@pytest.mark.parametrize("method", ["base", "self-refine"])
def test_methods_without_training(method, tmp_path):
    result = run("score", tmp_path / "run", "--method", method, "--vote-k", "2")
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path / "run")
    assert [r["event"] for r in log] == ["warmup", "end"] and log[0]["t2"] == log[1]["t2"]
    assert {f"vote_{n}_{kind}" for n in (2, 4) for kind in ("parallel", "corrected")} | {"last_delta"} <= log[1].keys()
    assert log[1]["fixed_t2"] == log[1]["own_t2"]                                 # the base's own attempts are the base's


@pytest.mark.parametrize("switches", [["--kl-mode", "reward"], ["--offline-fraction", "0.5"],
                                      ["--norm-std", "joint", "--gamma", "0.8"], ["--method", "single-turn"],
                                      ["--method", "no-shaping", "--turn2-weight", "11"]])
def test_every_switch_runs_through_both_stages(switches, tmp_path):
    result = run("score", tmp_path / "run", "--stage1", 0.33, *switches)
    assert result.returncode == 0, result.stderr
    stages = [r["stage"] for r in read_log(tmp_path / "run") if r["event"] == "iteration"]
    assert stages == ([2, 2, 2] if "single-turn" in switches else [1, 2, 2])


@pytest.mark.parametrize("switches, words", [
    (["--method", "scor"], ["choose from score, base"]),
    (["--group-size", "1"], ["--group-size 1"]),
    (["--stage1", "1.5"], ["--stage1 1.5", "share"]),
    (["--task", "code"], ["--task code needs --model"]),
    (["--cot", "program"], ["--cot program"]),
    (["--max-new-tokens", "250"], ["two attempts", "context"]),
])
def test_impossible_flags_are_refused(switches, words, tmp_path):
    refuse(run("score", tmp_path / "run", *switches), *words)
    assert not (tmp_path / "run").exists()


def test_all_methods_share_one_warmup(tmp_path):
    first = read_log_warmup(tmp_path / "a", "--method", "base")
    assert first == read_log_warmup(tmp_path / "b", "--method", "star")
    refine = read_log_warmup(tmp_path / "c", "--method", "self-refine")           # another p1, the same warm-up
    assert first["t1"] == refine["t1"] and first["loss"] == refine["loss"]
    result = run("score", tmp_path / "d", "--method", "multi-turn", "--model", tmp_path / "a/warmup", "--warmup-epochs", "0")
    assert result.returncode == 0, result.stderr
    found = read_log(tmp_path / "d")[0]
    assert {k: first[k] for k in ("t1", "t2", "sample")} == {k: found[k] for k in ("t1", "t2", "sample")}


def read_log_warmup(out, *switches):
    result = run("score", out, *switches)
    assert result.returncode == 0, result.stderr
    return read_log(out)[0]
