"""Every tagged equation of ppo_reft.py against numbers worked out by hand, and gradients against enumeration.

Rows A, B and the values below: end token 2, pad 0, T = 8, gamma 1, lambda 0.95.
"""
import copy
import dataclasses
import functools
import itertools
import math
import warnings

import pytest
import torch

import ppo_reft as reft
from model import GPT, GPTConfig

T = 8
A_TOKENS, A_MASK = [5, 6, 7, 8, 9, 2, 0, 0], [0, 0, 1, 1, 1, 0, 0]      # finished
B_TOKENS, B_MASK = [5, 6, 8, 9, 8, 9, 8, 9], [0, 1, 1, 1, 1, 1, 1]      # truncated
ARGS = dataclasses.replace(reft.Args(), device="cpu")


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def masks(*values):
    return torch.tensor(values, dtype=torch.bool)


def at(mask, values):
    """A row (T-1) that holds values at the True places of mask and 0 elsewhere."""
    values = iter(values)
    return [next(values) if m else 0.0 for m in mask]


def close(x, expected, tolerance=1e-5):
    x, expected = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    assert torch.allclose(x, expected, atol=tolerance, rtol=0), (x, expected)


# ---- Eq. 1 -------------------------------------------------------------------------------------------------------------------

def tiny(vocab=12, value_head=True, seed=0, n_layer=1):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size=vocab, n_layer=n_layer, n_head=2, n_embd=16, max_len=64, eos_id=2, pad_id=0))
    if value_head:
        gpt.add_value_head()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.3 * torch.randn_like(p))          # away from the near-uniform start
    return gpt


TINY_MODEL = tiny()                                    # where a batch is packed for


def test_sft_loss_is_the_mean_over_all_targets_of_the_step():
    """Eq. 1 on two rows of 3 and 1 targets: a mean of 4 numbers, not of two row means; the prompt has no part in it."""
    policy = tiny()
    batch = reft.pack([([5, 6, 7, 8, 2], [False, False, True, True, True]), ([5, 2], [False, True])], TINY_MODEL)
    logp = policy.logits(batch["tokens"]).log_softmax(-1)
    expected = -(logp[0, 1, 7] + logp[0, 2, 8] + logp[0, 3, 2] + logp[1, 0, 2]) / 4
    close(reft.sft_loss(policy, batch, batch)[0], expected)


def test_pack_marks_targets_and_the_end_token():
    batch = reft.pack([([5, 6, 7, 8, 2], [False, False, True, True, True]), ([5, 2], [False, True])], TINY_MODEL)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 2], [5, 2, 0, 0, 0]]
    assert batch["response_mask"].tolist() == [[False, True, True, True], [True, False, False, False]]


# ---- F2: answers and outcomes ------------------------------------------------------------------------------------------------

EXTRACTION = [("18", 1), ("18.0", 1), ("$18", 1), ("18 apples.", 1), ("<18>.", 1), ("18.005", 1), ("2 x 9 = 18", 1), ("36/2", 1),
              ("+18", 1), ("1.8e1", 1), ("18.", 1), ("18\nand more", 1), ("19", .1), ("18.02", .1), ("-18", .1), ("18,000", .1),
              ("eighteen", 0), ("nan", 0), ("inf", 0), ("1e999", 0), ("1/0", 0), ("", 0), ("True", 0)]


def outcome(text, gold, **flags):
    args, problem = dataclasses.replace(ARGS, **flags), {"gold": gold}
    return reft.reward(reft.read_answers([text], [problem], args), [problem], args).item()


@pytest.mark.parametrize("answer, expected", EXTRACTION)
def test_outcome_of_an_announced_answer(answer, expected):
    assert outcome(f"9 + 9 = 18{reft.ANSWER}{answer}", 18.0) == pytest.approx(expected)


def test_outcome_needs_the_trigger_and_takes_the_last_one():
    assert outcome("the answer is 18", 18.0) == 0
    assert outcome(f"{reft.ANSWER}18{reft.ANSWER}19", 18.0) == pytest.approx(0.1)
    assert outcome(f"{reft.ANSWER}19{reft.ANSWER}18", 18.0) == 1


@pytest.mark.parametrize("answer, gold, expected", [("1,000", 1000.0, 1), ("1,234,567.5", 1234567.5, 1), ("-3", -3.0, 1),
                                                    ("$-3", -3.0, 1), ("-$3", -3.0, 1), (".5", 0.5, 1),
                                                    ("1 / 2", 0.5, 1), ("1,00", 100.0, .1)])
def test_numbers(answer, gold, expected):
    assert outcome(reft.ANSWER + answer, gold) == pytest.approx(expected)


@pytest.mark.parametrize("answer, expected", [("18", 1), ("18.0", 1), ("$18", 0), ("18 apples.", 0), ("nan", .1), ("19", .1)])
def test_strict_reads_a_bare_float_as_the_authors_do(answer, expected):
    assert outcome(reft.ANSWER + answer, 18.0, strict=True) == pytest.approx(expected)
    assert outcome(reft.ANSWER + "1,000", 1000.0, strict=True) == 0


@pytest.mark.parametrize("answer, expected", [("C", 1), ("'c'", 1), ("c ) 870", 1), ("d", 0), ("none", 0),
                                              ("a or c", 0), ("", 0), ("3", 0)])
def test_a_wrong_letter_earns_nothing(answer, expected):
    assert outcome(reft.ANSWER + answer, "c") == expected


def test_partial_reward_can_be_switched_off():
    assert outcome(reft.ANSWER + "19", 18.0, partial_reward=0.0) == 0


# ---- F3: rewards -------------------------------------------------------------------------------------------------------------

def rewards_of(mask, outcome, log_ratios=None, state_kl=None, **flags):
    zeros = [0.0] * sum(mask)
    return reft.token_rewards(torch.tensor([outcome]), rows(at(mask, log_ratios or zeros)), rows(at(mask, state_kl or zeros)),
                              masks(mask), dataclasses.replace(ARGS, **flags))[0]


def test_the_outcome_sits_on_the_last_sampled_token_finished_or_not():
    close(rewards_of(A_MASK, 1.0), [0, 0, 0, 0, 1, 0, 0])
    close(rewards_of(B_MASK, 0.1), [0, 0, 0, 0, 0, 0, 0.1])


def test_k1_charges_each_action_its_own_log_ratio():
    close(rewards_of(A_MASK, 1.0, log_ratios=(0.2, -0.1, 0.4), kl_coef=0.05), at(A_MASK, (-0.01, 0.005, 0.98)))


def test_exact_charges_the_kl_of_the_next_state():
    found = rewards_of(A_MASK, 1.0, log_ratios=(0.2, -0.1, 0.4), state_kl=(0.3, 0.1, 0.2), kl="exact", kl_coef=0.05)
    close(found, at(A_MASK, (-0.005, -0.01, 1.0)))


# ---- F4, F5: GAE and returns -------------------------------------------------------------------------------------------------

def gae_of(rewards, values, mask, lam=0.95):
    advantages, returns = reft.gae(rows(at(mask, rewards)), rows(at(mask, values)), masks(mask), 1.0, lam)
    mask = torch.tensor(mask, dtype=torch.bool)
    assert not advantages[0][~mask].any() and not returns[0][~mask].any()
    return advantages[0][mask], returns[0][mask]


@pytest.mark.parametrize("rewards, advantages, returns", [
    ((0, 0, 1), (0.451, 0.58, 0.4), (0.951, 0.98, 1.0)),                                   # outcome 1, beta 0
    ((-0.01, 0.005, 0.98), (0.4277, 0.566, 0.38), (0.9277, 0.966, 0.98)),                  # k1
    ((-0.005, -0.01, 1.0), (0.4365, 0.57, 0.4), (0.9365, 0.97, 1.0)),                      # exact
])
def test_gae_by_hand(rewards, advantages, returns):
    found = gae_of(rewards, (0.5, 0.4, 0.6), A_MASK)
    close(found[0], advantages)
    close(found[1], returns)


def test_gae_with_lambda_1_is_the_outcome_minus_the_value():
    close(gae_of((0, 0, 1), (0.5, 0.4, 0.6), A_MASK, lam=1.0)[0], (0.5, 0.6, 0.4))


def test_gae_of_a_truncated_row_does_not_bootstrap():
    advantages, _ = gae_of((0, 0, 0, 0, 0, 0.1), (0.2, 0.2, 0.1, 0.1, 0.3, 0.2), B_MASK)
    close(advantages, (-0.082354, -0.086688, 0.014013, 0.01475, -0.195, -0.1), 1e-6)


# ---- F6: whitening -----------------------------------------------------------------------------------------------------------

ADVANTAGES = rows(at(A_MASK, (0.451, 0.58, 0.4)), at(B_MASK, (-0.082354, -0.086688, 0.014013, 0.01475, -0.195, -0.1)))
WHITE = rows(at(A_MASK, (1.191902, 1.643639, 1.013308)),
             at(B_MASK, (-0.675818, -0.690996, -0.338359, -0.335776, -1.070287, -0.737612)))


def test_whitening_over_all_response_tokens():
    white, sigma = reft.whiten(ADVANTAGES, masks(A_MASK, B_MASK))
    close(white, WHITE)
    close(sigma, math.sqrt(0.081547), 1e-5)


def test_whitening_one_token_is_finite():
    white, sigma = reft.whiten(rows([0, 0.7, 0]), masks([0, 1, 0]))
    close(white, torch.zeros(1, 3))
    assert sigma == 1


# ---- F7, F8, F9: the loss ----------------------------------------------------------------------------------------------------

class Fixed:
    """A policy and critic with given log-probs and values (B, T-1): what loss_fn does with them is all that is left."""
    head_weight = None

    def __init__(self, logprobs, values):
        self.logprobs, self.vs = logprobs, values

    def values(self, hidden):
        return self.vs[hidden]


def loss_of(monkeypatch, mask, advantages, ratio=None, values=None, old_values=None, returns=None, **flags):
    """loss_fn on given ratios and values: (loss, stats, d loss / d logprobs, d loss / d values)."""
    mask, zeros = masks(*mask), torch.zeros(len(mask), len(mask[0]))
    logprobs = (zeros if ratio is None else ratio.log()).clone().requires_grad_()
    values = (zeros if values is None else values).clone().requires_grad_()
    policy = Fixed(logprobs, values)
    monkeypatch.setattr(reft, "sampled", lambda gpt, micro: (mask, None))          # "hidden" is the mask itself
    monkeypatch.setattr(reft, "linear_stats", lambda hidden, weight, targets: (policy.logprobs[hidden], None, None, None))
    batch = {"tokens": torch.zeros(mask.shape[0], mask.shape[1] + 1), "response_mask": mask, "advantages": advantages,
             "old_logprobs": zeros, "old_values": zeros if old_values is None else old_values,
             "returns": values.detach() if returns is None else returns}
    loss, stats = reft.loss_fn(policy, policy, None, dataclasses.replace(ARGS, **flags), batch, batch)
    loss.backward()
    return loss.detach(), stats, logprobs.grad, values.grad


def test_policy_loss_averages_rows_not_tokens(monkeypatch):
    loss, *_ = loss_of(monkeypatch, [[1, 0, 0], [1, 1, 1]], rows([1, 0, 0], [-1, -1, -1]))
    close(loss, 0.0)                                                                # a token mean would give 0.5
    loss, *_ = loss_of(monkeypatch, [A_MASK, B_MASK], WHITE)
    close(loss, -0.320737)                                                          # a token mean would give 0


@pytest.mark.parametrize("ratio, advantage, expected, moves", [(1.5, 1, -1.2, False), (1.5, -1, 1.5, True), (0.5, 1, -0.5, True),
                                                              (0.5, -1, 0.8, False), (1.1, 1, -1.1, True)])
def test_policy_clip(monkeypatch, ratio, advantage, expected, moves):
    loss, stats, grad, _ = loss_of(monkeypatch, [[1]], rows([advantage]), ratio=rows([ratio]))
    close(loss, expected)
    assert bool(grad.any()) == moves
    assert stats["clip_frac"] == (abs(ratio - 1) > 0.2)


@pytest.mark.parametrize("target, expected, moves", [(1.0, 0.32, False), (0.0, 0.125, True)])
def test_value_clip(monkeypatch, target, expected, moves):
    loss, stats, _, grad = loss_of(monkeypatch, [[1]], rows([0]), values=rows([0.5]), returns=rows([target]), vf_coef=5.0)
    close(stats["value_loss"], expected)
    close(loss, 5 * expected)                                                       # F9: the paper's 5
    assert bool(grad.any()) == moves


def test_ratio_1_gives_the_reinforce_gradient(monkeypatch):
    advantages = rows([0.3, -2, 0], [1.5, 0, 0])
    *_, grad, _ = loss_of(monkeypatch, [[1, 1, 0], [1, 0, 0]], advantages)
    close(grad, rows([-0.3 / 2 / 2, 2 / 2 / 2, 0], [-1.5 / 2, 0, 0]))


# ---- the KL penalty on a tabular policy --------------------------------------------------------------------------------------

def tabular_gradients():
    """Two steps, two actions, reference uniform, beta 0.1, outcome 1 for (0, 0) and (1, 1): dJ / d logits of J = E[outcome] -
    beta E[sum of the log-ratios], by autograd on J itself and as policy gradients with each form of the penalty, enumerated."""
    beta, start = 0.1, torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64)          # P(a = 0) at the root, after 0, after 1
    theta = (start / (1 - start)).log().requires_grad_()
    logp = lambda state, action: torch.nn.functional.logsigmoid(theta[state] if action == 0 else -theta[state])
    ratio = lambda state, action: logp(state, action) - math.log(0.5)
    kl = lambda state: sum(logp(state, a).exp() * ratio(state, a) for a in (0, 1))
    paths = [(0, a, 1 + a, b) for a in (0, 1) for b in (0, 1)]                      # state, action, state, action

    def expect(term):
        """The gradient of sum over paths of P(path), detached, times term(path)."""
        value = sum((logp(s, a) + logp(t, b)).exp().detach() * term(s, a, t, b) for s, a, t, b in paths)
        return torch.autograd.grad(value, theta)[0]

    def via_script(kind):
        """Weights from the script's own token_rewards and gae (V = 0, lambda 1), the KL term of the loss beside them."""
        def term(s, a, t, b):
            args = dataclasses.replace(ARGS, kl=kind, kl_coef=beta)
            mask, ones = masks([1, 1]), torch.tensor([float(a == b)])
            k1 = torch.stack([ratio(s, a), ratio(t, b)]).detach()[None]
            exact = torch.stack([kl(s), kl(t)]).detach()[None]
            rewards = reft.token_rewards(ones.double(), k1, exact, mask, args)
            weights = reft.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)[0][0]
            in_loss = beta * (kl(s) + kl(t)) if kind == "exact" else 0.0
            return weights[0] * logp(s, a) + weights[1] * logp(t, b) - in_loss
        return expect(term)

    def own_state_only(s, a, t, b):                                                 # the biased form: KL(s_t) in r_t alone
        r1, r2 = -beta * kl(s).detach(), float(a == b) - beta * kl(t).detach()
        return (r1 + r2) * logp(s, a) + r2 * logp(t, b)

    def loss_only(s, a, t, b):                                                      # the other half alone
        return float(a == b) * (logp(s, a) + logp(t, b)) - beta * (kl(s) + kl(t))

    J = sum((logp(s, a) + logp(t, b)).exp() * (float(a == b) - beta * (ratio(s, a) + ratio(t, b))) for s, a, t, b in paths)
    true = torch.autograd.grad(J, theta)[0]
    return (J.item(), [kl(s).item() for s in range(3)], true, via_script("k1"), via_script("exact"),
            expect(own_state_only), expect(loss_only))


def test_k1_and_exact_give_the_true_gradient_and_two_other_forms_do_not():
    J, kls, true, k1, exact, own_state, loss_only = tabular_gradients()
    assert J == pytest.approx(0.597469, abs=1e-6)
    assert kls == pytest.approx([0.192745, 0.020136, 0.082283], abs=1e-6)
    close(true, torch.tensor([-0.037186, 0.184215, -0.038441], dtype=torch.float64), 1e-6)
    close(k1, true, 1e-12)
    close(exact, true, 1e-12)
    close(own_state, torch.tensor([-0.015006, 0.192, -0.042], dtype=torch.float64), 1e-6)
    assert loss_only[0].item() == pytest.approx(-0.038181, abs=1e-6)


# ---- on a small GPT: first pass, micro-batches, end token, padding -----------------------------------------------------------

class Words:
    """A tokenizer for the toy rollouts: token i is the letter chr(97 + i); token 2 ends."""
    eos_id = 2

    def decode(self, ids, goes_on=False):
        return "".join(chr(97 + i) for i in ids)


def toy_rollout(args, critic=None, same_ref=False, rows=12):
    policy = tiny()
    ref = copy.deepcopy(policy) if same_ref else tiny(seed=1)
    problems = [{"prompt": [5] * (1 + i % 3) + [6], "gold": 1.0} for i in range(rows)]
    torch.manual_seed(3)
    data, log = reft.rollout(policy, critic or policy, ref.requires_grad_(False), problems, Words(), args)
    return policy, ref, data, log


TOY = dataclasses.replace(ARGS, max_new_tokens=9, micro_batch_size=4, minibatch_size=12)


@pytest.mark.parametrize("kind", ["k1", "exact"])
def test_ratio_is_1_before_any_update_for_ragged_rows(kind):
    args = dataclasses.replace(TOY, kl=kind)
    policy, ref, data, _ = toy_rollout(args)
    assert len(set(data["response_mask"].sum(1).tolist())) > 2                      # ragged indeed
    hidden, targets = reft.sampled(policy, data)
    logprobs = reft.place(reft.linear_logprobs(hidden, policy.head_weight, targets)[0], data["response_mask"])
    close(logprobs, data["old_logprobs"], 1e-5)
    _, stats = reft.loss_fn(policy, policy, ref, args, data, data)
    assert stats["clip_frac"] == 0


def test_before_the_first_update_the_kl_is_0_and_both_modes_agree():
    *_, k1 = toy_rollout(dataclasses.replace(TOY, kl="k1"), same_ref=True)
    *_, exact = toy_rollout(dataclasses.replace(TOY, kl="exact"), same_ref=True)
    assert abs(k1["kl"]) < 1e-5 and abs(k1["kl_k1"]) < 1e-5
    assert k1["outcome"] == exact["outcome"]


def test_a_rollout_of_a_single_token_has_no_explained_variance():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, log = toy_rollout(dataclasses.replace(TOY, max_new_tokens=1), rows=1)
    assert math.isnan(log["explained_variance"])


def test_exact_kl_is_never_negative_while_k1_can_be():
    *_, log = toy_rollout(TOY)
    assert log["kl"] > 0


def gradients(micro_batch_size, kind):
    args = dataclasses.replace(TOY, micro_batch_size=micro_batch_size, kl=kind, grad_clip=1e9)
    policy, ref, data, _ = toy_rollout(dataclasses.replace(args, micro_batch_size=12))
    optimizer, gradient = torch.optim.SGD(policy.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: gradient.extend(p.grad.flatten() for p in policy.parameters()))
    stats = reft.optimiser_step(functools.partial(reft.loss_fn, policy, policy, ref, args), data, optimizer, args)
    return torch.cat(gradient), stats


@pytest.mark.parametrize("kind", ["k1", "exact"])
def test_micro_batch_size_changes_nothing_but_memory(kind):
    (whole, stats), (small, small_stats) = gradients(12, kind), gradients(2, kind)
    assert whole.norm() > 1e-3
    assert (whole - small).norm() / whole.norm() < 1e-5
    assert small_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)


def test_micro_batches_cover_every_row_once_and_cut_padding():
    *_, data, _ = toy_rollout(TOY)
    seen = []
    for chosen, micro in reft.micro_batches(data, 5):
        seen += chosen.tolist()
        lengths = micro["response_mask"] * torch.arange(2, micro["tokens"].shape[1] + 1)
        assert int(lengths.max()) == micro["tokens"].shape[1]
        close(micro["old_logprobs"], data["old_logprobs"][chosen, :micro["tokens"].shape[1] - 1])
        assert not data["response_mask"][chosen, micro["tokens"].shape[1] - 1:].any()
    assert sorted(seen) == list(range(12))


def test_the_end_token_is_trained():
    """A policy rewarded for stopping learns to stop: the sampled end token is an action with a gradient."""
    policy = tiny()
    batch = reft.pack([([5, 6, 2], [False, False, True])], TINY_MODEL)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    before = policy.logits(batch["tokens"])[0, 1].softmax(-1)[2].item()
    for _ in range(20):
        reft.optimiser_step(functools.partial(reft.sft_loss, policy), batch, optimizer, ARGS)
    assert policy.logits(batch["tokens"])[0, 1].softmax(-1)[2].item() > max(0.9, before)


def test_the_gap_between_sampler_and_trainer():
    """0 where both are the same forward; what is added to a log-prob of a sampled token comes out."""
    data = {"response_mask": masks([1, 1, 0], [0, 1, 1]), "old_logprobs": torch.tensor([[-1.0, -2, 5], [5, -3, -4]])}
    data["sampled_logprobs"] = data["old_logprobs"] + torch.tensor([[0.0, 0.25, 7], [7, -0.75, 0]])
    gap = reft.sampler_gap(data)
    assert gap == {"sampler_gap": 0.25, "sampler_gap_max": 0.75} and "sampled_logprobs" not in data


def test_responses_end_before_the_end_token_and_those_without_one_are_cut_off(monkeypatch):
    tokens, mask = torch.tensor([A_TOKENS, B_TOKENS, [2, 2, 5, 6, 7, 0, 0, 0]]), masks(A_MASK, B_MASK, [0, 1, 1, 1, 0, 0, 0])
    monkeypatch.setattr(reft, "generate", lambda *_: (tokens, mask, torch.zeros(mask.shape)))
    monkeypatch.setattr(reft, "read_answers", lambda texts, problems, args: [float(len(text)) for text in texts])
    problems = [{"prompt": [5], "gold": 2.0}] * 3
    data, texts, answers = reft.respond(None, problems, Words(), ARGS)
    assert texts == ["ij", "ijijij", "fgh"] and answers == [2, 6, 3]
    assert data["outcomes"].tolist() == [1, pytest.approx(0.1), pytest.approx(0.1)]
    assert data["ended"].tolist() == [True, False, False]            # an end token in the prompt does not count
    assert reft.measures(data, answers)["truncated"] == [False, True, True]


def test_a_loss_that_is_not_finite_names_the_tensor_and_keeps_the_weights():
    policy = tiny()
    batch = reft.pack([([5, 6, 2], [False, False, True])], TINY_MODEL)
    before = [p.clone() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    broken = lambda micro, minibatch: (lambda loss: (loss, {"value_loss": loss}))(reft.sft_loss(policy, micro, minibatch)[0]
                                                                                  * math.nan)
    with pytest.raises(FloatingPointError, match="value_loss is nan"):
        reft.optimiser_step(broken, batch, optimizer, ARGS)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_batches_are_stateless_and_visit_everything_once_an_epoch():
    items = [chr(97 + i) for i in range(10)]
    drawn = list(itertools.chain(*[reft.draw(items, 4, step, 0) for step in range(1, 6)]))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == items and drawn[:10] != drawn[10:]
    assert reft.draw(items, 4, 4, 0) == drawn[12:16] and reft.draw(items, 4, 4, 1) != drawn[12:16]
