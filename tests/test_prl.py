"""What prl.py adds: exact gradients by enumeration, optimum identities, tables of steps and anchors, group norm, loss, pass@k."""
import copy
import dataclasses
import functools
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

import prl
from model import GPT, GPTConfig, InputError, Tokenizer
from test_losses import Words, close, masks, rows
from test_scripts import TINY, refuse, run

ARGS = dataclasses.replace(prl.Args(), device="cpu")
FIXTURES = Path(__file__).parent / "fixtures"


def flags(**changes):
    return dataclasses.replace(ARGS, **changes)


def outcomes_with_steps(steps="newline", **changes):
    """Args whose weight of a token is r itself, in place of the group's A_i, minus S / eta: prm's, but with any steps."""
    args = flags(method="prm", **changes)
    args.steps = steps
    return args


def test_the_start_is_the_default_anchor_and_the_line_the_default_step():
    assert (ARGS.method, ARGS.steps, ARGS.anchor, ARGS.agg) == ("prl", "newline", "start", "token")


# ---- exact gradients on a tabular policy -------------------------------------------------------------------------------------

PREFIXES = ["", "0", "1", "00", "01", "10", "11"]
THETA = [0.5, -1, 1, 0.8, -0.4, 0.3, -1.2]
REF = torch.tensor([0, 0.5, -0.5, 0, 1, -1, 0.2], dtype=torch.float64)
ETA = 2.0
SEQUENCES = list(itertools.product((0, 1), repeat=3))
TRUE = [0.073511, 0.079360, -0.068347, -0.023616, 0.041472, 0.014323, -0.024285]


def log_policy(logits):
    """log P(action | prefix) (8, 3) of all sequences under logits of token 1, one per prefix."""
    place = torch.tensor([[PREFIXES.index("".join(map(str, s[:t]))) for t in range(3)] for s in SEQUENCES])
    sign = torch.tensor(SEQUENCES).double() * 2 - 1
    return torch.nn.functional.logsigmoid(sign * logits[place])


class Tabular:
    """The policy with logits theta beside the reference, as tensors in the scripts' layout: two prompt columns with garbage in
    the log-ratio, three sampled tokens, one column of padding with garbage."""
    newline = torch.tensor([False, True])                                    # token 1 ends a line

    def __init__(self, theta):
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        self.logp, self.ref = log_policy(self.theta), log_policy(REF)
        self.delta = (self.logp - self.ref).detach()
        self.r = torch.tensor([float(sum(s) == 2) for s in SEQUENCES], dtype=torch.float64)
        self.prob = self.logp.sum(1).exp()
        self.mask = torch.zeros(8, 6, dtype=torch.bool)
        self.mask[:, 2:5] = True
        self.tokens = torch.ones(8, 7, dtype=torch.long)                     # a prompt and a padding of line breaks
        self.tokens[:, 3:6] = torch.tensor(SEQUENCES)
        self.ratios = torch.full((8, 6), 7.0, dtype=torch.float64)
        self.ratios[:, 2:5] = self.delta

    def objective(self):
        kl = (self.prob * (self.logp - self.ref).sum(1)).sum()
        return (self.prob * self.r).sum(), kl, (self.prob * self.r).sum() - kl / ETA

    def true_gradient(self):
        return torch.autograd.grad(self.objective()[2], self.theta, retain_graph=True)[0]

    def gradient(self, weights):
        """sum over sequences of prob * sum_t weight_t * grad log policy(a_t | s_t)."""
        return torch.autograd.grad((self.prob.detach()[:, None] * weights * self.logp).sum(), self.theta, retain_graph=True)[0]

    def script_gradient(self, **changes):
        """With the weights of prl.token_advantages."""
        args = outcomes_with_steps(eta=ETA, **changes)
        weights, _, _ = prl.token_advantages(self.r, self.ratios, self.tokens, self.mask, self.newline, args)
        assert not weights[~self.mask].any()
        return self.gradient(weights[:, 2:5])


def against_the_true(gradient, true):
    return ((gradient - true).norm() / true.norm()).item(), torch.cosine_similarity(gradient, true, dim=0).item()


def test_the_objective_and_its_gradient():
    reward, kl, objective = Tabular(THETA).objective()
    assert (reward.item(), kl.item(), objective.item()) == pytest.approx((0.486633, 0.462695, 0.255285), abs=1e-6)
    close(Tabular(THETA).true_gradient(), TRUE, 1e-6)


@pytest.mark.parametrize("changes", [dict(steps="token"), dict(steps="token", anchor="end"), dict(steps="length", step_len=2),
                                     dict(steps="length", step_len=3), dict(steps="newline"), dict(steps="length", step_len=1)])
def test_suffixes_from_the_token_the_step_start_or_the_whole_response_have_the_exact_gradient(changes):
    table = Tabular(THETA)
    error, cosine = against_the_true(table.script_gradient(**changes), table.true_gradient())
    assert error < 1e-9 and cosine > 1 - 1e-12


@pytest.mark.parametrize("changes, entries, error, cosine", [
    (dict(steps="length", step_len=2), {0: 0.132262}, 0.4213, 0.9597),
    (dict(steps="length", step_len=3), {0: 0.132262, 1: 0.023688, 2: 0.023440}, 0.8776, 0.6368),
    (dict(steps="newline"), {0: 0.049756, 1: 0.054834, 2: -0.016997}, 0.4422, 0.9336),
])
def test_the_step_end_anchor_is_biased(changes, entries, error, cosine):
    table = Tabular(THETA)
    found = table.script_gradient(anchor="end", **changes)
    close(found, [entries.get(i, value) for i, value in enumerate(TRUE)], 1e-6)
    assert against_the_true(found, table.true_gradient()) == pytest.approx((error, cosine), abs=1e-4)


def wrong_split(table):
    """A line break that opens a step in place of ending one."""
    step = (torch.where(table.mask, table.tokens[:, 1:], 0) == 1).cumsum(1)
    anchor = prl.anchor_index(step, table.mask, "start")
    return table.r[:, None] - prl.suffix(table.ratios, table.mask).gather(1, anchor)[:, 2:5] / ETA


@pytest.mark.parametrize("weights, error, cosine", [
    (wrong_split, 0.2679, 0.9699),
    (lambda t: t.r[:, None] - (prl.suffix(t.ratios, t.mask)[:, 2:5] - t.delta) / ETA, 1.0076, 0.5874),     # without the token's own
    (lambda t: t.r[:, None] - t.delta / ETA, 0.0884, 0.9984),                                                 # only the token's own
    (lambda t: t.r[:, None] - (1 - (-t.delta).exp()) / ETA, 0.2199, 0.9901),                                  # k3 in the loss
    (lambda t: t.r[:, None].expand(8, 3), 1.0276, 0.6062),                                                    # no KL
])
def test_other_weights_are_wrong(weights, error, cosine):
    table = Tabular(THETA)
    assert against_the_true(table.gradient(weights(table)), table.true_gradient()) == pytest.approx((error, cosine), abs=1e-4)


def test_without_kl_and_with_k3_in_the_loss():
    """The last two rows above: what autograd makes of F9, and the gradient that is left without any KL."""
    table = Tabular(THETA)
    d = (table.logp - table.ref).detach().requires_grad_()
    ((-d).exp() - 1 + d).sum().backward()
    close(d.grad, 1 - (-d.detach()).exp(), 1e-12)
    close(table.gradient(table.r[:, None].expand(8, 3)), [0.142976, 0.029789, 0.023752, 0, 0.024395, 0.040924, -0.080952], 1e-6)


def test_granularity_trades_variance_only():
    """Three tokens, four actions: the mean gradient is the true one for every start anchor, the covariance's trace grows."""
    torch.manual_seed(0)
    V, L = 3, 4
    sequences = torch.tensor(list(itertools.product(range(V), repeat=L)))
    logits, ref = (torch.randn(V**L, L, V, dtype=torch.float64) for _ in range(2))
    seen = [torch.tensor([int("".join(map(str, s[:t].tolist())) or "0", V) for s in sequences]) for t in range(L)]   # prefix -> row
    theta = logits.clone().requires_grad_()
    pick = lambda z: torch.stack([z[seen[t], t].log_softmax(-1).gather(1, sequences[:, t:t + 1])[:, 0] for t in range(L)], 1)
    logp, logq = pick(theta), pick(ref)
    prob, r = logp.sum(1).exp(), (sequences.sum(1) % 3 == 0).double()
    true = torch.autograd.grad((prob * (r - (logp - logq).sum(1) / ETA)).sum(), theta, retain_graph=True)[0]
    tokens, mask = torch.cat([torch.zeros(len(r), 1, dtype=torch.long), sequences], 1), torch.ones(len(r), L, dtype=torch.bool)
    traces = []
    for step_len in (1, 2, L):
        args = outcomes_with_steps("length", eta=ETA, step_len=step_len)
        weights, _, _ = prl.token_advantages(r, (logp - logq).detach(), tokens, mask, None, args)
        found = torch.autograd.grad((prob.detach()[:, None] * weights * logp).sum(), theta, retain_graph=True)[0]
        close(found, true, 1e-12)
        # the gradient of log P(a | prefix) in its own logits is onehot - P, of squared length 1 - 2 P(a) + |P|^2
        P = torch.stack([theta[seen[t], t].softmax(-1) for t in range(L)], 1)
        square = ((1 - 2 * logp.exp() + (P**2).sum(-1)) * weights**2).sum(1)
        traces.append(((prob * square).sum() - (true**2).sum()).item())
    assert traces[0] < traces[1] < traces[2]


# ---- the optimal policy ------------------------------------------------------------------------------------------------------

OPTIMUM = [-0.213743, 2.235326, -0.145161, 0, 3, 1, -1.8]


def test_at_the_optimum_the_shaped_reward_is_the_same_for_all_responses():
    table = Tabular(OPTIMUM)
    expected = table.ref.sum(1).exp() * (ETA * table.r).exp()
    close(table.prob, expected / expected.sum(), 1e-6)                                   # ref * exp(eta r), normalised
    close(table.r - prl.suffix(table.ratios, table.mask)[:, 0] / ETA, [0.630846] * 8, 1e-6)
    assert [x.item() for x in table.objective()] == pytest.approx([0.829021, 0.396351, 0.630846], abs=1e-6)


def test_at_the_optimum_a_prefix_has_one_value_and_a_step_earns_the_difference():
    table, values = Tabular(OPTIMUM), {"": 0.630846, "0": 0.681432, "1": 0.574561, "00": 0, "01": 0.867663,
                                       "10": 0.5, "11": 0.677419}
    after = prl.suffix(table.ratios, table.mask)[:, 2:5] - table.delta                   # what follows each token
    for s, r, delta, rest in zip(SEQUENCES, table.r, table.delta, after):
        path = [values["".join(map(str, s[:t]))] for t in range(3)] + [r.item()]
        close(r - rest / ETA, path[1:], 2e-6)
        close(delta / ETA, [b - a for a, b in zip(path, path[1:])], 2e-6)


def test_at_the_optimum_the_start_anchor_rests_and_the_end_anchor_does_not():
    table = Tabular(OPTIMUM)
    for steps in (dict(steps="token"), dict(steps="newline"), dict(steps="length", step_len=2)):
        close(table.script_gradient(**steps), [0.0] * 7, 1e-6)
    assert table.script_gradient(anchor="end", steps="length", step_len=2)[0].item() == pytest.approx(-0.026415, abs=1e-6)


# ---- steps and anchors: the tables, and the released code's fixture ----------------------------------------------------------

def weights_of(log_ratio, lengths, A, newline_at=(), **changes):
    """token_advantages of rows with two prompt columns (log-ratio 7), ten response columns, and a padding (log-ratio 9)."""
    mask, ratios, tokens = torch.zeros(len(A), 12, dtype=torch.bool), torch.full((len(A), 12), 7.0), torch.zeros(len(A), 13).long()
    for i, (row, length) in enumerate(zip(log_ratio, lengths)):
        mask[i, 2:2 + length] = True
        ratios[i, 2:] = torch.tensor(row + [9.0] * (10 - len(row)))
        tokens[i, [3 + t for t in newline_at]] = 1
    args = outcomes_with_steps(eta=10.0, **{"step_len": 4} | changes)
    advantages, _, steps = prl.token_advantages(torch.tensor(A), ratios, tokens, mask, torch.tensor([False, True]), args)
    assert not advantages[~mask].any()
    return advantages[:, 2:], steps[:, 2:]


TABLE = {
    "end": [[0.93] * 4 + [0.97] * 4 + [0.99] * 2, [-1.08] * 4 + [-1.02] * 3 + [0] * 3, [-0.05] * 4 + [0] * 6],
    "start": [[0.90] * 4 + [0.94] * 4 + [0.98] * 2, [-1.14] * 4 + [-1.06] * 3 + [0] * 3, [-0.05] * 4 + [0] * 6],
    "token": [[0.90 + 0.01 * t for t in range(10)], [-1.14 + 0.02 * t for t in range(7)] + [0] * 3, [-0.05] * 4 + [0] * 6],
    "whole": [[0.90] * 10, [-1.14] * 7 + [0] * 3, [-0.05] * 10],
}


@pytest.mark.parametrize("name, changes", [("end", dict(steps="length", anchor="end")), ("start", dict(steps="length")),
                                           ("token", dict(steps="token")), ("whole", dict(steps="length", step_len=10))])
def test_weights_of_three_rows(name, changes):
    """`end` is the released code's result on these numbers: R_t = A_i - S_t / eta at step ends, copied left over the step."""
    log_ratio = [[0.1] * 10, [0.2] * 7, [0, 0, 0, 0.5] + [0.0] * 6]
    close(weights_of(log_ratio, (10, 7, 10), [1.0, -1.0, 0.0], **changes)[0], TABLE[name], 1e-6)


@pytest.mark.parametrize("anchor, expected", [("start", [0.90] * 3 + [0.93] * 3 + [0.96] + [0.97] * 3),
                                              ("end", [0.92] * 3 + [0.95] * 3 + [0.96] + [0.99] * 3)])
def test_a_line_break_belongs_to_the_step_that_it_ends(anchor, expected):
    found, steps = weights_of([[0.1] * 10], [10], [1.0], newline_at=(2, 5, 6), anchor=anchor)
    assert steps.tolist() == [[0, 0, 0, 1, 1, 1, 2, 3, 3, 3]]
    close(found, [expected])


def test_a_suffix_of_exactly_0_is_a_value_and_not_a_gap():
    found, _ = weights_of([[0, 0, 0, 0, 0, -0.7, 0, 0, 0.7, 0]], [10], [0.0], steps="length", anchor="end")
    close(found, [[0] * 4 + [-0.07] * 4 + [0] * 2])                           # the released code fills the first four with -0.07


def test_steps_are_counted_in_the_response_for_ragged_prompts():
    table = Tabular(THETA)                                                    # whose prompt and padding are line breaks
    step = prl.step_id(table.tokens, table.mask, table.newline, flags(steps="newline"))[:, 2:5]
    assert step.tolist() == [[0, s[0], s[0] + s[1]] for s in SEQUENCES]
    mask = masks([0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0])
    step = prl.step_id(torch.zeros(2, 9).long(), mask, None, flags(steps="length", step_len=2))
    assert step[mask].tolist() == [0, 0, 1, 1, 2] * 2
    assert prl.anchor_index(step, mask, "start")[mask].tolist() == [3, 3, 5, 5, 7, 0, 0, 2, 2, 4]
    assert prl.anchor_index(step, mask, "end")[mask].tolist() == [4, 4, 6, 6, 7, 1, 1, 3, 3, 4]


# ---- line breaks in real vocabularies ----------------------------------------------------------------------------------------

TEXT = "She has 3.\n\nShe buys 4 more,\n  so 3 + 4 = 7.\n\n\nIf x:\n    y = 7\n\tz = \"a\n\"\r\n\nTherefore, the answer is: 7"


def check_steps(tokenizer, text):
    """Steps of a text by the script, beside its pieces cut by hand after each token that holds a line break; returns the breaks."""
    ids = tokenizer.encode(text) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    expected, step = [], 0
    for i in ids:
        expected.append(step)
        step += "\n" in tokenizer.decode([i])
    newline = prl.newline_tokens(tokenizer, tokenizer.vocab_size + 3)         # the model's vocabulary may be padded
    tokens = torch.tensor([[ids[0]] + ids])
    found = prl.step_id(tokens, torch.ones(1, len(ids), dtype=torch.bool), newline, ARGS)[0]
    assert found.tolist() == expected
    assert [bool(newline[i]) for i in range(tokenizer.vocab_size)] == ["\n" in tokenizer.decode([i])
                                                                       for i in range(tokenizer.vocab_size)]
    assert not newline[tokenizer.vocab_size:].any()
    return [tokenizer.decode([i]) for i in ids if newline[i]]


@pytest.mark.parametrize("name", ["smollm", "gpt2", "llama3", "qwen"])
def test_a_token_that_holds_a_line_break_anywhere_ends_a_step(name):
    assert len(check_steps(Tokenizer.from_file(FIXTURES / "tokenizers" / name / "tokenizer.json"), TEXT)) >= 5


def test_tokens_with_more_than_a_line_break():
    pieces = ["a", " ", ".\n", "\n\n", "\n", "\n  ", "b\nc"]
    assert prl.newline_tokens(Tokenizer.from_pieces(pieces), 9).tolist() == [False, False, True, True, True, True, True,
                                                                             False, False]
    assert check_steps(Tokenizer.from_pieces(pieces), "a.\na\n\nb\nca\n  a\n") == [".\n", "\n\n", "b\nc", "\n  ", "\n"]


def test_the_built_in_problems_have_a_step_a_line():
    args = flags(train_size=20, eval_size=5)
    tokenizer = prl.builtin_tokenizer(args)
    for problem in prl.load_problems(args)[0]:
        problem = prl.encode_problem(problem, tokenizer, args)
        tokens = torch.tensor([problem["prompt"][-1:] + problem["response"]])
        mask = torch.ones(1, len(problem["response"]), dtype=torch.bool)
        step = prl.step_id(tokens, mask, prl.newline_tokens(tokenizer, tokenizer.vocab_size), ARGS)
        assert step.max() == problem["cot"].count("\n") + 1                   # the answer's line is the last step


# ---- groups ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("outcomes, expected", [([1, 0, 0, 1], [0.866024, -0.866024, -0.866024, 0.866024]),
                                                ([1, 0, 0, 0, 0], [1.788850] + [-0.447213] * 4),
                                                ([1, 1, 1, 1], [0] * 4), ([0, 0, 0], [0] * 3)])
def test_group_norm(outcomes, expected):
    close(prl.group_advantages(torch.tensor(outcomes, dtype=torch.float32), len(outcomes)), expected, 2e-6)


def test_groups_do_not_mix_and_a_group_of_one_is_left_alone():
    close(prl.group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), 4),
          [0.866024, -0.866024, -0.866024, 0.866024, 0, 0, 0, 0], 1e-6)
    close(prl.group_advantages(torch.tensor([1.0, 0, 1]), 1), [1, 0, 1])


def group_of(outcomes, method, **changes):
    """Advantages of a group of four rows of three tokens with log-ratios 0.1, 0.2, 0.3, eta 10."""
    args = flags(method=method, eta=10.0, group_size=4, steps=changes.pop("steps", "token"), **changes)
    ratios, mask = torch.tensor([[0.1, 0.2, 0.3]]).expand(4, 3), torch.ones(4, 3, dtype=torch.bool)
    return prl.token_advantages(torch.tensor(outcomes), ratios, torch.zeros(4, 4).long(), mask, torch.tensor([False]), args)[0]


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_a_group_of_equal_outcomes_is_only_pulled_to_the_reference(outcome):
    close(group_of([outcome] * 4, "prl"), [[-0.06, -0.05, -0.03]] * 4)
    assert not group_of([outcome] * 4, "grpo").any() and not group_of([outcome] * 4, "grpo-kl-loss").any()
    close(group_of([outcome] * 4, "raft"), [[outcome] * 3] * 4)
    close(group_of([outcome] * 4, "prm"), [[outcome - 0.06, outcome - 0.05, outcome - 0.03]] * 4)


def test_the_methods_weights():
    outcomes, A = [1.0, 0.0, 0.0, 1.0], torch.tensor([[0.866024], [-0.866024], [-0.866024], [0.866024]])
    process = torch.tensor([0.06, 0.05, 0.03])
    close(group_of(outcomes, "prl"), A - process, 1e-6)
    close(group_of(outcomes, "prl", steps="newline"), A - 0.06 * torch.ones(3), 1e-6)
    close(group_of(outcomes, "frpo"), A - process, 1e-6)
    close(group_of(outcomes, "grpo"), A.expand(4, 3), 1e-6)
    close(group_of(outcomes, "grpo-kl-reward"), A.expand(4, 3), 1e-5)         # the same sum of log-ratios in each row cancels


def test_kl_in_the_reward_is_normalised_with_it():
    args = flags(method="grpo-kl-reward", eta=2.0, group_size=2)
    ratios, mask = torch.tensor([[7.0, 0.4, 0.2], [7.0, 0.0, 5.0]]), masks([0, 1, 1], [0, 1, 0])
    found = prl.token_advantages(torch.tensor([1.0, 1.0]), ratios, torch.zeros(2, 4).long(), mask, torch.tensor([False]), args)[0]
    close(found, [[0, -0.707103, -0.707103], [0, 0.707103, 0]], 1e-5)               # of 1 - 0.3 and 1: the outcomes are equal


# ---- the loss ----------------------------------------------------------------------------------------------------------------

class Fixed:
    """A policy whose log-probs are given numbers (B, T-1)."""
    head_weight = None


def loss_of(monkeypatch, mask, advantages, ratio=None, log_ratio=None, ref_log_ratio=None, minibatch=None, **changes):
    """loss_fn on given ratios: (loss, stats, d loss / d logprobs)."""
    mask, zeros = masks(*mask), torch.zeros(len(mask), len(mask[0]))
    log_ratio = ratio.log() if ratio is not None else zeros if log_ratio is None else log_ratio
    logprobs = log_ratio.clone().requires_grad_()
    monkeypatch.setattr(prl, "sampled", lambda gpt, micro: (mask, None))
    monkeypatch.setattr(prl, "linear_logprobs", lambda hidden, weight, targets: (logprobs[hidden], None))
    batch = {"tokens": torch.zeros(mask.shape[0], mask.shape[1] + 1), "response_mask": mask, "advantages": advantages,
             "old_logprobs": zeros, "ref_logprobs": logprobs.detach() - (zeros if ref_log_ratio is None else ref_log_ratio)}
    loss, stats = prl.loss_fn(Fixed(), flags(**changes), batch, minibatch or batch)
    loss.backward()
    return loss.detach(), stats, logprobs.grad


def test_the_loss_averages_tokens_or_divides_by_a_constant(monkeypatch):
    mask, advantages = [[1, 0, 0], [1, 1, 1]], rows([2, 0, 0], [-1, -1, -1])
    close(loss_of(monkeypatch, mask, advantages)[0], 0.25)                    # (-2 + 3) / 4; a mean of row means would be -0.5
    close(loss_of(monkeypatch, mask, advantages, agg="const", max_new_tokens=5)[0], 0.1)
    whole = {"tokens": torch.zeros(6, 4), "response_mask": torch.ones(6, 3, dtype=torch.bool)}
    close(loss_of(monkeypatch, mask, advantages, minibatch=whole)[0], 1 / 18)             # a micro-batch's share of 18 tokens
    close(loss_of(monkeypatch, mask, advantages, minibatch=whole, agg="const", max_new_tokens=5)[0], 1 / 30)


@pytest.mark.parametrize("ratio, advantage, expected, moves", [
    (1.5, 1, -1.2, False), (1.5, -1, 1.5, True), (0.5, 1, -0.5, True), (0.5, -1, 0.8, False), (1.1, 1, -1.1, True),
    (2.9, -1, 2.9, True), (3.5, -1, 3.0, False), (3.5, -2, 6.0, False), (3.5, 1, -1.2, False)])
def test_clip_and_dual_clip(monkeypatch, ratio, advantage, expected, moves):
    loss, stats, grad = loss_of(monkeypatch, [[1]], rows([advantage]), ratio=rows([ratio]))
    close(loss, expected)
    assert bool(grad.any()) == moves and stats["clip_frac"] == (abs(ratio - 1) > 0.2)


def test_the_log_ratio_is_bounded(monkeypatch):
    loss, _, grad = loss_of(monkeypatch, [[1, 1]], rows([-1, 1]), log_ratio=rows([200, -200]))
    close(loss, 1.5)
    assert grad.isfinite().all()                                              # exp(200) would be infinite


def test_ratio_1_gives_the_reinforce_gradient(monkeypatch):
    *_, grad = loss_of(monkeypatch, [[1, 1, 0], [1, 0, 0]], rows([0.3, -2, 0], [1.5, 0, 0]))
    close(grad, rows([-0.1, 2 / 3, 0], [-0.5, 0, 0]))


def test_the_k3_loss_and_its_gradient(monkeypatch):
    log_ratio = rows([0.5, -0.5, 0])
    loss, stats, grad = loss_of(monkeypatch, [[1, 1, 0]], torch.zeros(1, 3),
                                ref_log_ratio=log_ratio, method="grpo-kl-loss", kl_coef=0.1)
    close(loss, 0.1 * (0.106531 + 0.148721) / 2)                              # exp(-d) - 1 + d
    close(stats["kl_loss"], loss)
    close(grad, rows([0.1 * 0.393469 / 2, -0.1 * 0.648721 / 2, 0]))           # 1 - exp(-d)
    assert "kl_loss" not in loss_of(monkeypatch, [[1, 1, 0]], torch.zeros(1, 3), ref_log_ratio=log_ratio)[1]


# ---- on a small GPT ----------------------------------------------------------------------------------------------------------

class Lines(Words):
    """Letters, of which token 7 is a full stop with a line break and token 8 an empty line."""

    def token_bytes(self, token):
        return {7: b".\n", 8: b"\n\n", 9: b"\n"}.get(token, b"x")


TOY = flags(max_new_tokens=9, micro_batch_size=4, minibatch_size=12, group_size=3, eta=2.0, step_len=2)


def tiny(seed=0):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size=12, n_layer=1, n_head=2, n_embd=16, max_len=64, eos_id=2, pad_id=0))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return gpt


def toy_rollout(monkeypatch, args, same_ref=False, outcomes=(1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1)):
    def reward(answers, problems, args):
        assert [p["gold"] for p in problems] == [float(i // args.group_size)
                                                 for i in range(len(answers))]   # each row's own question
        return torch.tensor([float(o) for o in outcomes])
    monkeypatch.setattr(prl, "reward", reward)
    policy = tiny()
    ref = copy.deepcopy(policy) if same_ref else tiny(seed=1)
    problems = [{"prompt": [5] * (1 + i % 3) + [6], "gold": float(i)} for i in range(4)]
    torch.manual_seed(3)
    data, log = prl.rollout(policy, ref.requires_grad_(False), problems, Lines(), args)
    return policy, ref, data, log


def advantages_of(monkeypatch, same_ref=False, **changes):
    return toy_rollout(monkeypatch, dataclasses.replace(TOY, **changes), same_ref)[2]["advantages"]


def test_rows_of_a_question_are_adjacent(monkeypatch):
    *_, data, _ = toy_rollout(monkeypatch, TOY)
    starts = data["response_mask"].float().argmax(1)
    assert len(data["tokens"]) == 12 and starts.tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [1] * 3
    assert len(set(data["response_mask"].sum(1).tolist())) > 2                # ragged indeed


def test_infinite_eta_is_grpo_bit_for_bit(monkeypatch):
    grpo = advantages_of(monkeypatch, method="grpo")
    for changes in (dict(), dict(anchor="end"), dict(method="frpo", steps="token")):
        assert torch.equal(advantages_of(monkeypatch, eta=math.inf, **changes), grpo)
        assert not torch.equal(advantages_of(monkeypatch, **changes), grpo)


def test_steps_of_one_token_have_one_anchor(monkeypatch):
    token = advantages_of(monkeypatch, steps="token")
    for anchor in ("start", "end"):
        assert torch.equal(advantages_of(monkeypatch, steps="length", step_len=1, anchor=anchor), token)
        assert torch.equal(advantages_of(monkeypatch, steps="token", anchor=anchor), token)
    assert not torch.equal(advantages_of(monkeypatch), token)                 # there are lines of more than one token


def test_at_the_first_update_prl_is_grpo(monkeypatch):
    grpo = advantages_of(monkeypatch, same_ref=True, method="grpo")
    assert torch.equal(advantages_of(monkeypatch, same_ref=True), grpo) and grpo.any()
    *_, log = toy_rollout(monkeypatch, TOY, same_ref=True)
    assert log["process_max"] == log["kl_k1"] == log["kl_k3"] == 0 and abs(log["kl"]) < 1e-5


def test_one_minibatch_has_ratio_1_and_clips_nothing(monkeypatch):
    policy, ref, data, _ = toy_rollout(monkeypatch, TOY)
    loss, stats = prl.loss_fn(policy, TOY, data, data)
    assert stats["clip_frac"] == 0
    close(loss, -prl.masked_mean(data["advantages"], data["response_mask"]), 1e-5)


def test_the_log_tells_outcome_and_shaped_reward_apart(monkeypatch):
    *_, data, log = toy_rollout(monkeypatch, TOY)
    ratio = torch.where(data["response_mask"], data["old_logprobs"] - data["ref_logprobs"], 0)
    outcomes = torch.where(data["ended"], torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]), 0).tolist()
    flat = [len({*outcomes[i:i + 3]}) == 1 for i in (0, 3, 6, 9)]
    assert log["accuracy"] == log["outcome"] == pytest.approx(sum(outcomes) / 12) and log["no_signal"] == sum(flat) / 4
    assert log["shaped_reward"] == pytest.approx(sum(outcomes) / 12 - ratio.sum(1).mean().item() / TOY.eta, abs=1e-5)
    assert log["kl_k1"] == pytest.approx(ratio.sum(1).mean().item(), abs=1e-5)
    assert log["kl_k3"] == pytest.approx(((-ratio).exp() - 1 + ratio).sum(1).mean().item(), abs=1e-4) and log["kl_k3"] > 0
    breaks = [sum(t in (7, 8, 9) for t in row[1:][m][:-1].tolist()) for row, m in zip(data["tokens"], data["response_mask"])]
    assert log["steps"] == pytest.approx(1 + sum(breaks) / 12)
    assert 0 < log["process_mean"] < log["process_max"] and log["kl"] > 0


def test_what_is_cut_off_earns_nothing(monkeypatch):
    *_, data, log = toy_rollout(monkeypatch, TOY, outcomes=[1] * 12)
    assert 0 < log["truncated"] < 1 and torch.equal(data["outcomes"], data["ended"].float())
    assert log["accuracy"] == 1 - log["truncated"] and not data["strict"][~data["ended"]].any()
    monkeypatch.setattr(prl, "reward", lambda answers, *_: torch.ones(len(answers)))
    found, _ = prl.attempt(tiny(), [{"prompt": [5], "gold": 1.0}] * 12, Lines(), TOY, 1.0)
    assert 0 < sum(found["truncated"]) < 12 and found["accuracy"] == [not cut for cut in found["truncated"]]
    assert all(found["unparsed"][i] for i, cut in enumerate(found["truncated"]) if cut)


def test_nothing_of_the_advantage_is_differentiated(monkeypatch):
    *_, data, _ = toy_rollout(monkeypatch, TOY)
    assert not any(x.requires_grad for x in data.values())


@pytest.mark.parametrize("changes", [dict(), dict(agg="const"), dict(method="grpo-kl-loss"), dict(method="grpo-kl-reward")])
def test_micro_batch_size_changes_nothing_but_memory(monkeypatch, changes):
    found = []
    for size in (12, 2):
        args = dataclasses.replace(TOY, grad_clip=1e9, **changes)
        policy, _, data, _ = toy_rollout(monkeypatch, args)
        old = data["old_logprobs"]
        data["old_logprobs"] = old + 0.3 * torch.arange(old.numel()).sin().view_as(old)      # ratios on both sides of the clip
        optimizer, gradient = torch.optim.SGD(policy.parameters(), lr=0.0), []
        optimizer.register_step_pre_hook(lambda *_: gradient.extend(p.grad.flatten() for p in policy.parameters()))
        args.micro_batch_size = size
        stats = prl.optimiser_step(functools.partial(prl.loss_fn, policy, args), data, optimizer, args)
        found.append((torch.cat(gradient), stats))
    (whole, stats), (small, small_stats) = found
    assert whole.norm() > 1e-3 and (whole - small).norm() / whole.norm() < 1e-5 and stats["clip_frac"] > 0
    assert small_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)


# ---- outcome, pass@k, intervals, the hard test set ---------------------------------------------------------------------------

@pytest.mark.parametrize("answer, expected", [("18", 1), ("18.005", 1), ("19", 0), ("18.02", 0),
                                              ("eighteen", 0), ("", 0), ("nan", 0)])
def test_there_is_no_partial_reward(answer, expected):
    problem = {"gold": 18.0}
    assert prl.reward(prl.read_answers([prl.ANSWER + answer], [problem], ARGS), [problem], ARGS).tolist() == [expected]


def test_the_last_announcement_counts_and_its_first_line():
    problems, texts = [{"gold": 18.0}] * 4, ["18", f"{prl.ANSWER}5{prl.ANSWER}18",
                                             f"{prl.ANSWER}18{prl.ANSWER}5", f"{prl.ANSWER}18\nor 5"]
    assert prl.reward(prl.read_answers(texts, problems, ARGS), problems, ARGS).tolist() == [0, 1, 0, 1]


def test_a_record_is_of_either_form_and_its_answer_a_number():
    same = {"question": "How many?", "cot": "9 + 9 = 18", "answer": "18", "gold": 18.0}
    assert prl.parse_record({"question": "How many? ", "answer": "9 + 9 = 18\n#### 18"}, ARGS) == same
    reft = {"question": "How many?", "answer_cot": "9 + 9 = 18\n\nTherefore, the answer is <18>.", "answer_value": "18"}
    assert prl.parse_record(reft, ARGS) == same
    assert prl.parse_record(reft | {"answer_cot": "Already answered: the answer is <18>."}, ARGS)["cot"] == ""
    for raw, words in [(reft | {"answer_value": "c"}, "'c' is not a number"),
                       ({"question": "How many?", "answer": ["#### 18"]}, "neither"), ({"answer": "#### 18"}, "`question`")]:
        with pytest.raises(InputError, match=words):
            prl.parse_record(raw, ARGS)


def test_pass_at_k():
    assert [round(prl.pass_at_k(8, 3, k), 6) for k in (1, 2, 4, 6, 8)] == [0.375, 0.642857, 0.928571, 1, 1]
    assert prl.pass_at_k(16, 2, 8) == pytest.approx(0.766667, abs=1e-6)
    assert prl.pass_at_k(8, 0, 8) == 0 and prl.pass_at_k(1, 1, 1) == 1
    for c, k in itertools.product(range(6), range(1, 6)):                     # by counting the sets of k out of 5
        sets = list(itertools.combinations([i < c for i in range(5)], k))
        assert prl.pass_at_k(5, c, k) == pytest.approx(sum(map(any, sets)) / len(sets))


def test_bootstrap_intervals():
    assert prl.bootstrap([0.5] * 20) == (0.5, [0.5, 0.5])
    values = [1.0] * 120 + [0.0] * 280
    mean, (low, high) = prl.bootstrap(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert mean == pytest.approx(0.3) and low == pytest.approx(0.3 - half, abs=0.01) and high == pytest.approx(0.3 + half, abs=0.01)
    assert prl.bootstrap(values) == (mean, [low, high])


def test_entropy_of_a_report_is_that_of_its_tokens():
    """Uniform over the vocabulary: its logarithm, whatever the lengths and the batches."""
    policy, args = tiny(), flags(minibatch_size=2, max_new_tokens=5)
    torch.nn.init.zeros_(policy.head_weight)
    problems = [{"prompt": [5, 6, 7][:n], "gold": 1.0} for n in (1, 2, 3)]
    assert prl.entropy(policy, problems, Words(), args) == pytest.approx(math.log(policy.config.vocab_size), abs=1e-5)


def test_what_is_reported_lies_where_it_is_trained(monkeypatch):
    """A report's entropy takes a forward pass, and with --shard what is not spread stays on the CPU, far from the tokens."""
    moved, reported, state = [], [], {"step": 0}
    monkeypatch.setattr(prl, "prepare", lambda args: (None, None, [], [], []))
    monkeypatch.setattr(prl, "hard_problems", lambda *_: ([], []))
    monkeypatch.setattr(prl, "open_run", lambda args: state)
    monkeypatch.setattr(prl, "warm_up", lambda *_: tiny())
    monkeypatch.setattr(prl, "load_checkpoint", lambda folder: (tiny(), None))
    monkeypatch.setattr(prl, "spread", lambda models, args: moved.extend(models))
    monkeypatch.setattr(prl, "report", lambda policy, *_: reported.append(policy) or {})
    for name in "keep_best", "save_run", "plot_pass", "summarise", "tell":
        monkeypatch.setattr(prl, name, lambda *_, **__: None)
    prl.main(flags(iterations=0))
    assert len(reported) == 3 and all(any(policy is model for model in moved) for policy in reported)


def test_hard_problems_are_longer_and_shared_with_nothing():
    args = flags(train_size=100, eval_size=60, demonstrations=800)
    policy, tokenizer = prl.initial_policy(args)
    easy = sum(prl.load_problems(args)[1:], [])
    hard, shown = prl.hard_problems(policy, easy, tokenizer, args)
    length = lambda problem: len(problem["question"].partition("=")[0])
    assert len(hard) == 60 and {length(p) for p in hard} == {4, 5, 6} and {length(p) for p in shown} == {1, 2, 3, 4, 5, 6}
    assert max(length(p) for part in prl.load_problems(args) for p in part) == 3
    assert not {p["question"] for p in hard + easy} & {p["question"] for p in shown}
    assert prl.hard_problems(policy, [], None, flags(train_data="x")) == ([], [])
    longer = dataclasses.replace(args, operations_train=5)                    # than the tests
    assert {length(p) for p in prl.hard_problems(policy, easy, tokenizer, longer)[0]} == {6}


def test_the_short_style_is_right_on_short_chains_alone_and_the_whole_one_in_part_on_all():
    args = flags(train_size=100, eval_size=10, demonstrations=6000)
    policy, tokenizer = prl.initial_policy(args)
    _, shown = prl.hard_problems(policy, [], tokenizer, args)
    right = {}
    for problem in shown:
        chain, _, state = problem["question"].partition("=")
        style, *lines = problem["cot"].split("\n")
        states = [int(state)]
        for letter in chain:
            states.append(prl.TABLES[letter][states[-1]])
        assert problem["gold"] == states[-1] and (len(chain) <= 3 or states[3] != states[-1])
        assert "".join(line[0] for line in lines) == (chain if style == "whole:" else chain[:3])
        assert [int(line[1]) for line in lines[:-1]] == states[1:len(lines)] and lines[-1][1] == problem["answer"]
        right.setdefault((style, len(chain) > 3), []).append(int(problem["answer"]) == problem["gold"])
    mean = lambda style, long: sum(right[style, long]) / len(right[style, long])
    assert mean("short:", False) == 1 and mean("short:", True) == 0
    assert mean("whole:", False) == pytest.approx(0.6, abs=0.1) == mean("whole:", True)
    whole = len(right["whole:", False]) + len(right["whole:", True])
    assert whole / len(shown) == pytest.approx(prl.WHOLE, abs=0.02)


def test_base_is_an_evaluation_alone_and_the_summary_holds_what_a_table_needs(tmp_path):
    result = run("prl", tmp_path / "run", "--method", "base", "--samples", "6", "--max-new-tokens", "20", pictures=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/passk.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    last = {f"last_{name}": x for name, x in summary["before"].items() if isinstance(x, float)}
    assert summary["before"] | last == summary["after"] and summary["best"]["iteration"] == 0
    assert {"last_hard_pass@6", "last_avg@6", "last_entropy", "hard_entropy"} <= summary["after"].keys()
    assert summary["after"]["entropy"] > 0
    for prefix in ("", "hard_"):
        part = summary["after"]
        assert [k for k in (1, 2, 3, 4, 6) if f"{prefix}pass@{k}" in part] == [1, 2, 4, 6]
        assert part[f"{prefix}avg@6"] == pytest.approx(part[f"{prefix}pass@1"])
        low, high = part[f"{prefix}pass@6_95%"]
        assert 0 <= low <= part[f"{prefix}pass@6"] <= high <= 1 and f"{prefix}accuracy" in part
        right = list(map(int, part[f"{prefix}right"].split()))
        assert len(right) == 8 and sum(right) / 48 == pytest.approx(part[f"{prefix}avg@6"])
    assert (tmp_path / "run/passk.png").exists() and "avg@6" in result.stdout
    assert [json.loads(line)["event"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()] == ["warmup", "end"]


def test_a_warm_up_can_be_shared(tmp_path):
    assert run("prl", tmp_path / "one", "--method", "base").returncode == 0
    shared = ["--model", tmp_path / "one/warmup", "--warmup-epochs", "0"]
    assert run("prl", tmp_path / "two", "--method", "frpo", *shared).returncode == 0
    before = [json.loads((tmp_path / name / "summary.json").read_text())["before"] for name in ("one", "two")]
    assert before[0] == before[1]
    assert json.loads((tmp_path / "two/args.json").read_text())["args"]["steps"] == "token"          # what the method uses


@pytest.mark.parametrize("given, words", [
    (["--eta", "0"], ["--eta", "grpo"]),
    (["--dual-clip", "1"], ["--dual-clip"]),
    (["--steps", "word"], ["--steps", "newline", "length", "token"]),
    (["--anchor", "middle"], ["--anchor", "start", "end"]),
    (["--agg", "row"], ["--agg", "token", "const"]),
    (["--method", "reft"], ["--method", "prl", "frpo", "grpo"]),
    (["--operations-hard", "3"], ["--operations-hard"]),
    (["--operations-train", "6"], ["--operations-hard", "--operations-train"]),
    (["--operations-hard", "300"], ["--operations-hard 300", "context"]),
    (["--group-size", "0"], ["--group-size"]),
])
def test_impossible_flags_are_refused_and_nothing_is_written(given, words, tmp_path):
    refuse(run("prl", tmp_path / "run", *given), *words)
    assert not (tmp_path / "run").exists()


def test_each_test_file_has_its_own_avg_and_pass(monkeypatch):
    """Two samples of each of three problems, one of file a and two of file b. The last one is right, but was cut off."""
    problems = [{"gold": 1.0, "set": file} for file in "abb"]
    drawn = [(1, 2), (1, 2)], [(1, 2), (0, 2)], [(0, 2), (1, 7)]              # (answer, last token)
    samples = [[([7, last], "", float(answer)) for answer, last in row] for row in drawn]
    monkeypatch.setattr(prl, "draw_samples", lambda *_: samples)
    monkeypatch.setattr(prl, "evaluate", lambda *_: {"accuracy": 0.5})
    monkeypatch.setattr(prl, "entropy", lambda *_: 1.5)
    found = prl.report(None, {"": problems}, Words(), flags(samples=2))
    assert [found[name] for name in ("avg@2", "a_avg@2", "b_avg@2")] == pytest.approx([0.5, 1, 0.25])
    assert [found[name] for name in ("pass@2", "a_pass@2", "b_pass@2")] == pytest.approx([2 / 3, 1, 0.5])
    assert (found["right"], found["a_right"], found["b_right"]) == ("2 1 0", "2", "1 0") and found["a_avg@2_95%"] == [1, 1]


def test_scoring_samples_of_the_test_problems_counts_as_evaluation(monkeypatch, tmp_path):
    monkeypatch.setattr(prl, "COST", dict.fromkeys(prl.COST, 1.0))
    state = {"phases": dict.fromkeys(prl.PHASES, 0.0), "flops": 0.0, "warmup_steps": 1, "log_lines": 0}
    prl.tell("before", {"sample": ""}, state, prl.Args(out=str(tmp_path)))
    assert state["phases"] == {"generate": 0, "check": 0, "score": 0, "update": 1, "evaluate": 4, "save": 1}
