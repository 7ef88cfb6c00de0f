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
from test_scripts import read_log, refuse, run

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
    A1, A2 = [A.view(-1, K) for A in score.turn_advantages(*G.T, torch.ones(len(G), dtype=torch.bool), 2, args)]
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


def advantages(stage, on1=ALL, kl=(0 * R1, 0 * R1), **changed):
    args = flags(group_size=4, **changed)
    return score.turn_advantages(*score.turn_returns(R1, R2, *kl, stage, args), on1, stage, args)


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
    A1, A2 = advantages(1, kl=(ARGS.beta2 * k1[0], ARGS.beta1 * k1[1]))
    close(A1, [-0.04, 0.04, 0.013333, -0.013333], 1e-6)
    close(A2, [0.656667, 0.67, -0.67, -0.656667], 1e-6)


def test_the_control_of_the_bonus_weighs_the_second_turn_of_stage_2_alone():
    for stage, weight in (1, 1), (2, 11):
        A1, A2 = advantages(stage, method="no-shaping", turn2_weight=11.0)
        plain1, plain2 = advantages(stage, method="no-shaping")
        assert torch.equal(A1, plain1) and torch.equal(A2, weight * plain2)


def made(texts, answers, outcomes, ids=((7, 2),) * 4, ended=(True,) * 4):
    """Attempts as one_turn() returns them."""
    columns = {"ids": map(list, ids), "text": texts, "answer": answers, "outcome": map(float, outcomes),
               "strict": [outcome == 1 for outcome in outcomes], "ended": ended}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def test_measures_are_shares_of_all_problems():
    first = made(["ab"] * 4, [1.0, 2.0, None, 3.0], R1, ended=(True, True, False, True))
    second = made(["ab", "abc", "", "ab"], [1.0, 2.5, None, None], R2, [(7, 8, 2)] * 4, (True, True, False, False))
    found = score.means(score.turn_measures(first, second))
    assert found.pop("edit_histogram") == pytest.approx([0.5, 0, 0.25, 0, 0, 0, 0, 0, 0, 0.25])
    assert found == pytest.approx({
        "accuracy": 0.5, "strict_accuracy": 0.5, "outcome": 1.0, "t1": 0.5, "t2": 0.5, "delta": 0.0, "i->c": 0.25, "c->i": 0.25,
        "changed": 0.5, "unparsed": 3 / 8, "edit_ratio": (0 + 1 / 5 + 1 + 0) / 4, "truncated": 3 / 8, "truncated_1": 0.25,
        "truncated_2": 0.5, "response_length": 5, "length_1": 2, "length_2": 3})


def test_conditional_rates(monkeypatch):
    rates = {"t1": 0.75, "i->c": 0.125, "c->i": 0.25}
    monkeypatch.setattr(score, "evaluate", lambda *_: rates)
    assert score.turn_report(None, [], None, ARGS) == rates | {"right_if_wrong": 0.5, "wrong_if_right": 1 / 3}
    rates["t1"], rates["i->c"] = 1.0, 0.0
    assert score.turn_report(None, [], None, ARGS)["right_if_wrong"] == 0.0


def test_edit_ratio():
    assert score.edit_ratio("kitten", "sitting") == 3 / 13
    assert score.edit_ratio("same", "same") == score.edit_ratio("", "") == 0
    assert score.edit_ratio("", "abc") == score.edit_ratio("abc", "") == 1


# ---- O5: the KL --------------------------------------------------------------------------------------------------------------

def exact_kl(z, r):
    eye = torch.eye(z.shape[-1], dtype=z.dtype)
    return score.linear_stats(z, eye, torch.zeros(z.shape[:-1], dtype=torch.long), r, eye)[2]


def test_exact_kl_and_its_gradient():
    p, ref = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    z = p.log().requires_grad_()
    kl = exact_kl(z[None], ref.log()[None])
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
    G1, _ = score.turn_returns(zero, zero, k1, zero, 1, ARGS)
    value = -sum(total[y].exp().detach() * g * total[y] for y, g in zip(paths, G1))
    reward_form = torch.autograd.grad(value, theta, retain_graph=True)[0]
    close(reward_form, true, 1e-12)
    close(reward_form, [0.138930, -0.099142, 0.184200, 0.047232, -0.034153, 0.053201, -0.113332], 1e-6)

    rows = lambda gpt, y: torch.stack([torch.stack([torch.zeros((), dtype=torch.float64), gpt[state]]) for state, _ in path(y)])
    loss = sum(total[y].exp().detach() * exact_kl(rows(own, y), rows(ref, y).detach()).sum() for y in paths)
    close(torch.autograd.grad(loss, theta)[0], [0.117502, -0.111344, 0.183574, *reward_form[3:].tolist()], 1e-6)


# ---- masks, contexts and gradients on a small GPT ----------------------------------------------------------------------------

AGAIN = [9, 10]
TOY = flags(max_new_tokens=7, micro_batch_size=4, minibatch_size=24, batch_size=6, group_size=4)


def toy_problems(n=6):
    return [{"question": str(i), "prompt": [5] * (1 + i % 3) + [6], "again": AGAIN, "close": [], "gold": 1.0} for i in range(n)]


def toy_rollout(monkeypatch, stage, args=TOY, outcome=lambda text: len(text) % 2, seed=3):
    policy, ref = tiny(value_head=False), tiny(value_head=False, seed=1).requires_grad_(False)
    monkeypatch.setattr(score, "read_answers", lambda texts, problems, args: list(texts))
    outcomes = lambda answers, problems, args: torch.tensor([float(a is not None and outcome(a) > 0) for a in answers])
    monkeypatch.setattr(score, "reward", outcomes)
    torch.manual_seed(seed)
    data, log = score.rollout(policy, ref, toy_problems(), stage, Words(), args)
    return policy, ref, data, log


def toy_episodes(policy, args=TOY):
    """Four episodes of each problem: the problems, both attempts, and their rows."""
    problems = [p for p in toy_problems() for _ in range(4)]
    torch.manual_seed(0)
    first, second = score.two_turns(policy, problems, Words(), args)
    return problems, first, second, score.turn_rows(policy, problems, first, second)


def test_a_row_is_question_attempt_correction_prompt_attempt():
    problems, first, second, (tokens, turn1, turn2) = toy_episodes(tiny(value_head=False))
    seen = set()
    for row, m1, m2, problem, *attempts in zip(tokens.tolist(), turn1.tolist(), turn2.tolist(), problems, first, second):
        y1, y2 = [[t for t, m in zip(row[1:], mask) if m] for mask in (m1, m2)]
        assert [y1, y2] == [y["ids"] for y in attempts]
        whole = problem["prompt"] + y1 + AGAIN + y2
        assert row == whole + [0] * (len(row) - len(whole))
        marks = [False] * (len(problem["prompt"]) - 1) + [True] * len(y1) + [False] * len(AGAIN) + [True] * len(y2)
        assert [a + b for a, b in zip(m1, m2)] == marks + [False] * (len(m1) - len(marks))
        for y, found in zip((y1, y2), attempts):        # ends with its first end token, which is trained
            assert y.index(2) == len(y) - 1 if 2 in y else len(y) == TOY.max_new_tokens
            assert found["ended"] == (2 in y) and found["text"] == Words().decode(t for t in y if t != 2)
            seen.add(2 in y)
    assert seen == {True, False}


def test_an_attempt_that_ran_out_of_room_has_no_answer(monkeypatch):
    monkeypatch.setattr(score, "read_answers", lambda texts, problems, args: list(texts))
    monkeypatch.setattr(score, "reward", lambda answers, problems, args: torch.ones(len(answers)))
    _, first, second, _ = toy_episodes(tiny(value_head=False))
    assert {y["ended"] for y in first} == {True, False}
    for y in first + second:
        assert (y["answer"], y["outcome"]) == ((y["text"], 1.0) if y["ended"] else (None, 0.0))


def log_probs(policy, batch):
    hidden, targets = score.sampled(policy, batch)
    return score.place(score.linear_logprobs(hidden, policy.head_weight, targets)[0], batch["response_mask"])


def test_one_packed_row_is_two_rows():
    """Each turn's log-probs are those under its own context, x1 and x2 = x1 y1 p1."""
    policy = tiny(value_head=False, n_layer=2)
    *_, (tokens, turn1, turn2) = toy_episodes(policy)
    packed = log_probs(policy, {"tokens": tokens, "response_mask": turn1 | turn2})
    for row, m1, m2, found in zip(tokens, turn1, turn2, packed):
        for mask in (m1, m2):
            ids, start = row[1:][mask].tolist(), int(mask.int().argmax()) + 1
            alone = score.pack([(row[:start].tolist() + ids, [False] * start + [True] * len(ids))], policy)
            expected = policy.logits(alone["tokens"])[0, :-1].log_softmax(-1)[range(start - 1, start - 1 + len(ids)), ids]
            close(found[mask].detach(), expected.detach(), 1e-5)


def test_a_given_first_attempt_is_taken_and_the_others_are_sampled(monkeypatch):
    policy, problems = tiny(value_head=False), toy_problems()
    given = made(["kk"], [3.0], [1], [(10, 10, 2)])[0]
    problems[1] |= {"first": given}
    problems[4] |= {"first": given}
    calls, respond = [], score.respond
    monkeypatch.setattr(score, "respond", lambda gpt, batch, *rest: calls.append(batch) or respond(gpt, batch, *rest))
    first, second = score.two_turns(policy, problems, Words(), TOY)
    assert [p["question"] for p in calls[0]] == ["0", "2", "3", "5"]              # nothing is sampled or checked twice
    assert [y is given for y in first] == [i in (1, 4) for i in range(6)]
    assert [p["prompt"] for p in calls[1]] == [p["prompt"] + y["ids"] + AGAIN for p, y in zip(problems, first)]
    assert len(second) == 6
    calls.clear()
    score.two_turns(policy, [p | {"first": given} for p in problems], Words(), TOY)
    assert len(calls) == 1


def test_a_first_attempt_by_the_base_is_context(monkeypatch):
    """Tells apart who wrote what: the policy writes token 7, the base 8."""
    policy, ref = tiny(value_head=False), tiny(value_head=False).requires_grad_(False)
    author = {id(policy): 7, id(ref): 8}

    def generate(gpt, prompts, max_new_tokens, temperature, group_size, device):
        batch = score.pack([(prompt + [author[id(gpt)], 2], [False] * len(prompt) + [True] * 2) for prompt in prompts], gpt)
        return batch["tokens"], batch["response_mask"], -torch.ones(batch["response_mask"].shape)

    monkeypatch.setattr(score, "generate", generate)
    torch.manual_seed(0)
    data, _ = score.rollout(policy, ref, toy_problems(), 2, Words(), dataclasses.replace(TOY, offline_fraction=0.5))
    starts = [1 + i % 3 + 1 for i in range(6) for _ in range(4)]                  # the length of x1
    own = [row[start] == 7 for row, start in zip(data["tokens"].tolist(), starts)]
    assert {True, False} == set(own)
    for row, mask, turn1, start, mine in zip(*(data[k].tolist() for k in ("tokens", "response_mask", "turn1_mask")), starts, own):
        assert row[start + 2:start + 6] == [*AGAIN, 7, 2]                         # y2 is always the policy's
        marks = [False] * (start - 1) + [mine] * 2 + [False] * 2
        assert turn1 == marks + [False] * (len(turn1) - len(marks))
        assert mask == marks + [True] * 2 + [False] * (len(mask) - len(marks) - 2)


def test_offline_rows_have_no_first_turn_in_the_update(monkeypatch):
    _, _, online, _ = toy_rollout(monkeypatch, 2)
    policy, ref, data, _ = toy_rollout(monkeypatch, 2, dataclasses.replace(TOY, offline_fraction=1.0))
    turns = lambda d: (d["response_mask"][:, 1:] & ~d["response_mask"][:, :-1]).sum(1) + d["response_mask"][:, 0]
    assert (turns(online) == 2).all() and (turns(data) == 1).all()
    _, stats = loss_gradient(policy, ref, data, TOY)
    assert stats["kl_1"] == 0 and stats["kl_2"] > 0
    *_, data, _ = toy_rollout(monkeypatch, 1, dataclasses.replace(TOY, offline_fraction=1.0))
    assert (turns(data) == 2).all()                                               # stage I is on-policy


def turn_masks(data):
    """Both turns of a rollout's rows, told apart by the gap of p1."""
    mask = data["response_mask"]
    number = (mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]).cumsum(1)
    return mask & (number == 1), mask & (number == 2)


class Fixed:
    head_weight = None


def gradient_on_log_probs(monkeypatch, data):
    """d policy_loss / d logprobs (B, T-1), whatever the log-probs are."""
    logprobs = torch.zeros(data["response_mask"].shape, requires_grad=True)
    with monkeypatch.context() as m:
        m.setattr(score, "sampled", lambda gpt, micro: (micro["response_mask"], None))
        m.setattr(score, "linear_stats", lambda hidden, *_: (logprobs[hidden], *[torch.zeros(int(hidden.sum()))] * 3))
        score.loss_fn(Fixed, Fixed, data, data)[0].backward()
    return logprobs.grad


@pytest.mark.parametrize("outcome", [lambda text: len(text) % 2, lambda text: 1, lambda text: "g" in text])
def test_stage_1_rewards_no_token_of_the_first_attempt(monkeypatch, outcome):
    *_, data, _ = toy_rollout(monkeypatch, 1, outcome=outcome)
    turn1, turn2 = turn_masks(data)
    gradient = gradient_on_log_probs(monkeypatch, data)
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
        found.append((gradient_on_log_probs(monkeypatch, data), *turn_masks(data)))
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


@pytest.mark.parametrize("stage", [1, 2])
def test_the_kl_is_in_the_loss_or_in_the_returns(monkeypatch, stage):
    """--kl-mode reward takes c k1, summed over a turn, from that turn's return, before leave-one-out; the loss then has no KL."""
    policy, ref, data, _ = toy_rollout(monkeypatch, stage)
    *_, shifted, _ = toy_rollout(monkeypatch, stage, dataclasses.replace(TOY, kl_mode="reward"))
    assert torch.equal(data["tokens"], shifted["tokens"]) and not shifted["kl_weight"].any()
    k1 = (log_probs(policy, data) - log_probs(ref, data)).detach()
    for mask, c in zip(turn_masks(data), (TOY.beta2 if stage == 1 else TOY.beta1, TOY.beta1)):
        assert torch.equal(data["kl_weight"][mask], torch.full((int(mask.sum()),), c))
        penalty = c * (k1 * mask).sum(1).view(-1, 4)
        expected = (penalty.sum(1, keepdim=True) - penalty) / 3 - penalty
        close((shifted["advantages"] - data["advantages"])[mask], expected.view(-1, 1).expand(mask.shape)[mask], 1e-5)


def loss_gradient(policy, ref, data, args):
    optimizer, loss_of = torch.optim.SGD(policy.parameters(), lr=0.0), functools.partial(score.loss_fn, policy, ref)
    gradient = []
    optimizer.register_step_pre_hook(lambda *_: gradient.extend(p.grad.flatten() for p in policy.parameters()))
    stats = score.optimiser_step(loss_of, data, optimizer, dataclasses.replace(args, grad_clip=1e9))
    return torch.cat(gradient), stats


def test_the_loss_by_plain_torch_and_micro_batches_change_nothing(monkeypatch):
    policy, ref, data, _ = toy_rollout(monkeypatch, 2)
    logp, ref_logp = [gpt.logits(data["tokens"])[:, :-1].log_softmax(-1) for gpt in (policy, ref)]
    chosen, ref_chosen = [x.gather(2, data["tokens"][:, 1:, None])[..., 0] for x in (logp, ref_logp)]
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    turn1, turn2 = turn_masks(data)
    both = turn1 | turn2
    expected = (-(data["advantages"] * chosen).sum(1) + 0.01 * (kl * both).sum(1)).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(policy.parameters()), retain_graph=True)])
    logged = {"kl": (kl * both).sum(1).mean(), "kl_1": (kl * turn1).sum(1).mean(), "kl_2": (kl * turn2).sum(1).mean(),
              "kl_k1": ((chosen - ref_chosen) * both).sum(1).mean(), "entropy": -(logp.exp() * logp).sum(-1)[both].mean()}
    for micro_batch_size in (24, 2):
        found, stats = loss_gradient(policy, ref, data, dataclasses.replace(TOY, micro_batch_size=micro_batch_size))
        assert (found - gradient).norm() / gradient.norm() < 1e-4
        assert stats["policy_loss"] + stats["kl_loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert {name: stats[name] for name in logged} == pytest.approx({k: v.item() for k, v in logged.items()}, rel=1e-4)


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
    train = [score.encode_problem(p, tokenizer, ARGS) for p in score.load_problems(flags(train_size=n, eval_size=10))[0]]
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
    """y2 repeats y1, or is right as often after a wrong y1 as after a right one: it knows nothing of y1."""
    train, rows, tokenizer = builtin_rows(12000)
    fresh, firsts, same = {True: [], False: []}, [], 0
    for problem, (ids, trained) in zip(train, rows):
        turns = [list(group) for mark, group in itertools.groupby(range(len(ids)), key=trained.__getitem__) if mark]
        if len(turns) == 2:
            texts = [tokenizer.decode([ids[i] for i in turn][:-1]) for turn in turns]
            first, second = score.reward(score.read_answers(texts, [problem] * 2, ARGS), [problem] * 2, ARGS).tolist()
            firsts.append(first)
            same += texts[0] == texts[1]
            if texts[0] != texts[1]:
                fresh[first == 1].append(second)
    turns = len(firsts)                                                   # of 100 drawn anew 35 are right: 50 * 35 + 50 * 65 differ
    assert sum(firsts) / turns == pytest.approx(1 - ARGS.wrong, abs=0.02)
    assert 1 - same / turns == pytest.approx((1 - ARGS.copies) / 2, abs=0.01)
    assert len(fresh[False]) / (len(fresh[True]) + len(fresh[False])) == pytest.approx(1 - ARGS.wrong_again, abs=0.08)
    assert all(fresh[False]) and not any(fresh[True])                        # what differs from one of two answers is the other


def test_an_attempt_announces_its_answer_and_then_works_it_out():
    rng, answers = random.Random(0), []
    for wrong in (0, 1):
        text = score.demonstration(9, [-2, 1, -4], rng, wrong)
        answer, _, work = text.removeprefix(score.ANSWER).partition("\n")
        assert text.startswith(score.ANSWER) and work == "9 - 2 = 7\n7 + 1 = 8\n8 - 4 = 4"
        answers.append(answer)
    assert answers == ["4", "8"]                                             # 8: without the last operation
    texts = [text, text + score.ANSWER + "4"]
    problems = [{"gold": 4.0, "answer_first": True}, {"gold": 4.0}]
    assert score.read_answers([text, text + score.ANSWER + "4"], problems[:1] * 2, ARGS) == [8, 8]   # the first announcement counts
    assert score.read_answers([texts[1]] * 2, problems, ARGS) == [8, 4]
    assert [score.in_form(text, problem, ARGS) for problem in problems] == [True, False]


def test_builtin_problems_stay_between_0_and_9():
    train, _, tokenizer = builtin_rows(2000)
    for problem in train:
        start, chain = problem["chain"]
        totals = [start + sum(chain[:i]) for i in range(len(chain) + 1)]
        assert 1 <= len(chain) <= 4 and set(totals) <= set(range(10)) and totals[-1] == problem["gold"]
        assert tokenizer.decode(problem["response"][:-1]) == problem["cot"]


def test_controls_tell_mending_from_solving_anew(monkeypatch):
    """Three problems with answers 1, 2, 3. One policy copies its first attempt's last line, one knows the answer: after another
    question's attempt the first is right where the answers happen to agree, the second always."""
    problems = [{"prompt": [0] * n, "gold": float(n)} for n in (1, 2, 3)]
    works = {1: "5 - 4 = 1", 2: "1 + 0 = 1", 3: "4 - 2 = 2"}                 # of 1 shows the answer, of 2 and 3 not
    text = lambda p, first: f"{score.ANSWER}{first}\n{works[len(p['prompt'])]}"
    first = lambda p: {"ids": [7], "text": text(p, 9), "answer": 9.0, "outcome": 0.0, "ended": True}
    monkeypatch.setattr(score, "one_turn", lambda policy, batch, *rest: [first(p) for p in batch])

    def evaluate(mends):
        right = lambda p: float(p["first"]["text"].endswith(f" = {p['gold']:.0f}")) if mends else 1.0
        return lambda policy, problems, *rest: {"t2": sum(map(right, problems)) / len(problems)}

    monkeypatch.setattr(score, "evaluate", evaluate(True))
    assert score.controls(None, problems, None, ARGS) == {"swapped_t2": 2 / 3, "shown": 1 / 3,
                                                          "mended_shown": 1, "mended_hidden": 0}
    monkeypatch.setattr(score, "evaluate", evaluate(False))
    assert score.controls(None, problems, None, ARGS) == {"swapped_t2": 1, "shown": 1 / 3, "mended_shown": 1, "mended_hidden": 1}
    for others in ([p | {"gold": "\\boxed{1}"} for p in problems], [{"prompt": p["prompt"]} for p in problems]):    # LaTeX; code
        args = dataclasses.replace(ARGS, task="math" if "gold" in others[0] else "code", train_data="x")
        assert score.controls(None, others, None, args) == {"swapped_t2": 1, "shown": 0, "mended_shown": None, "mended_hidden": 1}


def test_a_file_has_one_turn_rows():
    _, rows, tokenizer = builtin_rows(20)
    problem = {"prompt": [1], "response": [2, 3]}
    assert score.warmup_rows([problem], tokenizer, flags(train_data="x")) == [([1, 2, 3], [False, True, True])]


def test_latex_is_asked_for_in_the_box_that_counts_as_its_form():
    args, letters = flags(train_data="x"), score.Tokenizer.from_pieces([chr(i) for i in range(32, 127)] + ["\n"])
    for answer, gold in ((r"\boxed{4\pi}", r"\boxed{4\pi}"), ("4", 4.0)):
        problem = score.encode_problem({"question": "Which?", "cot": "So.", "answer": answer, "gold": gold}, letters, args)
        asked = 'the answer is: ' + (r"\boxed{answer}" if answer != "4" else "answer") + '"'
        assert all(asked in letters.decode(problem[part]) for part in ("prompt", "again"))
        assert score.in_form(f"So.\nTherefore, the answer is: {answer}", problem, args)


# ---- traces of the supervised baselines --------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, expected", [
    ("star", {("w1", "R2")}), ("star-plus", {("w1", "R2"), ("r1", "R1")}),
    ("pair-sft", {("w1", "any"), ("w2", "any")}), ("pair-sft-plus", {("w1", "any"), ("w2", "any"), ("r1", "any"), ("r2", "any")}),
])
def test_which_traces_are_kept(method, expected):
    ids = {name: [20 + i] for i, name in enumerate(["r1", "r2", "w1", "w2", "w3", "R1", "R2", "W1", "W2"])}
    name = {v[0]: k for k, v in ids.items()}
    attempt = lambda name: {"ids": ids[name], "ended": True, "outcome": float(name[0] in "rR")}
    A, B = [{"question": q, "prompt": [5], "again": AGAIN, "close": []} for q in "AB"]
    traces = [(p, attempt(y1), attempt(y2)) for p, y1, y2 in (
        (A, "r1", "R1"), (A, "w1", "R2"), (A, "w2", "W1"), (A, "r2", "W1"), (B, "w3", "W2"))]        # B has no right answer
    found = set()
    for seed in range(20):
        for row, trained in score.trace_rows(traces, random.Random(seed), flags(method=method)):
            assert row[0] == 5 and row[2:4] == AGAIN and trained == [False] * 4 + [True]
            first, second = name[row[1]], name[row[4]]
            assert second in ("r1", "r2", "R1", "R2")
            found.add((first, "any" if "pair" in method else second))
    assert found == expected


@pytest.mark.parametrize("method, kept, trained", [
    ("star", 40, [1, 1, 1, 1, 1, 0] * 2), ("pair-sft", 40, [1, 1, 1, 1, 1] + [0] * 7),
    ("pair-sft", 100, [2, 2, 2, 2, 2, 2, 2] + [0] * 5),
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
        monkeypatch.setattr(score, "load_checkpoint", lambda folder: (ref, None))       # the warm-up's
        optimizer, state, counts = score.adamw([policy], 1e-3), {}, []
        with torch.no_grad():
            policy.head_weight.add_(0.01)                                         # as if stage I had trained it
        for iteration in range(1, 13):
            if score.stage_of(iteration, args) == 1:
                counts.append(None)
                continue
            if interrupted:
                state = json.loads(json.dumps(state))
            steps.clear()
            log = score.trace_update(policy, ref, [{}] * 4, optimizer, iteration, state, None, args)
            counts.append(len(steps))
            assert log["kept"] == kept and ("loss" in log) == bool(steps)
            if not steps and not kept:                                            # back at the base, or where it was
                moved = not torch.equal(policy.head_weight, base.head_weight)
                assert moved == (method == "star-stage2")
        assert counts == trained
        found.append(policy.head_weight.detach().clone())
    assert torch.equal(*found)


# ---- code --------------------------------------------------------------------------------------------------------------------

def small_programs(n, seed):
    """n problems in MBPP's form."""
    kinds = [("plus", "adds {} to a number", "x + {}"), ("times", "multiplies a number by {}", "x * {}"),
             ("above", "tells whether a number is above {}", "x > {}")]
    rng, records = random.Random(seed), []
    for i in range(n):
        name, text, body = rng.choice(kinds)
        number, inputs = rng.randint(2, 99), rng.sample(range(-100, 100), 3)
        code = f"def {name}_{number}(x):\n    return {body.format(number)}"
        tests = [f"assert {name}_{number}({x}) == {eval(body.format(number), {'x': x})}" for x in inputs]
        records.append({"text": f"Write function {i}, that {text.format(number)}.", "code": code, "test_list": tests})
    return records


CODE = [score.parse_code(raw, "here") for raw in small_programs(12, 1)]
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


def test_code_runs_from_files(letters, tmp_path):
    train = tmp_path / "mbpp.jsonl"
    train.write_text("\n".join(json.dumps(r | {"task_id": 505 + 10 * i}) for i, r in enumerate(small_programs(20, 0))))
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(HUMANEVAL))
    data = ["--train-data", train, "--eval-data", tmp_path / "humaneval.jsonl"]
    result = run("score", tmp_path / "files", "--task", "code", "--model", letters, *data, *SMALL, tiny=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "files/summary.json").read_text())["problems"] == 1
    train.write_text(json.dumps({"question": "a", "answer": "#### 1"}))
    result = run("score", tmp_path / "bad", "--task", "code", "--model", letters, *data, *SMALL, tiny=False)
    refuse(result, "mbpp.jsonl:1: --task code: neither MBPP's form")
    assert not (tmp_path / "bad").exists()


def test_authors_split_of_mbpp(tmp_path, capsys):
    path, numbers, records = tmp_path / "mbpp.jsonl", range(1, 975, 3), small_programs(325, 0)
    path.write_text("\n".join(json.dumps(r | {"task_id": i}) for i, r in zip(numbers, records)))
    asks = {score.parse_code(r, "here")["question"]: i for i, r in zip(numbers, records)}
    args = flags(task="code", train_data=str(path), eval_data=str(path))
    found = [{asks[p["question"]] for p in split} for split in score.load_problems(args)]
    assert found == [{i for i in numbers if low <= i <= high} for low, high in ((601, 974), (511, 600), (11, 510))]
    assert "warning" not in capsys.readouterr().out                              # the same file, but no question on both sides
    path.write_text("\n".join(json.dumps(r | {"task_id": 601 + i}) for i, r in enumerate(records)))
    train, dev, test = score.load_problems(args)                                 # the training split alone: a tenth of it is dev
    assert (len(train), len(dev), len(test)) == (293, 32, 325)


def test_both_prompts_end_with_the_first_lines_of_a_program():
    tokenizer = Tokenizer.from_pieces([chr(i) for i in range(32, 127)] + ["\n"])
    args = flags(cot="program", train_data="x")
    raw = {"question": "What is 2 + 3?", "answer_cot": 'def solution():\n    """What is 2 + 3?"""\n    return 2 + 3',
           "answer_value": "5"}
    problem = score.encode_problem(score.parse_record(raw, args), tokenizer, args)
    header = 'def solution():\n    """What is 2 + 3?"""\n'
    assert tokenizer.decode(problem["prompt"]) == f"Question:\nWhat is 2 + 3?\nAnswer reasoning:\n{header}"
    assert tokenizer.decode(problem["again"]).endswith("Only output the final correct Python program!\n"
                                                       f"Answer reasoning:\n{header}")
    assert tokenizer.decode(problem["response"][:-1]) == "    return 2 + 3"
    assert score.read_answers(["    return 2 + 3", "    return 6", "    return"], [problem] * 3, args) == [5.0, 6.0, None]


@pytest.mark.parametrize("method", ["base", "self-refine"])
def test_methods_without_training(method, tmp_path):
    result = run("score", tmp_path / "run", "--method", method, "--vote-k", "3", pictures=method == "base")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/turns.png").read_bytes().startswith(b"\x89PNG" if method == "base" else b"")     # with the votes
    log = read_log(tmp_path / "run")
    assert [r["event"] for r in log] == ["warmup", "end"] and log[0]["t2"] == log[1]["t2"]
    assert {f"vote_{n}_{kind}" for n in (2, 4, 6) for kind in ("parallel", "corrected")} | {"last_delta"} <= log[1].keys()
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
    (["--method", "scor"], ["--method", "score", "single-turn"]),
    (["--group-size", "1"], ["--group-size 1"]),
    (["--stage1", "1.5"], ["--stage1 1.5", "share"]),
    (["--task", "code"], ["--task code", "--train-data"]),
    (["--cot", "program"], ["--cot program"]),
    (["--max-new-tokens", "250"], ["context"]),
    (["--batch-size", "9"], ["--minibatch-size 32", "36 rows"]),
    (["--method", "single-turn", "--gamma", "0.8"], ["--gamma"]),
    (["--method", "single-turn", "--norm-std", "joint"], ["--norm-std joint"]),
    (["--kl-mode", "reward", "--turn2-weight", "11"], ["--turn2-weight"]),
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
