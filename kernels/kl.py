"""Exact KL divergence of a policy from a reference over the whole vocabulary, from their logits z and r.

    d_v = log p_v - log q_v        KL = sum_v p_v d_v = sum_v p_v (e^-d_v - 1 + d_v)        every term of the last >= 0
    dz_v = g p_v (d_v - mean_d)    mean_d = sum_v p_v d_v            g: gradient of KL; none flows to the reference

The last form is the one returned: the first one is off by 1e-7 in float32, more than a small KL, and can be negative.
Two reads of both logits forward (the log-normalisers have to be known first), one of both and one write backward;
torch moves a row at least thirteen times forward and keeps four more copies of it.
"""

import torch
from torch import Tensor

from kernels import tl, triton, use_triton
from kernels.logprob import FLOOR, LN2, LOG2E, finite, load_gradients, logprobs_op, rows

NEAR = tl.constexpr(0.25)       # |d| below it: the series; above it: q - p + p d, which never divides by a tiny p


def kl_sum(logp, logq):
    """sum_v p_v (e^-d_v - 1 + d_v) of every row of log p and log q, both (N, V). No gradient."""
    sums, height = [], max(1, 2 ** 17 // logp.shape[1])     # rows that stay in a CPU's cache: half the time
    for logp, logq in zip(logp.split(height), logq.split(height)):
        p, d = logp.exp(), logp - logq
        near = d.clamp(-0.25, 0.25).neg_()
        series = near / 720
        for factorial in (120, 24, 6):
            series.add_(1 / factorial).mul_(near)
        series.add_(1 / 2).mul_(near).mul_(near).mul_(p)
        sums.append(torch.where(d.abs() < 0.25, series, torch.addcmul(logq.exp(), p, d - 1)).sum(1))
    return torch.cat(sums)


def kl_reference(z, r):
    """Plain torch, differentiable in z: finite logits (..., V) of both to kl (...)."""
    return kl_of_logs(z.log_softmax(-1), r.log_softmax(-1))


def kl_of_logs(logp, logq):
    """The same from log p and log q, differentiable in log p."""
    with torch.no_grad():
        kl = kl_sum(*(x.reshape(-1, x.shape[-1]) for x in (logp, logq))).view(logp.shape[:-1])
        pd = logp.exp() * (logp - logq)
    gradient = (pd * logp).sum(-1)                          # its gradient is p (d - mean_d), its value is not wanted
    return kl + (gradient - gradient.detach())


# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_stats(stats_ptr, row):
    """M, log2 S and the floor of a row; where all logits are -inf M and floor are 0, beside which differences survive."""
    M, log2S = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
    return tl.where(M == FLOOR, 0.0, M), log2S, tl.where(M == FLOOR, 0.0, FLOOR)


@triton.jit
def kl_terms(z, r, M, log2S, ref_M, ref_log2S, c):
    """The never-negative term of the KL, and p d, of some words; c is the shift for which d = (z - r) - c."""
    p = tl.exp2((z - M) * LOG2E - log2S)
    q = tl.exp2((r - ref_M) * LOG2E - ref_log2S)
    d = (z - r) - c                                         # z - r is exact where they are close
    series = 0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720))))
    return tl.where(tl.abs(d) < NEAR, p * d * d * series, q - p + p * d), p * d


@triton.jit
def forward_kernel(
    z_ptr,              # (N, V) logits of the policy
    r_ptr,              # (N, V) logits of the reference
    stats_ptr,          # (N, 2) float32: M and log2 S of z
    ref_stats_ptr,      # (N, 2) float32: M and log2 S of r
    kl_ptr,             # (N,) float32
    mean_d_ptr,         # (N,) float32
    z_stride, r_stride, V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)                     # int64: row * stride overflows int32
    z_ptr += row * z_stride
    r_ptr += row * r_stride
    M, log2S, floor = load_stats(stats_ptr, row)
    ref_M, ref_log2S, ref_floor = load_stats(ref_stats_ptr, row)
    c = (M - ref_M) + (log2S - ref_log2S) * LN2
    kl = tl.zeros((BLOCK,), tl.float32)
    mean_d = tl.zeros((BLOCK,), tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z, r = tl.load(z_ptr + v).to(tl.float32), tl.load(r_ptr + v).to(tl.float32)
        z, r = tl.maximum(z, floor), tl.maximum(r, ref_floor)   # -inf becomes finite; a NaN is in the statistics already
        term, pd = kl_terms(z, r, M, log2S, ref_M, ref_log2S, c)
        kl += term
        mean_d += pd
    v = whole + tl.arange(0, BLOCK)                         # the ragged end: in a uniform row lanes beyond V would count
    z, r = tl.load(z_ptr + v, mask=v < V, other=0).to(tl.float32), tl.load(r_ptr + v, mask=v < V, other=0).to(tl.float32)
    term, pd = kl_terms(tl.maximum(z, floor), tl.maximum(r, ref_floor), M, log2S, ref_M, ref_log2S, c)
    kl += tl.where(v < V, term, 0)
    mean_d += tl.where(v < V, pd, 0)
    tl.store(kl_ptr + row, tl.sum(kl, 0))
    tl.store(mean_d_ptr + row, tl.sum(mean_d, 0))


@triton.jit
def backward_kernel(
    z_ptr,              # (N, V) logits of the policy
    r_ptr,              # (N, V) logits of the reference
    stats_ptr,          # (N, 2) float32
    ref_stats_ptr,      # (N, 2) float32
    mean_d_ptr,         # (N,) float32
    g_kl_ptr,           # (N,) float32
    y_ptr,              # (N,) token ids              the last four only with LOGPROBS:
    entropy_ptr,        # (N,) float32                the gradients of logprob.py in the same pass
    g_logprob_ptr,      # (N,) float32
    g_entropy_ptr,      # (N,) float32
    dz_ptr,             # (N, V), any dtype
    z_stride, r_stride, V,
    LOGPROBS: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    r_ptr += row * r_stride
    dz_ptr += row * V
    M, log2S, floor = load_stats(stats_ptr, row)
    ref_M, ref_log2S, ref_floor = load_stats(ref_stats_ptr, row)
    c = (M - ref_M) + (log2S - ref_log2S) * LN2
    mean_d = tl.load(mean_d_ptr + row)                      # not the KL: with it a row of dz would not sum to 0
    g_kl = tl.where(floor == 0, 0.0, tl.load(g_kl_ptr + row))           # the policy's logits are all -inf: no gradient
    if LOGPROBS:
        y, H, g_logprob, g_entropy = load_gradients(z_ptr, y_ptr, entropy_ptr, g_logprob_ptr, g_entropy_ptr, row,
                                                    tl.load(stats_ptr + 2 * row), V)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + v, mask=v < V, other=FLOOR).to(tl.float32)
        r = tl.load(r_ptr + v, mask=v < V, other=FLOOR).to(tl.float32)
        z, r = tl.maximum(z, floor), tl.maximum(r, ref_floor)
        log2p = (z - M) * LOG2E - log2S
        d = (z - r) - c
        dz = g_kl * (d - mean_d)
        if LOGPROBS:
            dz -= g_logprob + g_entropy * (log2p * LN2 + H)
        dz *= tl.exp2(log2p)
        if LOGPROBS:
            dz = tl.where(v == y, dz + g_logprob, dz)
        tl.store(dz_ptr + v, dz, mask=v < V)


# ----------------------------------------------------------------------------------------------------------------------


def launch_forward(z: Tensor, r: Tensor, stats: Tensor, ref_stats: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of both models and the statistics (N, 2) of both to kl (N,) and mean_d (N,)."""
    (N, V), z, r = z.shape, rows(z), rows(r)
    kl, mean_d = (z.new_empty(N, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(z):
        if N:
            forward_kernel[(N,)](z, r, stats, ref_stats, kl, mean_d, z.stride(0), r.stride(0), V,
                                 BLOCK=2048, num_warps=8)
    return kl, mean_d


def launch_backward(dz, z, r, stats, ref_stats, mean_d, g_kl, y=None, entropy=None, g_logprob=None, g_entropy=None):
    """Writes the gradient with respect to z into dz (N, V): of kl, and of log-prob and entropy if theirs are given."""
    (N, V), z, r = z.shape, rows(z), rows(r)
    g_kl, *more = (x if x is None else x.contiguous() for x in (g_kl, y, entropy, g_logprob, g_entropy))
    with torch.cuda.device_of(z):
        if N:
            backward_kernel[(N,)](z, r, stats, ref_stats, mean_d, g_kl, *more, dz, z.stride(0), r.stride(0), V,
                                  LOGPROBS=y is not None, BLOCK=4096, num_warps=8)
    return dz


def gradient(z: Tensor, r: Tensor, stats: Tensor, ref_stats: Tensor, mean_d: Tensor, g_kl: Tensor) -> Tensor:
    return launch_backward(z.new_empty(z.shape), z, r, stats, ref_stats, mean_d, g_kl)


kl_op = torch.library.custom_op("kernels::kl", launch_forward, mutates_args=())
gradient_op = torch.library.custom_op("kernels::kl_gradient", gradient, mutates_args=())
kl_op.register_fake(lambda z, *_: tuple(z.new_empty(z.shape[0], dtype=torch.float32) for _ in range(2)))
gradient_op.register_fake(lambda z, *_: z.new_empty(z.shape))


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def backward(ctx, g_kl, _):
    return gradient_op(*ctx.saved_tensors, g_kl), None, None, None


kl_op.register_autograd(backward, setup_context=save)


def token_kl(logits, ref_logits):
    """Exact KL(policy || reference) of each row, float32, never negative, differentiable in the policy's logits.

    logits, ref_logits (..., V) float32, bfloat16 or float16 -> kl (...), in nats. ref_logits must not require a
    gradient. Give float32 logits: rounding them to bfloat16 moves a KL of 1e-3 by 13 % and its gradient by 25 %.
    """
    if logits.shape != ref_logits.shape or not logits.is_floating_point() or not ref_logits.is_floating_point():
        raise ValueError(f"token_kl: logits and ref_logits (..., V), got {logits.dtype} {tuple(logits.shape)} "
                         f"and {ref_logits.dtype} {tuple(ref_logits.shape)}")
    if ref_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("token_kl: no gradient flows to ref_logits; compute them under torch.no_grad()")
    if not use_triton(logits):
        return kl_reference(finite(logits), finite(ref_logits))
    z, r = (x.reshape(-1, x.shape[-1]) for x in (logits, ref_logits))
    y = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)
    stats, ref_stats = (logprobs_op(x.detach(), y)[2] for x in (z, r))
    return kl_op(z, r, stats, ref_stats)[0].view(logits.shape[:-1])


if __name__ == "__main__":
    from kernels import bench

    def textbook(z, r):
        logp, logq = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1), r.float().log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)

    def exact(z, r):
        logp = z.log_softmax(-1)
        return ((logp.exp() * (logp - r.log_softmax(-1))).sum(-1),)

    def tables():
        calls = {"ours": token_kl, "torch": textbook}
        if bench.CUDA:
            calls["torch.compile"] = torch.compile(textbook, dynamic=True)
        shapes = [(8192, 151936, torch.float32), (8192, 151936, torch.bfloat16), (8192, 50304, torch.float32)]
        for N, V, dtype in shapes if bench.CUDA else [(64, 50304, torch.float32)]:
            for distance, size in ((0.04, "1e-3"), (0.004, "1e-5")):
                z = bench.peaked(N, V)
                z, r = z.to(dtype), (z + distance * bench.normal(N, V, seed=1)).to(dtype)
                GB = z.nbytes / 1e9                         # forward: both read twice
                yield (f"token_kl N={N} V={V} {dtype} KL {size} before rounding", calls, exact, [z], [r],
                       "GB/s", (4 * GB, 7 * GB))

    bench.main("kl", tables)
