"""Log-probability, entropy and exact KL through the vocabulary head, without ever holding the (N, V) logits.

    z = hidden weight^T        r = ref_hidden ref_weight^T        logprob, H: logprob.py        KL: kl.py
    d hidden = G weight        d weight = G^T hidden              G = dz of all outputs together

Logits exist one tile at a time, 1024 rows by 40960 words, in float32. Forward: the row kernels reduce a tile to a few
numbers a row; those of the slices s of the vocabulary are joined by the chain rule, P_s being a slice's probability:

    log p_y = log P_s + log p_(y|s)        H = H(P) + sum_s P_s H_s        KL = KL(P || Q) + sum_s P_s KL_s

Backward: the same tile again (the same product, so the same bits) becomes a tile of G. A slice of d weight sums over
all rows of one slice of G, so there is no (V, D) accumulator and no copy of the weight in another dtype. cuBLAS
multiplies, Triton does the rows. Work: 2NVD forward, 8NVD with the backward; 4 and 12 with a reference, whose
log-probability comes with the statistics that the KL needs; 2NVD less for a frozen head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import kl as kl_rows
from kernels import logprob as logprob_rows
from kernels import use_triton

# A tile of logits is 160 MiB. Tiles that stay in the L2 of an H200, 16 to 32 MiB, are slower: two launches cost Python 0.15 ms, so
# 64 MiB took 10.6 ms where 149 MiB took 5.6 (N 8192, V 151936, D 896, forward; with the backward 27.4 and 20.6)
HEIGHT, WIDTH = 1024, 40960
TALL = 4096                     # rows of G: d weight is a long sum instead of many additions to memory
CHUNK = 2 ** 24                 # plain torch: logits alive


def linear_reference(hidden, weight, targets, ref_hidden=None, ref_weight=None):
    """Plain torch, differentiable, all logits at once. `linear_stats` in the dtype of its arguments."""
    r = None if ref_hidden is None else F.linear(ref_hidden, ref_weight)
    return stats_reference(F.linear(hidden, weight), targets, r)


def stats_reference(z, targets, r=None):
    """Finite logits (N, V) and targets (N,) to logprobs, entropy, kl, ref_logprobs (N,); the last two None without r."""
    if r is None:
        return *logprob_rows.logprobs_reference(z, targets), None, None
    logp, logq = z.log_softmax(-1), r.log_softmax(-1)
    logprobs, ref_logprobs = (x.gather(-1, targets[:, None])[:, 0] for x in (logp, logq))
    return logprobs, -(logp.exp() * logp).sum(-1), kl_rows.kl_of_logs(logp, logq), ref_logprobs


def linear_chunks(hidden, weight, targets, ref_hidden=None, ref_weight=None):
    """The same a chunk of rows at a time, its logits computed again in the backward."""
    height = max(1, CHUNK // len(weight))
    if len(hidden) <= height:                               # a small vocabulary: nothing to compute twice
        return linear_reference(hidden, weight, targets, ref_hidden, ref_weight)
    split = [[None] * len(hidden) if x is None else x.split(height) for x in (hidden, targets, ref_hidden)]
    again = dict(use_reentrant=False, preserve_rng_state=False)
    parts = [checkpoint(linear_reference, x, weight, y, ref_x, ref_weight, **again) for x, y, ref_x in zip(*split)]
    return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts))


# ----------------------------------------------------------------------------------------------------------------------


def product(a, b, out=None, add=False):
    """a @ b with float32 sums and result; into `out`, or added to it."""
    if a.is_cuda:
        if add:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    with torch.autocast(a.device.type, enabled=False):      # out_dtype exists on CUDA only
        a, b = a.float(), b.float()
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def logits(x, start, weight):
    """x[start:start + HEIGHT] @ weight.T, always a product of HEIGHT rows: a row's bits do not depend on others."""
    x = x[start:start + HEIGHT]
    padded = x if len(x) == HEIGHT else F.pad(x, (0, 0, 0, HEIGHT - len(x)))
    return product(padded, weight.T)[:len(x)]


def join(stats):
    """Statistics (N, S, 2) of all slices to those of the row (N, 2) and log P_s (N, S)."""
    M = stats[..., 0].amax(1)
    mass = (stats[..., 0] - M[:, None]) / logprob_rows.LN2.value + stats[..., 1]       # log2, relative to 2^(M LOG2E)
    top = mass.amax(1)
    log2S = top + (mass - top[:, None]).exp2().sum(1).log2()
    return torch.stack((M, log2S), 1), (mass - log2S[:, None]) * logprob_rows.LN2.value


def forward(hidden: Tensor, weight: Tensor, y: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None,
            dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D), y (N,) to log-prob, entropy, stats (N, 2), kl, mean_d, ref_log-prob, ref_stats (N, 2).

    The operands of the products are rounded to `dtype`. Without a reference the last four are empty.
    """
    x, ref_x = hidden.to(dtype), None if ref_hidden is None else ref_hidden.to(dtype)

    def tile(c, y_s, W, ref_W):
        y_c, z = y_s[c:c + HEIGHT], logits(x, c, W)
        logprob, entropy, stats = logprob_rows.launch_forward(z, y_c)
        if ref_x is None:
            return logprob, entropy, stats
        r = logits(ref_x, c, ref_W)
        ref_logprob, _, ref_stats = logprob_rows.launch_forward(r, y_c)
        return logprob, entropy, stats, *kl_rows.launch_forward(z, r, stats, ref_stats), ref_logprob, ref_stats

    slices = []
    for s in range(0, len(weight), WIDTH):
        W, ref_W = (w if w is None else w[s:s + WIDTH].to(dtype) for w in (weight, ref_weight))
        y_s = y - s
        tiles = [tile(c, y_s, W, ref_W) for c in range(0, max(len(x), 1), HEIGHT)]
        slices.append([torch.cat(t) for t in zip(*tiles)])
    logprob, entropy, stats, *rest = (torch.stack(t, 1) for t in zip(*slices))          # (N, S), stats (N, S, 2)
    stats, logP = join(stats)
    P = logP.exp()
    own = (y // WIDTH).clamp(0, len(slices) - 1)[:, None]                               # the slice of each target
    logprob, entropy = (logprob + logP).gather(1, own)[:, 0], (P * (entropy - logP)).sum(1)
    if ref_x is None:
        return logprob, entropy, stats, *(x.new_empty(shape, dtype=torch.float32) for shape in ((0,), (0,), (0,), (0, 2)))
    kl, mean_d, ref_logprob, ref_stats = rest
    ref_stats, logQ = join(ref_stats)
    kl, mean_d = kl_rows.kl_sum(logP, logQ) + (P * kl).sum(1), (P * (mean_d + logP - logQ)).sum(1)
    return logprob, entropy, stats, kl, mean_d, (ref_logprob + logQ).gather(1, own)[:, 0], ref_stats


def gradient(hidden: Tensor, weight: Tensor, y: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None,
             entropy: Tensor, stats: Tensor, mean_d: Tensor, ref_stats: Tensor, g_logprob: Tensor, g_entropy: Tensor,
             g_kl: Tensor, dtype: torch.dtype, frozen: bool) -> tuple[Tensor, Tensor]:
    """d hidden (N, D) and d weight (V, D) in their dtypes; of a frozen head's d weight nothing (0, D)."""
    x, ref_x = hidden.to(dtype), None if ref_hidden is None else ref_hidden.to(dtype)
    dx, dW = torch.empty_like(hidden, dtype=torch.float32), torch.empty_like(weight[:0] if frozen else weight)

    def tile(G, c, y_s, W, ref_W):
        z, c = logits(x, c, W), slice(c, c + HEIGHT)
        if ref_x is None:
            logprob_rows.launch_backward(G, z, y_s[c], stats[c], entropy[c], g_logprob[c], g_entropy[c])
        else:
            kl_rows.launch_backward(G, z, logits(ref_x, c.start, ref_W), stats[c], ref_stats[c], mean_d[c], g_kl[c],
                                    y_s[c], entropy[c], g_logprob[c], g_entropy[c])

    for s in range(0, len(weight), WIDTH):
        W, ref_W = (w if w is None else w[s:s + WIDTH].to(dtype) for w in (weight, ref_weight))
        y_s, dW_s = y - s, dW[s:s + WIDTH]                  # a target outside the slice meets no column
        total = dW_s if dW.dtype == torch.float32 else torch.empty_like(dW_s, dtype=torch.float32)
        for top in range(0, max(len(x), 1), TALL):
            x_top = x[top:top + TALL]
            G = x.new_empty(len(x_top), len(W))
            for c in range(0, len(G), HEIGHT):
                tile(G[c:c + HEIGHT], top + c, y_s, W, ref_W)
            product(G, W, dx[top:top + TALL], add=s > 0)
            if not frozen:
                product(G.T, x_top, total, add=top > 0)
        if total is not dW_s:
            dW_s.copy_(total)
    return dx.to(hidden.dtype), dW


linear_op = torch.library.custom_op("kernels::linear", forward, mutates_args=())
gradient_op = torch.library.custom_op("kernels::linear_gradient", gradient, mutates_args=())


@linear_op.register_fake
def _(hidden, weight, y, ref_hidden, ref_weight, dtype):
    N, K = hidden.shape[0], 0 if ref_hidden is None else hidden.shape[0]
    shapes = (N,), (N,), (N, 2), (K,), (K,), (K,), (K, 2)
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


@gradient_op.register_fake
def _(hidden, weight, *rest):
    return torch.empty_like(hidden), torch.empty_like(weight[:0] if rest[-1] else weight)


def save(ctx, inputs, output):
    _, entropy, stats, _, mean_d, ref_logprob, ref_stats = output
    ctx.save_for_backward(*inputs[:5], entropy, stats, mean_d, ref_stats)
    ctx.mark_non_differentiable(stats, mean_d, ref_logprob, ref_stats)
    ctx.dtype = inputs[5]


def backward(ctx, g_logprob, g_entropy, _, g_kl, *__):
    x, W = ctx.needs_input_grad[:2]
    dx, dW = gradient_op(*ctx.saved_tensors, g_logprob, g_entropy, g_kl, ctx.dtype, not W)
    return dx if x else None, dW if W else None, None, None, None, None


linear_op.register_autograd(backward, setup_context=save)


def linear_stats(hidden, weight, targets, ref_hidden=None, ref_weight=None):
    """All that a rollout or a loss wants to know of its tokens, in one pass over the head.

    hidden (..., D), weight (V, D), targets (...) int64; ref_hidden (..., D') and ref_weight (V, D') without gradient
    -> logprobs, entropy, kl = KL(policy || reference), ref_logprobs of the targets, all (...) float32; without a
    reference the last two are None. Gradients to hidden and weight, in their dtypes; ref_logprobs has none.
    Logits are float32; the products' operands are rounded to autocast's dtype, without autocast to that of hidden.
    A row costs 2VD operations, with a reference 2V(D + D'), so pass those that matter: hidden[response_mask].
    `linear_logprobs` and `linear_kl` one after the other cost 2VD more, and another 2VD' for ref_logprobs.
    """
    shape, device, ref = targets.shape, hidden.device.type, [x for x in (ref_hidden, ref_weight) if x is not None]
    if (hidden.shape[:-1], weight.shape[1:]) != (shape, hidden.shape[-1:]) or ref and (
            len(ref) == 1 or (*ref_hidden.shape[:-1], ref_weight.shape[0]) != (*shape, weight.shape[0])):
        got = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets, *ref))
        raise ValueError("linear_stats: hidden (..., D), weight (V, D), targets (...), and both or neither of "
                         f"ref_hidden (..., D') and ref_weight (V, D'); got {got}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in ref):
        raise ValueError("linear_stats: no gradient flows to the reference; freeze it, ref.requires_grad_(False)")
    if hidden.ndim != 2:
        ref = [x.reshape(-1, x.shape[-1]) if x is ref_hidden else x for x in ref]
        out = linear_stats(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), *ref)
        return tuple(x if x is None else x.view(shape) for x in out)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if use_triton(hidden):
        logprobs, entropy, _, kl, _, ref_logprobs, _ = linear_op(hidden, weight, targets, ref_hidden, ref_weight, dtype)
        return logprobs, entropy, *((kl, ref_logprobs) if ref else (None, None))
    long = torch.promote_types(dtype, torch.float32)
    hidden, weight, *ref = (x.to(dtype).to(long) for x in (hidden, weight, *ref))
    with torch.autocast(device, enabled=False):
        return linear_chunks(hidden, weight, targets, *ref)


def linear_logprobs(hidden, weight, targets):
    """hidden (..., D), weight (V, D), targets (...) -> logprobs (...), entropy (...): see `linear_stats`."""
    return linear_stats(hidden, weight, targets)[:2]


def linear_kl(hidden, weight, ref_hidden, ref_weight):
    """Exact KL(policy || reference) (...) at every position: see `linear_stats`."""
    targets = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    return linear_stats(hidden, weight, targets, ref_hidden, ref_weight)[2]


if __name__ == "__main__":
    from kernels import bench

    def half_logits(x, W, y, *ref):
        """What one writes without thinking about it: logits rounded to bfloat16."""
        out = stats_reference(F.linear(x, W).float(), y, F.linear(*ref).float() if ref else None)
        return [o for o in out if o is not None]

    def liger_scaled(x, W, y):
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
        nll, entropy, *_ = LigerFusedLinearScaledCrossEntropyFunction.apply(x, W, y, 1.0, -100, 1, True)
        return -nll, entropy

    def liger_fused(x, W, y):
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction
        return -LigerFusedLinearCrossEntropyFunction.apply(x, W, y, None, None, -100, 0.0, 0.0, "none")[0]

    def tiled(height, width):
        def call(*inputs):
            global HEIGHT, WIDTH
            HEIGHT, WIDTH = height, width
            return linear_logprobs(*inputs)
        return call

    def tables():
        calls = {"ours": linear_logprobs, "torch, bfloat16 logits": half_logits, "Liger scaled CE": liger_scaled,
                 "Liger FLCE, no entropy": liger_fused}
        if bench.CUDA:
            calls["torch.compile"] = torch.compile(half_logits, dynamic=True)
        with_kl = {"ours": linear_stats, "torch, bfloat16 logits": half_logits}
        tiles = {f"tiles of {h} x {w}": tiled(h, w) for w in (16384, 40960, 65536) for h in (512, 1024, 2048)}
        Qwen, GPT2 = 151936, 50304
        shapes = [(8192, Qwen, 896), (8192, Qwen, 4096), (8192, GPT2, 768), (1024, Qwen, 1536), (8192, Qwen, 1536)]
        for N, V, D in shapes if bench.CUDA else [(64, GPT2, 256)]:
            x, W, noise = (bench.normal(n, D, dtype=torch.bfloat16, seed=i) for i, n in enumerate((N, V, N)))
            W, y = W * (2 * D ** -0.5), bench.tokens(N, V)
            cases = [("linear_logprobs", calls, [x, W], [y], 1, 4),
                     ("linear_logprobs, frozen head", calls, [x], [W, y], 1, 3),
                     ("linear_stats with KL", with_kl, [x, W], [y, x + noise / 50, W], 2, 6)]
            if bench.CUDA and D == 1536 and N == 8192:      # last: the tiles stay as they are set
                cases.append(("linear_logprobs", tiles, [x, W], [y], 1, 4))
            for name, calls_, trained, fixed, *NVD in cases:
                yield (f"{name} N={N} V={V} D={D} bfloat16", calls_, linear_reference, trained, fixed,
                       "TFLOP/s", [2 * N * V * D / 1e12 * i for i in NVD])

    bench.main("linear", tables)
