"""Log-probability of one token of a row, and the row's entropy, from logits.

    log p_v = z_v - log sum_w e^z_w        logprob = log p_y        H = - sum_v p_v log p_v
    dz_v    = g_lp (1[v = y] - p_v) - g_H p_v (log p_v + H)         g_lp, g_H: gradients of logprob and H

One read of the logits forward, one read and one write backward, and three numbers a row kept in between; torch's
log_softmax, exp, product and sum move a row at least eight times forward and keep two more copies of it.

Everywhere in kernels/ a logit of -inf, a word that cannot be said, stands for -1e30: it has probability 0 beside any
other and gets no gradient. A row of nothing else is uniform, log-prob -log V and entropy log V, with gradient 0: so a
masked row gives no NaN. A NaN or a +inf makes its row NaN.
"""

import torch
from torch import Tensor

from kernels import tl, triton, use_triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)     # stands for -inf: 0 * FLOOR is 0, 0 * inf is not


def finite(logits):
    """float32 logits (float64 ones as they are) with -1e30 for -inf, which would become 0 * inf."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(min=-1e30)


def logprobs_reference(z, targets):
    """Plain torch, differentiable: finite logits (..., V) and targets (...) to log-prob (...) and entropy (...)."""
    z = z.log_softmax(-1)                                   # the same name: the logits may go, a CPU's cache is small
    return z.gather(-1, targets[..., None])[..., 0], -(z.exp() * z).sum(-1)


# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    z_ptr,              # (N, V) logits
    y_ptr,              # (N,) token ids
    logprob_ptr,        # (N,) float32
    entropy_ptr,        # (N,) float32
    stats_ptr,          # (N, 2) float32: M = max z and log2 S, S = sum 2^((z - M) LOG2E)
    z_stride, V,
    BLOCK: tl.constexpr, Q: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)                     # int64: row * stride overflows int32
    z_ptr += row * z_stride
    # every lane keeps its own maximum m, sum s of 2^d and sum u of d 2^d: no reduction across lanes inside the loop
    m = tl.full((BLOCK,), FLOOR, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK * Q):
        v = start + tl.arange(0, Q)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = tl.load(z_ptr + v, mask=v < V, other=FLOOR).to(tl.float32)
        z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)         # a NaN has to come out as NaN
        new = tl.maximum(m, tl.max(z, 0))
        shift = (m - new) * LOG2E
        scale = tl.exp2(shift)
        d = (z - new[None, :]) * LOG2E                      # subtract, then scale: the other order loses digits
        e = tl.exp2(d)
        u = scale * (u + shift * s) + tl.sum(e * d, 0)
        s = scale * s + tl.sum(e, 0)
        m = new
    M = tl.max(m, 0)
    shift = (m - M) * LOG2E
    scale = tl.exp2(shift)
    S = tl.sum(scale * s, 0)
    U = tl.sum(scale * (u + shift * s), 0)
    S = tl.minimum(S, V, propagate_nan=tl.PropagateNan.ALL)    # if all are FLOOR: lanes beyond V counted
    log2S = tl.log2(S)
    y = tl.load(y_ptr + row)
    z_y = tl.load(z_ptr + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)   # no such token: NaN
    z_y = tl.maximum(z_y, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    tl.store(logprob_ptr + row, (z_y - M) - log2S * LN2)
    tl.store(entropy_ptr + row, (log2S - U / S) * LN2)
    tl.store(stats_ptr + 2 * row, M)                        # two numbers: their sum would round a large offset away
    tl.store(stats_ptr + 2 * row + 1, log2S)


@triton.jit
def load_gradients(z_ptr, y_ptr, entropy_ptr, g_logprob_ptr, g_entropy_ptr, row, M, V):
    """Target, entropy and upstream gradients of a row; no target if its logit is -inf, no gradients if all are."""
    y = tl.load(y_ptr + row)
    z_y = tl.load(z_ptr + y, mask=(y >= 0) & (y < V), other=FLOOR).to(tl.float32)
    g_logprob = tl.where(M == FLOOR, 0.0, tl.load(g_logprob_ptr + row))
    g_entropy = tl.where(M == FLOOR, 0.0, tl.load(g_entropy_ptr + row))
    return tl.where(z_y > FLOOR, y, -1), tl.load(entropy_ptr + row), g_logprob, g_entropy


@triton.jit
def backward_kernel(
    z_ptr,              # (N, V) logits
    y_ptr,              # (N,) token ids
    stats_ptr,          # (N, 2) float32, from the forward
    entropy_ptr,        # (N,) float32
    g_logprob_ptr,      # (N,) float32
    g_entropy_ptr,      # (N,) float32
    dz_ptr,             # (N, V), any dtype
    z_stride, V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    dz_ptr += row * V
    M = tl.load(stats_ptr + 2 * row)
    log2S = tl.load(stats_ptr + 2 * row + 1)
    y, H, g_logprob, g_entropy = load_gradients(z_ptr, y_ptr, entropy_ptr, g_logprob_ptr, g_entropy_ptr, row, M, V)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + v, mask=v < V, other=FLOOR).to(tl.float32)
        z = tl.maximum(z, FLOOR)                            # a NaN is in the statistics already
        log2p = (z - M) * LOG2E - log2S
        dz = -tl.exp2(log2p) * (g_logprob + g_entropy * (log2p * LN2 + H))
        tl.store(dz_ptr + v, tl.where(v == y, dz + g_logprob, dz), mask=v < V)


# ----------------------------------------------------------------------------------------------------------------------


def rows(x):
    """A tensor whose rows the kernels can walk: columns side by side; a row stride may be anything."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, V) and token ids (N,) to log-prob (N,), entropy (N,) and the statistics (N, 2)."""
    (N, V), z = z.shape, rows(z)
    logprob, entropy, stats = (z.new_empty((N, *more), dtype=torch.float32) for more in ((), (), (2,)))
    with torch.cuda.device_of(z):
        if N:
            forward_kernel[(N,)](z, y.contiguous(), logprob, entropy, stats, z.stride(0), V,
                                 BLOCK=2048, Q=4, num_warps=8)
    return logprob, entropy, stats


def launch_backward(dz, z, y, stats, entropy, g_logprob, g_entropy):
    """Writes the gradient with respect to the logits into dz (N, V), rounded to its dtype."""
    (N, V), z = z.shape, rows(z)
    y, g_logprob, g_entropy = y.contiguous(), g_logprob.contiguous(), g_entropy.contiguous()    # of a sum(): stride 0
    with torch.cuda.device_of(z):
        if N:
            backward_kernel[(N,)](z, y, stats, entropy, g_logprob, g_entropy, dz, z.stride(0), V,
                                  BLOCK=4096, num_warps=8)
    return dz


def gradient(z: Tensor, y: Tensor, stats: Tensor, entropy: Tensor, g_logprob: Tensor, g_entropy: Tensor) -> Tensor:
    return launch_backward(z.new_empty(z.shape), z, y, stats, entropy, g_logprob, g_entropy)


logprobs_op = torch.library.custom_op("kernels::logprobs", launch_forward, mutates_args=())
gradient_op = torch.library.custom_op("kernels::logprobs_gradient", gradient, mutates_args=())
gradient_op.register_fake(lambda z, *_: z.new_empty(z.shape))


@logprobs_op.register_fake
def _(z, y):
    return tuple(z.new_empty((z.shape[0], *more), dtype=torch.float32) for more in ((), (), (2,)))


def save(ctx, inputs, output):
    _, entropy, stats = output
    ctx.save_for_backward(*inputs, stats, entropy)
    ctx.mark_non_differentiable(stats)


def backward(ctx, g_logprob, g_entropy, _):
    return gradient_op(*ctx.saved_tensors, g_logprob, g_entropy), None


logprobs_op.register_autograd(backward, setup_context=save)


def token_logprobs(logits, targets):
    """Log-probability of each target and entropy of each row, both float32 and differentiable.

    logits (..., V) float32, bfloat16 or float16; targets (...) int64 in 0 ... V-1 -> logprobs (...), entropy (...).
    There is no ignore index: mask the result with torch.where. A target out of range is an error on a CPU and NaN on
    a GPU, where checking would mean waiting for it.
    """
    if not logits.is_floating_point() or targets.is_floating_point() or logits.shape[:-1] != targets.shape:
        raise ValueError(f"token_logprobs: logits (..., V) and integer targets (...), got {logits.dtype} "
                         f"{tuple(logits.shape)} and {targets.dtype} {tuple(targets.shape)}")
    if not use_triton(logits):
        return logprobs_reference(finite(logits), targets)
    logprobs, entropy, _ = logprobs_op(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return logprobs.view(targets.shape), entropy.view(targets.shape)


if __name__ == "__main__":
    from kernels import bench

    def plain(z, y):
        return logprobs_reference(finite(z), y)

    def trl(z, y):
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
        return selective_log_softmax(z[None], y[None])[0], entropy_from_logits(z[None])[0]      # it loops over the batch

    def liger(z, y):
        from liger_kernel.ops import LigerCrossEntropyFunction
        return -LigerCrossEntropyFunction.apply(z, y, None, -100, 0.0, 0.0, "none")[0]

    def tables():
        calls = {"ours": token_logprobs, "torch": plain, "TRL": trl, "Liger CE, no entropy": liger}
        if bench.CUDA:
            calls["torch.compile"] = torch.compile(plain, dynamic=True)
        shapes = [(8192, 151936, torch.bfloat16), (8192, 151936, torch.float32), (8192, 50257, torch.bfloat16)]
        for N, V, dtype in shapes if bench.CUDA else [(64, 50257, torch.float32)]:
            z, y = bench.peaked(N, V, dtype), bench.tokens(N, V)
            GB = z.nbytes / 1e9
            yield f"token_logprobs N={N} V={V} {dtype}", calls, plain, [z], [y], "GB/s", (GB, 3 * GB)

    bench.main("logprob", tables)
