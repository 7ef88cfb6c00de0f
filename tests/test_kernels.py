"""The kernels against float64, values and gradients, and the bugs that such kernels have had elsewhere.

Every test of a public function runs both paths. Without a GPU the Triton path is the interpreter's, 3 ms for a loop
iteration of a row: few rows above a vocabulary of 5003, and tiles of a few rows for the linear functions.
"""
import inspect
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import (bench, decode, kl, linear, linear_kl, linear_logprobs, linear_stats, logprob, sample, token_kl,
                     token_logprobs)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")     # numpy in the interpreter

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [
    2,          # the smallest with a choice
    37,         # ragged, far below one block
    1001,       # ragged, below one block
    1408,       # a multiple of 128 and of no block
    4096,       # whole blocks of every kernel but one
    5003,       # ragged, above a block
    50257,      # GPT-2
    151936,     # Qwen2.5
]
LOGITS = {
    "normal": lambda z: 3 * z,
    "wide": lambda z: 30 * z,
    "negative": lambda z: z - 120,              # a running maximum that starts at 0 breaks here
    "very negative": lambda z: 3 * z - 500,
    "offset": lambda z: 3 * z + 3e4,            # a log-normaliser kept as one float32 number breaks here
    "equal": lambda z: 0 * z + 7,
    "peaks": lambda z: 2 * z + 16 * (z > 3),    # like a language model: a few tokens have all the probability
}


needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="triton is not installed: Mac, Windows")


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def path(request, monkeypatch):
    monkeypatch.setattr(kernels, "PATH", request.param)
    return request.param


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Several tiles in every direction from the smallest inputs, and several chunks of the plain torch path."""
    for name, value in dict(HEIGHT=4, WIDTH=128, TALL=8, CHUNK=1000).items():
        monkeypatch.setattr(linear, name, value)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tokens(N, V, seed=0):
    y = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    y[:1] = V - 1                               # the last column of a ragged row
    return y


def rows(V):
    return 3 if V <= 5003 else 1


def truth(z, y, r=None):
    """The textbook's formulas. In float64 they are the truth, in float32 what torch alone would give."""
    logp = z.log_softmax(-1)
    out = logp.gather(-1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    return out if r is None else (*out, (logp.exp() * (logp - r.log_softmax(-1))).sum(-1))


def linear_truth(x, W, y, ref_x=None, ref_W=None):
    if ref_x is None:
        return truth(x @ W.T, y)
    r = ref_x @ ref_W.T
    return *truth(x @ W.T, y, r), truth(r, y)[0]


def run(function, trained, *fixed, g):
    """Values of a function, and the gradients to `trained` for upstream gradients g, one row for each output."""
    trained = [x.detach().clone().requires_grad_() for x in trained]
    out = function(*trained, *fixed)
    out = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if o is not None]      # gradients of len(g) of them
    return [o.detach() for o in out], torch.autograd.grad(sum((o * i).sum() for o, i in zip(out, g)), trained)


def doubles(*tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def error(a, b):
    return (a.double() - b).abs().max().item() if a.numel() else 0.0


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


# --- from logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, V", [(kind, V) for kind in LOGITS for V in SIZES if V <= 5003 or kind == "peaks"])
def test_logprobs(path, kind, V):
    z, y, g = LOGITS[kind](normal(rows(V), V)), tokens(rows(V), V), normal(2, rows(V), seed=1)
    (logprobs, entropy), (dz,) = run(token_logprobs, [z], y, g=g)
    exact, (exact_dz,) = run(truth, doubles(z), y, g=g.double())
    plain, (plain_dz,) = run(truth, [z], y, g=g)
    assert logprobs.dtype == entropy.dtype == dz.dtype == torch.float32
    assert error(logprobs, exact[0]) <= 2e-6 + 1e-7 * (z.max() - z.min()).item()
    assert error(entropy, exact[1]) <= (2e-6 if path == "triton" else 5e-6)     # torch: one long sum of log p
    assert error(dz, exact_dz) <= 1e-6 * g.abs().max().item()
    assert logprobs.max() <= 1e-6
    for ours, theirs, right in zip((logprobs, entropy, dz), (*plain, plain_dz), (*exact, exact_dz)):
        assert error(ours, right) <= 3 * error(theirs, right) + 1e-6            # 1e-6: where torch is right by luck


DISTANCES = 1.0, 0.05, 0.005, 5e-4              # between the logits: KL near 0.3, 1e-3, 1e-5 and 1e-7


@pytest.mark.parametrize("distance, V", [(d, V) for d in DISTANCES for V in SIZES if V <= 5003 or d == 0.005])
def test_kl(path, distance, V):
    z, g = LOGITS["normal"](normal(rows(V), V)), normal(1, rows(V), seed=1)
    r = z + distance * normal(rows(V), V, seed=2) + 5                           # 5: the common offset has to drop out
    (kl,), (dz,) = run(token_kl, [z], r, g=g)
    y = tokens(rows(V), V)
    exact, (exact_dz,) = run(lambda z, r: truth(z, y, r)[2:], doubles(z), r.double(), g=g.double())
    assert kl.min() >= 0 and kl.dtype == torch.float32
    small, share = (1e-12, 1e-4) if path == "triton" else (1e-9, 1e-3)          # torch rounds log p and log q first
    assert ((kl - exact[0]).abs() <= small + share * exact[0]).all()
    assert error(dz, exact_dz) <= 1e-6 * g.abs().max().item()
    assert dz.sum(-1).abs().max() <= 3e-6 * distance                            # far below dz: no direction of its own


@pytest.mark.parametrize("kind", ["wide", "negative", "offset", "equal", "peaks"])
def test_kl_kinds(path, kind):
    z = LOGITS[kind](normal(3, 1001))
    r, g = z + 0.05 * normal(3, 1001, seed=2), normal(1, 3, seed=1)
    (kl,), (dz,) = run(token_kl, [z], r, g=g)
    exact, (exact_dz,) = run(lambda z, r: truth(z, tokens(3, 1001), r)[2:], doubles(z), r.double(), g=g.double())
    assert kl.min() >= 0
    assert ((kl - exact[0]).abs() <= 1e-9 + 1e-3 * exact[0]).all()
    assert error(dz, exact_dz) <= 1e-6 * g.abs().max().item()


def test_kl_of_identical_logits_is_exactly_zero(path):
    z = LOGITS["wide"](normal(3, 5003))
    (kl,), (dz,) = run(token_kl, [z], z.clone(), g=torch.ones(1, 3, device=DEVICE))
    assert (kl == 0).all() and (dz == 0).all()


def test_kl_of_disjoint_rows(path):
    """p underflows where q is 1: a form that divides by p gives inf or NaN."""
    z, r = torch.zeros(2, 1, 50, device=DEVICE)
    z[0, 3], r[0, 7] = 200, 200
    (kl,), (dz,) = run(token_kl, [z], r, g=torch.ones(1, 1, device=DEVICE))
    assert abs(kl.item() - 200) < 1e-3 and dz.isfinite().all()


def test_entropy_alone_has_a_gradient(path):
    z, y = LOGITS["normal"](normal(3, 37)), tokens(3, 37)
    ones = torch.ones(1, 3, device=DEVICE)
    _, (dz,) = run(lambda z: token_logprobs(z, y)[1], [z], g=ones)
    _, (exact,) = run(lambda z: truth(z, y)[1:], doubles(z), g=ones)
    assert dz.abs().max() > 0.01 and error(dz, exact) <= 1e-6


def test_upstream_gradients(path):
    """Rows with gradient 0 get exactly 0, and the gradient of a sum, one number with stride 0, is read right."""
    z, r, y = normal(4, 37), normal(4, 37, seed=1), tokens(4, 37)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    for function, exact in ((lambda z: token_logprobs(z, y), lambda z: truth(z, y)),
                            (lambda z: [token_kl(z, r)], lambda z: truth(z, y, r.to(z.dtype))[2:])):
        a = z.clone().requires_grad_()
        torch.where(mask, sum(function(a)), 0).sum().backward()
        b = z.double().requires_grad_()
        sum(exact(b))[mask].sum().backward()
        assert error(a.grad, b.grad) <= 2e-6 and (a.grad[~mask] == 0).all()
        a.grad = b.grad = None
        sum(o.sum() for o in function(a)).backward()
        sum(o.sum() for o in exact(b)).backward()
        assert error(a.grad, b.grad) <= 2e-6


def test_masked_vocabulary(path):
    """-inf logits: never a NaN, and the rest of the row as if those tokens did not exist."""
    z, r, y, inf = normal(3, 37), normal(3, 37, seed=1), tokens(3, 36), -torch.inf
    z[:, 30:36] = r[:, 30:36] = inf                                             # in both: not there
    y[0] = 36
    keep = [v for v in range(37) if not 30 <= v < 36]
    kept_y = torch.where(y == 36, 30, y)
    y[kept_y >= 30], kept_y[kept_y >= 30] = 36, 30
    g = normal(3, 3, seed=3)
    out, (dz,) = run(lambda z: (*token_logprobs(z, y), token_kl(z, r)), [z], g=g)
    exact, (exact_dz,) = run(lambda z: truth(z, kept_y, r[:, keep].double()), [z[:, keep].double()], g=g.double())
    for ours, right in zip((*out, dz[:, keep]), (*exact, exact_dz)):
        assert error(ours, right) <= 2e-6
    assert (dz[:, 30:36] == 0).all()

    (logprobs, _), (dz,) = run(token_logprobs, [z], torch.full_like(y, 33), g=g)        # at the target
    assert (logprobs <= -1e29).all()
    _, (exact_dz,) = run(lambda z: (-z.logsumexp(-1), truth(z, kept_y)[1]), [z[:, keep].double()], g=g.double())
    assert error(dz[:, keep], exact_dz) <= 2e-6 and (dz[:, 30:36] == 0).all()
    r[:, 5] = inf                                                               # in the reference only
    (kl,), (dz,) = run(token_kl, [z], r, g=torch.ones(1, 3, device=DEVICE))
    assert (kl > 1e20).all() and not dz.isnan().any()
    z[:, 5], z[:, 6], r[:, 5] = inf, inf, 0.0                                   # in the policy only
    (kl,), (dz,) = run(token_kl, [z], r, g=torch.ones(1, 3, device=DEVICE))
    assert kl.isfinite().all() and (kl > 0).all() and dz.isfinite().all()


@pytest.mark.parametrize("V", [5, 37, 4096, 5003])
@pytest.mark.parametrize("who", ["policy", "reference", "both"])
def test_nothing_can_be_said(path, who, V):
    """A row of -inf is uniform and has no gradient, on both paths, however many lanes of a block lie beyond V."""
    z, r, y, g = normal(3, V), normal(3, V, seed=1), tokens(3, V), normal(3, 3, seed=3)
    dead = [x for name, x in (("policy", z), ("reference", r)) if who in (name, "both")]
    for x in dead:
        x[1] = 0
    exact, (exact_dz,) = run(lambda z: truth(z, y, r.double()), doubles(z), g=g.double())
    for x in dead:
        x[1] = -torch.inf
    out, (dz,) = run(lambda z: (*token_logprobs(z, y), token_kl(z, r)), [z], g=g)
    assert all(error(ours, right) <= 5e-6 for ours, right in zip(out, exact))
    assert (out[2][1] == 0) == (who == "both")
    if who != "reference":
        assert (dz[1] == 0).all()
        dz, exact_dz = dz[::2], exact_dz[::2]
    assert error(dz, exact_dz) <= 2e-6


def test_one_word_can_be_said(path):
    z, r, y, g = torch.full((1, 37), -torch.inf, device=DEVICE), normal(1, 37), tokens(1, 37), normal(3, 1, seed=3)
    z[0, y[0]] = -3.0
    (logprobs, entropy, kl), (dz,) = run(lambda z: (*token_logprobs(z, y), token_kl(z, r)), [z], g=g)
    assert logprobs == entropy == 0 and (dz == 0).all()
    assert error(kl, -truth(r.double(), y)[0]) <= 2e-6
    for bad in torch.nan, torch.inf:                        # and this is not a row of nothing
        z[0, y[0]] = bad
        assert all(out.isnan() for out in (*token_logprobs(z, y), token_kl(z, r), token_kl(r, z)))


def test_padding_under_where(path):
    """Rows that the caller masks may hold anything finite or -inf: they give no NaN and get no gradient."""
    z, r, y = normal(3, 37), normal(3, 37, seed=1), tokens(3, 37)
    z[1] = r[1] = -torch.inf
    z.requires_grad_()
    mask = torch.tensor([True, False, True], device=DEVICE)
    torch.where(mask, sum(token_logprobs(z, y)) + token_kl(z, r), 0).sum().backward()
    assert z.grad.isfinite().all() and (z.grad[1] == 0).all() and (z.grad[0] != 0).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_comes_out(path, bad):
    """A NaN or +inf logit makes its own row NaN, as in torch, and no other."""
    z, r, y = normal(3, 37), normal(3, 37, seed=1), tokens(3, 37)
    z[1, 20] = bad
    for out in (*token_logprobs(z, y), token_kl(z, r), token_kl(r, z)):
        assert out.isnan().tolist() == [False, True, False]
    for function in (lambda z: token_logprobs(z, y), lambda z: token_kl(z, r)):
        _, (dz,) = run(function, [z], g=torch.ones(2, 3, device=DEVICE))
        assert dz[1].isnan().any() and dz[::2].isfinite().all()


def test_half_precision(path):
    """Half-precision logits give float32 results, as good as float32 arithmetic on the same logits."""
    for dtype, rounding in ((torch.bfloat16, 2 ** -7), (torch.float16, 2 ** -10)):     # the interpreter truncates
        z, y = LOGITS["normal"](normal(3, 1001)).to(dtype), tokens(3, 1001)
        r, g = (z + 0.1 * normal(3, 1001, seed=1)).to(dtype), normal(3, 3, seed=2)
        for function, exact in ((lambda z: token_logprobs(z, y), lambda z: truth(z, y)),
                                (lambda z: token_kl(z, r), lambda z: truth(z, y, r.double())[2:])):
            out, (dz,) = run(function, [z], g=g)
            right, (right_dz,) = run(exact, doubles(z), g=g.double())
            assert all(o.dtype == torch.float32 and error(o, i) <= 1e-5 for o, i in zip(out, right))
            assert dz.dtype == dtype and ((dz - right_dz).abs() <= rounding * right_dz.abs() + 1e-5).all()


def test_shapes_and_strides(path):
    """Any leading shape, transposed or sliced logits, no rows at all; inputs stay as they are."""
    z, y = normal(2, 3, 37), tokens(6, 37).view(2, 3)
    logprobs, entropy = token_logprobs(z, y)
    assert logprobs.shape == entropy.shape == token_kl(z, z + 1).shape == (2, 3)
    W = normal(11, 37, seed=1)
    flat = linear_stats(z.view(6, 37), W, y.view(6) % 11, z.view(6, 37) + 1, W)
    for ours, same in zip(linear_stats(z, W, y % 11, z + 1, W), flat):
        assert ours.shape == (2, 3) and torch.equal(ours.view(6), same)
    wide = torch.full((6, 64), torch.nan, device=DEVICE)                        # NaN beside the rows
    wide[:, 9:46] = z.view(6, 37)
    before = wide.clone()
    for same in (wide[:, 9:46], z.view(6, 37).T.contiguous().T):
        assert torch.equal(token_logprobs(same, y.view(6))[0], logprobs.view(6))
        assert torch.equal(token_kl(same, z.view(6, 37) + 1), token_kl(z, z + 1).view(6))
    assert torch.equal(wide.nan_to_num(7), before.nan_to_num(7))
    empty = torch.zeros(0, 37, device=DEVICE, requires_grad=True)
    assert token_logprobs(empty, y.view(6)[:0])[0].shape == token_kl(empty, empty.detach()).shape == (0,)
    (sum(token_logprobs(empty, y.view(6)[:0])) + token_kl(empty, empty.detach())).sum().backward()
    assert empty.grad.shape == (0, 37)


def test_bad_arguments(path):
    z, y = normal(3, 37), tokens(3, 37)
    for call in (lambda: token_logprobs(z, y[:2]), lambda: token_logprobs(z, y.float()), lambda: token_kl(z, z[:, :36]),
                 lambda: token_kl(z, z.clone().requires_grad_()), lambda: linear_logprobs(z, z[:, :36], y),
                 lambda: linear_kl(z, z, z, z[:2]), lambda: linear_stats(z, z, y, z),
                 lambda: linear_kl(z, z, z, z.clone().requires_grad_())):
        with pytest.raises(ValueError, match="token_|linear_"):
            call()


# --- through the head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, V, D, tile", [
    (0, 37, 64, (4, 128, 8)),                   # nothing
    (1, 2, 64, (1024, 40960, 4096)),            # the smallest, in one tile of the real size
    (3, 300, 96, (1, 128, 2)),                  # tiles of one row; three slices, a ragged one
    (9, 150, 64, (4, 128, 8)),                  # a ragged tile at every end, two additions to d weight
    (5, 37, 96, (1024, 40960, 4096)),           # a tile larger than everything
])
def test_linear(path, N, V, D, tile, monkeypatch):
    for name, value in zip(("HEIGHT", "WIDTH", "TALL"), tile):
        monkeypatch.setattr(linear, name, value)
    monkeypatch.setattr(linear, "CHUNK", tile[0] * V)
    x, W, y, g = normal(N, D), normal(V, D, seed=1) / 4, tokens(N, V), normal(3, N, seed=4)
    ref_x, ref_W = normal(N, D // 2, seed=2), normal(V, D // 2, seed=3) / 4
    for more in ((), (ref_x, ref_W)):
        out, grads = run(linear_stats, [x, W], y, *more, g=g)
        exact, exact_grads = run(linear_truth, doubles(x, W), y, *doubles(*more), g=g.double())
        plain, _ = run(linear_truth, [x, W], y, *more, g=g)
        assert len(out) == len(exact) == (4 if more else 2)
        for ours, theirs, right in zip(out, plain, exact):
            assert ours.dtype == torch.float32 and ours.shape == (N,)
            assert error(ours, right) <= max(5e-6, 3 * error(theirs, right))
        for ours, right, like in zip(grads, exact_grads, (x, W)):
            assert ours.dtype == like.dtype and ours.shape == like.shape and relative(ours, right) <= 5e-6
        _, (dx,) = run(lambda x: linear_stats(x, W, y, *more), [x], g=g)              # frozen head
        assert torch.equal(dx, grads[0])
        _, (dW,) = run(lambda W: linear_stats(x, W, y, *more), [W], g=g)              # frozen trunk
        assert torch.equal(dW, grads[1])
    if N:
        logprobs, entropy, kl, ref_logprobs = linear_stats(x.requires_grad_(), W, y, ref_x, ref_W)
        assert torch.equal(linear_kl(x, W, ref_x, ref_W), kl) and kl.requires_grad and not ref_logprobs.requires_grad
        apart = *linear_logprobs(x, W, y), linear_logprobs(ref_x, ref_W, y)[0]
        together = logprobs, entropy, ref_logprobs
        assert all(torch.equal(a, b) if path == "triton" else error(a, b.double()) <= 1e-6 for a, b in zip(apart, together))
        assert linear_stats(x, W, y)[2:] == (None, None)


@pytest.mark.parametrize("distance", [0.05, 0.005, 0.0])
def test_linear_small_kl(path, tiny_tiles, distance):
    """The chain rule over slices of the vocabulary keeps a small KL right, never negative, and 0 where it is 0."""
    x, W = normal(5, 64), normal(300, 64, seed=1) / 4
    ref_x = x + distance * normal(5, 64, seed=2)
    exact = truth(x.double() @ W.double().T, tokens(5, 300), ref_x.double() @ W.double().T)[2]
    (kl,), grads = run(lambda x, W: linear_kl(x, W, ref_x, W.detach()), [x, W], g=torch.ones(1, 5, device=DEVICE))
    assert kl.min() >= 0 and ((kl - exact).abs() <= 1e-9 + 1e-3 * exact).all()
    if distance == 0:
        assert (kl == 0).all() and all((d == 0).all() for d in grads)


@needs_triton
def test_linear_masked_vocabulary(monkeypatch):
    """A slice of the vocabulary that no one can say, in the policy or in both, adds nothing and breaks nothing."""
    monkeypatch.setattr(kernels, "PATH", "triton")
    monkeypatch.setattr(linear, "WIDTH", 16)
    z, r, y = normal(3, 37), normal(3, 37, seed=1), tokens(3, 37)
    z[:, 16:32] = -torch.inf
    r[0, 16:32] = -torch.inf
    y = torch.where(y // 16 == 1, 0, y)
    monkeypatch.setattr(linear, "logits", lambda x, start, weight: x[:, weight.argmax(1)])
    head = torch.eye(37, device=DEVICE)                     # hidden states are logits
    logprobs, entropy, stats, kl, mean_d, ref_logprobs, _ = linear.forward(z, head, y, r, head, torch.float32)
    keep = [*range(16), *range(32, 37)]
    exact = truth(z[:, keep].double(), torch.where(y >= 32, y - 16, y), r[:, keep].double())
    assert error(logprobs, exact[0]) <= 2e-6 and error(entropy, exact[1]) <= 2e-6
    ref_exact = truth(r[:1, keep].double(), torch.where(y >= 32, y - 16, y)[:1])[0]
    assert abs(kl[0] - exact[2][0]) <= 1e-5 and error(ref_logprobs[:1], ref_exact) <= 2e-6
    assert kl.isfinite().all() and mean_d.isfinite().all() and stats.isfinite().all()

    z[1] = r[1] = z[2] = -torch.inf                         # nothing at all: uniform over all slices, no gradient
    logprobs, entropy, *more = linear.forward(z, head, y, r, head, torch.float32)
    exact = truth(torch.zeros(3, 37), y.cpu(), r.double().cpu())
    assert all(error(ours[1:].cpu(), right[1:]) <= 2e-6 for ours, right in zip((logprobs, entropy), exact))
    stats, kl, mean_d, ref_logprobs, ref_stats = more
    assert kl[1] == 0 and ref_logprobs[1] == logprobs[1] and abs(kl[2] - exact[2][2]) <= 2e-6
    dx, _ = linear.gradient(z, head, y, r, head, entropy, stats, mean_d, ref_stats, *normal(3, 3), torch.float32, True)
    assert dx[0].any() and (dx[1:] == 0).all()


def test_linear_accumulates_in_float32(path, monkeypatch):
    """Half-precision weights: d weight from 16 tiles is as good as from one, and rounded once."""
    x, W = normal(64, 64).bfloat16(), (normal(37, 64, seed=1) / 8).bfloat16()
    y, g = tokens(64, 37), torch.ones(2, 64, device=DEVICE)
    _, (_, exact) = run(linear_truth, doubles(x, W), y, g=g.double())
    errors = []
    for height in (64, 4):
        for name, value in dict(HEIGHT=height, TALL=height, CHUNK=height * 37).items():
            monkeypatch.setattr(linear, name, value)
        (logprobs, _), (dx, dW) = run(linear_stats, [x, W], y, g=g)
        assert logprobs.dtype == torch.float32 and dx.dtype == dW.dtype == torch.bfloat16
        errors.append(relative(dW, exact))
    assert errors[1] <= 1.1 * errors[0] and errors[0] < 1e-2


def test_linear_under_autocast(path, tiny_tiles):
    """Operands rounded to bfloat16, logits and d weight of a float32 head in float32."""
    x, W, y, g = normal(9, 64), normal(37, 64, seed=1) / 8, tokens(9, 37), torch.ones(2, 9, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, (dx, dW) = run(linear_stats, [x, W], y, g=g)
    exact, (_, exact_dW) = run(linear_truth, doubles(x.bfloat16(), W.bfloat16()), y, g=g.double())
    assert dx.dtype == dW.dtype == torch.float32
    assert error(out[0], exact[0]) <= 5e-6 and error(out[1], exact[1]) <= 5e-6
    assert relative(dW, exact_dW) <= 1e-2       # G and its operands are bfloat16


@needs_triton
def test_frozen_head_costs_less(monkeypatch):
    """One tile: its logits forward and backward and d hidden; d weight only of a trained head."""
    monkeypatch.setattr(kernels, "PATH", "triton")
    products, product = [], linear.product
    monkeypatch.setattr(linear, "product", lambda *args, **kwargs: products.append(args) or product(*args, **kwargs))
    x, W, y, g = normal(3, 8), normal(37, 8), tokens(3, 37), torch.ones(2, 3, device=DEVICE)
    run(linear_logprobs, [x, W], y, g=g)
    assert len(products) == 4
    run(linear_logprobs, [x], W, y, g=g)
    assert len(products) == 4 + 3


class PeakMemory(TorchDispatchMode):
    """Most bytes of tensors made inside the block that were alive at one time."""

    def __enter__(self):
        self.live, self.peak, self.seen = 0, 0, weakref.WeakSet()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = ([t.untyped_storage() for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
                       for x in ((args, kwargs), out))
        for storage in made:
            if storage not in self.seen and not any(storage is s for s in given):
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, storage.nbytes())
        return out

    def release(self, nbytes):
        self.live -= nbytes


class NoKernel:
    """Stands for a kernel where only the tensors around it matter."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


GiB = 2 ** 30


@needs_triton
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])        # a float32 one's copy would be 0.43 GiB
def test_peak_memory_of_the_head(monkeypatch, reference, weights):
    """N = 8192, V = 151936, D = 1536 on the meta device: all tensors and products of both passes, no arithmetic."""
    N, V, D, work = 8192, 151936, 1536, []

    def product(a, b, out=None, add=False):                                 # CUDA's: the operands as they are
        work.append(a.shape[0] * a.shape[1] * b.shape[1] / (N * V * D))
        return out if out is not None else a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    monkeypatch.setattr(linear, "product", product)
    for module in (logprob, kl):
        monkeypatch.setattr(module, "forward_kernel", NoKernel())
        monkeypatch.setattr(module, "backward_kernel", NoKernel())
    meta = dict(device="meta")
    x, W = torch.empty(N, D, dtype=torch.bfloat16, **meta), torch.empty(V, D, dtype=weights, **meta)
    y, g = torch.zeros(N, dtype=torch.long, **meta), torch.empty(3, N, **meta)
    ref = (x, W) if reference else (None, None)
    with PeakMemory() as forward:
        _, entropy, stats, _, mean_d, _, ref_stats = linear.forward(x, W, y, *ref, torch.bfloat16)
    with PeakMemory() as backward:
        dx, dW = linear.gradient(x, W, y, *ref, entropy, stats, mean_d, ref_stats, *g, torch.bfloat16, False)
    assert abs(sum(work) - (6 if reference else 4)) < 1e-9                   # 12NVD or 8NVD operations
    work.clear()
    _, nothing = linear.gradient(x, W, y, *ref, entropy, stats, mean_d, ref_stats, *g, torch.bfloat16, True)
    assert abs(sum(work) - (3 if reference else 2)) < 1e-9 and nothing.numel() == 0         # a frozen head: 2NVD less
    gradients = dx.nbytes + dW.nbytes
    print(f"\npeak beyond inputs and gradients: forward {forward.peak / GiB:.2f} GiB, "
          f"backward {(backward.peak - gradients) / GiB:.2f} GiB")
    assert 0.05 < forward.peak / GiB <= 0.6 and 0.2 < (backward.peak - gradients) / GiB <= 1         # torch.compile: 11.6


def test_peak_memory_of_plain_torch(monkeypatch):
    """The chunks of the torch path: a few copies of one chunk of logits, never of all."""
    N, V, D = 1024, 16384, 64
    monkeypatch.setattr(linear, "CHUNK", 64 * V)
    x, W = (torch.empty(n, D, device="meta", requires_grad=True) for n in (N, V))
    y = torch.zeros(N, dtype=torch.long, device="meta")
    with PeakMemory() as memory:
        logprobs, entropy, kl, _ = linear.linear_chunks(x, W, y, x.detach(), W.detach())
        (logprobs + entropy + kl).sum().backward()
    chunk = 4 * linear.CHUNK
    print(f"\npeak: {memory.peak / chunk:.1f} chunks of logits")
    assert chunk < memory.peak < 16 * chunk == 4 * N * V


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("reference", [False, True])
def test_peak_memory_on_the_gpu(reference):
    N, V, D = 8192, 151936, 1536
    x, ref_x, ref_W = (torch.randn(n, D, device=DEVICE, dtype=torch.bfloat16) for n in (N, N, V))
    W, y = torch.randn(V, D, device=DEVICE), torch.randint(0, V, (N,), device=DEVICE)
    x.requires_grad_(), W.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_stats(x, W, y, *((ref_x, ref_W) if reference else ()))
    sum(o.sum() for o in out if o is not None).backward()
    gradients = x.grad.nbytes + W.grad.nbytes
    assert (torch.cuda.max_memory_allocated() - before - gradients) / GiB <= 1


# --- what holds for all -----------------------------------------------------------------------------------------------


def test_repeatable_and_independent_of_the_batch(path, tiny_tiles):
    """The same call twice, and a row among others and alone, give the same bits."""
    z, r, y = normal(5, 1001), normal(5, 1001, seed=1), tokens(5, 1001)
    x, W = normal(5, 64), normal(300, 64, seed=2) / 4
    calls = {"rows": lambda i: (*token_logprobs(z[i], y[i]), token_kl(z[i], r[i])),
             "head": lambda i: linear_stats(x[i], W, y[i] % 300, x[i] + 0.1, W)}
    everything, permuted = torch.arange(5, device=DEVICE), torch.tensor([3, 0, 4, 1, 2], device=DEVICE)
    for name, call in calls.items():
        for a, b, c, d in zip(call(everything), call(everything), call(permuted), call(everything[4:])):
            assert torch.equal(a, b)
            if path == "triton":                # torch's own products promise nothing
                assert torch.equal(a[permuted], c) and torch.equal(a[4:], d), name


@needs_triton
def test_everything_is_written_and_nothing_else():
    """Outputs full of NaN come back without one, and the NaN around them stay."""
    V, y = 37, tokens(3, 37)
    z, r = normal(3, V), normal(3, V, seed=1)
    boxes = {name: torch.full((5, width), torch.nan, device=DEVICE)
             for name, width in dict(logprob=1, entropy=1, stats=2, ref_stats=2, kl=1, mean_d=1, dz=V, both=V).items()}
    inner = {name: box[1:4] for name, box in boxes.items()}
    sizes, g = dict(BLOCK=64, num_warps=4), torch.ones(3, device=DEVICE)
    lp, H = inner["logprob"], inner["entropy"]
    logprob.forward_kernel[(3,)](z, y, lp, H, inner["stats"], V, V, Q=2, **sizes)
    logprob.forward_kernel[(3,)](r, y, torch.empty_like(g), torch.empty_like(g), inner["ref_stats"], V, V, Q=2, **sizes)
    kl.forward_kernel[(3,)](z, r, inner["stats"], inner["ref_stats"], inner["kl"], inner["mean_d"], V, V, V, **sizes)
    logprob.backward_kernel[(3,)](z, y, inner["stats"], H, g, g, inner["dz"], V, V, **sizes)
    kl.backward_kernel[(3,)](z, r, inner["stats"], inner["ref_stats"], inner["mean_d"], g, y, H, g, g, inner["both"],
                             V, V, V, LOGPROBS=True, **sizes)
    for name, box in boxes.items():
        assert not box[1:4].isnan().any() and box[0].isnan().all() and box[4].isnan().all(), name


@needs_triton
def test_offsets_beyond_int32(monkeypatch):
    """Rows 1.2e9 elements apart: the third starts beyond 2^31. The memory between them is never touched."""
    monkeypatch.setattr(kernels, "PATH", "triton")
    V, stride = 37, 1_200_000_000
    z = torch.empty(2 * stride + V, dtype=torch.bfloat16, device=DEVICE).as_strided((3, V), (stride, 1))
    z.copy_(normal(3, V))
    r, y = normal(3, V, seed=1), tokens(3, V)
    out = *logprob.launch_forward(z, y)[:2], token_kl(z, r), token_kl(r, z)
    exact = *truth(z.double(), y), truth(z.double(), y, r.double())[2], truth(r.double(), y, z.double())[2]
    assert all(error(ours, right) <= 1e-5 for ours, right in zip(out, exact))
    stats, H, g = logprob.launch_forward(z, y)[2], out[1], torch.ones(3, device=DEVICE)
    dz = logprob.launch_backward(torch.empty(3, V, device=DEVICE), z, y, stats, H, g, g)
    _, (exact_dz,) = run(truth, [z.double().contiguous()], y, g=torch.ones(2, 3, device=DEVICE))
    assert error(dz, exact_dz) <= 2e-6


@needs_triton
def test_targets_out_of_range(monkeypatch):
    """Where an error would have to wait for the GPU the log-prob is NaN; plain torch raises."""
    monkeypatch.setattr(kernels, "PATH", "triton")
    logprobs, entropy = token_logprobs(normal(3, 37), torch.tensor([-1, 5, 37], device=DEVICE))
    assert logprobs.isnan().tolist() == [True, False, True] and entropy.isfinite().all()
    monkeypatch.setattr(linear, "WIDTH", 16)
    logprobs, _ = linear_logprobs(normal(3, 8), normal(37, 8), torch.tensor([-1, 5, 37], device=DEVICE))
    assert logprobs.isnan().tolist() == [True, False, True]


def test_references():
    """The plain torch that a reader compares the kernels with: its own gradients, and its values in float64."""
    z, r, y = (x.cpu() for x in (normal(3, 11).double(), normal(3, 11, seed=1).double(), tokens(3, 11)))
    z.requires_grad_()                          # float64 is for the references: the kernels take none
    assert torch.autograd.gradcheck(lambda z: logprob.logprobs_reference(z, y), z)
    assert torch.autograd.gradcheck(lambda z: kl.kl_reference(z, r), z)
    for ours, right in zip((*token_logprobs(z, y), kl.kl_reference(z, r)), truth(z, y, r)):
        assert error(ours, right) <= 1e-6


@needs_triton
def test_kernels_refuse_float64(monkeypatch):
    monkeypatch.setattr(kernels, "PATH", "triton")
    z, y = normal(3, 11).double(), tokens(3, 11)
    for call in (lambda: token_logprobs(z, y), lambda: token_kl(z, z), lambda: linear_logprobs(z, z, y)):
        with pytest.raises(TypeError, match="float32, bfloat16 or float16, not torch.float64"):
            call()


@needs_triton
def test_opcheck(tiny_tiles):
    z, r, y, g = normal(3, 37), normal(3, 37, seed=1), tokens(3, 37), normal(3, seed=2)
    x, W = normal(3, 8), normal(37, 8, seed=3)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    lp, H, stats = logprob.logprobs_op(z, y)
    _, mean_d = kl.kl_op(z, r, stats, stats)
    trained = [t.clone().requires_grad_() for t in (x, W)]
    for op, args in ((logprob.logprobs_op, (z.clone().requires_grad_(), y)),
                     (logprob.gradient_op, (z, y, stats, H, g, g)),
                     (kl.kl_op, (z.clone().requires_grad_(), r, stats, stats)),
                     (kl.gradient_op, (z, r, stats, stats, mean_d, g)),
                     (linear.linear_op, (*trained, y, x, W, torch.float32)),
                     (linear.linear_op, (*trained, y, None, None, torch.float32)),
                     (linear.gradient_op, (x, W, y, x, W, H, stats, mean_d, stats, g, g, g, torch.float32, True))):
        torch.library.opcheck(op, args, test_utils=checks)


def test_compile_does_not_break_the_graph(path, tiny_tiles):
    """One graph, the same numbers, and a new number of rows compiles once more and then never again."""

    def loss(x, W, y, ref_x, r):
        logprobs, entropy, kl, ref_logprobs = linear_stats(x, W, y, ref_x, W.detach())
        rows = sum(token_logprobs(x @ W.T, y)) + token_kl(x @ W.T, r)
        return (logprobs * ref_logprobs - 0.1 * entropy + kl + rows).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for N in (5, 7, 6):
        x, W = normal(N, 8).requires_grad_(), normal(37, 8, seed=1).requires_grad_()
        fixed = tokens(N, 37), normal(N, 8, seed=2), normal(N, 37, seed=3)
        eager, ours = (torch.autograd.grad(f(x, W, *fixed), (x, W)) for f in (loss, compiled))
        assert all((a - b).abs().max() <= 1e-5 for a, b in zip(eager, ours))
    if path == "triton":                        # the plain path is unrolled over its chunks
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@needs_triton
def test_only_block_sizes_and_flags_are_constexpr():
    """A length that is constexpr compiles again for every new length."""
    for kernel in (logprob.forward_kernel, logprob.backward_kernel, kl.forward_kernel, kl.backward_kernel,
                   sample.slice_kernel, sample.join_kernel, decode.attention_kernel, decode.add_norm_kernel,
                   decode.activation_kernel):
        constants = {name for name, p in inspect.signature(kernel.fn).parameters.items() if p.annotation is not p.empty}
        of_a_model = {"K", "GROUP", "D", "EPS", "SCALE", "HEADS", "WIDE"} if kernel.fn.__module__ == "kernels.decode" else set()
        assert constants <= {"BLOCK", "SLICE", "Q", "LOGPROBS", "GREEDY", "GATED"} | of_a_model


PROGRAM = """
import os, sys, torch
for triton, KERNELS in ("", "triton"), ("missing", ""), ("", "cuda"), ("missing", "triton"):
    if os.fork():                                       # so torch is loaded once for the four
        os.wait()
        continue
    if triton:
        sys.modules["triton"] = None
    if KERNELS:
        os.environ["KERNELS"] = KERNELS
    try:
        import kernels
        z = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
        lp, H = kernels.token_logprobs(z, torch.tensor([0, 4]))
        print(kernels.PATH, type(kernels.logprob.forward_kernel).__name__, round(lp.sum().item(), 4), flush=True)
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
"""


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for machines without a GPU")
def test_environment_variable():
    env = {k: v for k, v in os.environ.items() if k not in ("KERNELS", "TRITON_INTERPRET")}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, text=True, capture_output=True)
    assert run.stdout.count("\n") == 4, run
    forced, plain, wrong, missing = run.stdout.splitlines()
    assert forced.split()[:2] == ["triton", "InterpretedFunction"]
    assert plain.split()[0] == "function"                                       # a machine without Triton
    assert forced.split()[-1] == plain.split()[-1]
    assert "KERNELS=cuda: must be torch, triton or unset" in wrong
    assert "this path needs triton" in missing


# --- the tables -------------------------------------------------------------------------------------------------------


def test_benchmark(tmp_path):
    """A table on a CPU says so; its file holds machine, versions, command and every line."""
    if DEVICE == "cuda":
        pytest.skip("takes minutes on a GPU")
    command = [sys.executable, "-m", "kernels.logprob", "--out", str(tmp_path / "results" / "kernels.json"), "--seconds", "0"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "no GPU here" in run.stdout and not run.stderr, run.stderr
    found = json.loads((tmp_path / "results" / "kernels.json").read_text())["logprob"]
    assert found["versions"]["torch"] == torch.__version__ and found["command"].startswith("python -m kernels.logprob --out")
    ours, = [line for line in found["lines"] if line["name"] == "ours"]
    assert ours["both_ms"] > 0 and max(ours["errors"]) < 1e-5
    assert found["complete"] and list((tmp_path / "results").iterdir()) == [tmp_path / "results" / "kernels.json"]


def toy_table(calls, seconds=0.0):
    z, y = normal(4, 37), tokens(4, 37)
    return bench.table("toy", calls, logprob.logprobs_reference, [z], [y], "GB/s", (1, 3), seconds)


def test_a_rival_that_fails_is_a_line_with_its_reason(capsys):
    """Missing, without a name, without an optional part, out of memory, in the backward only, in the middle of the
    rounds: each costs its own line and no other's. What ours raises ends the run."""
    def absent(z, y):
        from no_such_library import logprobs
        return logprobs(z, y)

    def nameless(z, y):
        from math import selective_log_softmax
        return selective_log_softmax(z, y)

    def fails(error):
        def call(z, y):
            raise error
        return call

    class Backward(torch.autograd.Function):
        forward = staticmethod(lambda ctx, z: z.sum(-1))

        @staticmethod
        def backward(ctx, g):
            raise NotImplementedError("no gradient here")

    seen = []

    def late(z, y):
        seen.append(z)
        if len(seen) > 9:                       # six calls are not timed
            raise RuntimeError("CUDA error")
        return token_logprobs(z, y)

    rivals = {"absent": absent, "nameless": nameless, "late": late, "backward": lambda z, y: Backward.apply(z),
              "part": fails(ImportError("backend requires\nan optional part")),
              "memory": fails(torch.OutOfMemoryError("Tried to allocate 2.00 GiB"))}
    lines = {line["name"]: line for line in toy_table({**rivals, "ours": token_logprobs, "torch": truth})}
    assert list(lines) == [*rivals, "ours", "torch"]                                    # the order of the calls
    assert {name: line["failed"].split(" from")[0] for name, line in lines.items() if "failed" in line} == {
        "absent": "ModuleNotFoundError: No module named 'no_such_library'",
        "nameless": "ImportError: cannot import name 'selective_log_softmax'",
        "late": "RuntimeError: CUDA error", "backward": "NotImplementedError: no gradient here",
        "part": "ImportError: backend requires an optional part",
        "memory": "OutOfMemoryError: Tried to allocate 2.00 GiB"}
    assert all(lines[name]["both_ms"] > 0 and lines[name]["errors"][0] < 1e-5 for name in ("ours", "torch"))
    shown = capsys.readouterr().out
    assert all(line["failed"][:60] in shown for line in lines.values() if "failed" in line)
    with pytest.raises(ZeroDivisionError):
        toy_table({"ours": lambda z, y: 1 / 0, "torch": truth})


def test_slow_rivals_take_fewer_rounds():
    def slow(z, y):
        time.sleep(0.01)
        return truth(z, y)

    lines = toy_table({"ours": token_logprobs, "slow": slow}, seconds=1)
    assert lines[0]["rounds"] == bench.ROUNDS > lines[1]["rounds"] >= bench.LEAST


KILLED = """
import time, torch
from kernels import bench, token_logprobs
from kernels.logprob import logprobs_reference

def tables():
    z, y = bench.normal(4, 37), bench.tokens(4, 37)
    yield "first", {"ours": token_logprobs}, logprobs_reference, [z], [y], "GB/s", (1, 3)
    yield "second", {"ours": lambda z, y: time.sleep(600)}, logprobs_reference, [z], [y], "GB/s", (1, 3)

bench.main("toy", tables)
"""


def test_a_run_that_is_killed_keeps_its_tables(tmp_path):
    """The first table is in the file while the second runs, beside what other kernels left there."""
    out = tmp_path / "kernels.json"
    out.write_text(json.dumps({"kl": {"lines": []}}))
    run = subprocess.Popen([sys.executable, "-c", KILLED, "--out", str(out), "--seconds", "0"], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE)
    while "second" not in run.stdout.readline():
        assert run.poll() is None
    run.kill()
    run.communicate()
    found = json.loads(out.read_text())
    assert found["kl"] == {"lines": []} and not found["toy"]["complete"]
    assert [line["table"] for line in found["toy"]["lines"]] == ["first"]
