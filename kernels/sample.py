"""The next token of every row, drawn from float32 logits in one read: token, its log-probability, whether all is finite.

    token = argmin_v E_v / p_v = argmax_v (z_v - log E_v)        E_v = -log(1 - u_v)        u_v = (r_v + 1/2) 2^-32

An exponential race: E_v is exponential with rate 1, E_v / p_v with rate p_v, and the smallest of them is that of v with
probability p_v, over the whole vocabulary, without normalising or sorting. Ties go to the lower id; greedily all E are 1.
r_v is a 32-bit word of Philox4x32-10, a function of seed, step, row and v alone: seed and step are tensors that are read
on the device, so a recorded graph draws anew at each replay, and a seed gives the same text again. A float32 u would be
too coarse for 150,000 racers: near 1 it has 2^-24, and the winner's E is as small as 1e-5, where u has to be exact.

torch's softmax, sum in float64, search and copies move a row at least ten times.
"""

import torch
from torch import Tensor

from kernels import tl, triton, use_triton
from kernels.logprob import FLOOR, LN2, LOG2E, rows

SLICE = 16384                   # columns of a program: fixed, so that a row's bits do not depend on the number of rows
BLOCK = 256                     # counters, of four columns each: 72 registers with 4 warps
WORD = 0xFFFFFFFF


def philox(counter, key):
    """Four words of Philox4x32-10 for counters (c0, c1, c2, c3) and key (k0, k1): int64 tensors or ints of 32 bits."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57         # 64 bits: their upper halves wrap into the sign, and come back
        c0, c1, c2, c3 = (b >> 32) & WORD ^ c1 ^ k0, b & WORD, (a >> 32) & WORD ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def random_words(seed, step, row, V):
    """r (N, V), int64, for seed (), step (N,) and row (N,), all int64: word j of counter c belongs to column 4 c + j."""
    c = torch.arange(-(-V // 4), device=row.device)
    words = philox((c, row[:, None] & WORD, step[:, None] & WORD, torch.zeros_like(c)), (seed & WORD, (seed >> 32) & WORD))
    return torch.stack(words, 2).flatten(1)[:, :V]


def sample_reference(logits, seed, step, row, greedy):
    """Plain torch, in float64."""
    score = logits = logits.double()
    if not greedy:
        u = (random_words(seed, step, row, logits.shape[1]).double() + 0.5) * 2.0 ** -32
        score = logits - (-torch.log1p(-u)).log()
    token = score.masked_fill(score.isnan(), -torch.inf).argmax(-1)         # the first of equal ones
    logprob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    return token, logprob.float(), logits.isfinite().all(-1)


# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def exponential(r):
    """E / LN2 = -log2(1 - u) of 32-bit words r, right to 4e-7 of its size from u = 2^-33 to u = 1 - 2^-33.

    Below u = 1/3 from u itself, which 1 - u would round; above it 1 - u = 2^k (1 + t), and |t| <= 1/3 in either case.
    """
    near = r < 0x55555555
    x = tl.where(near, r, ~r).to(tl.float32) * 2.0 ** -32 + 2.0 ** -33      # u or 1 - u
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F2AAAAB) & -0x800000                                 # the exponent, counted from 2/3
    t = tl.where(near, -x, (bits - k).to(tl.float32, bitcast=True) - 1)
    k = tl.where(near, 0, k).to(tl.float32) * 2.0 ** -23
    series = -0.360783726 + t * (0.285582036 + t * (-0.236891791 + t * (0.246862173 + t * -0.221680015)))
    return -k - t * (1.44269478 + t * (-0.721346617 + t * (0.480965495 + t * series)))  # log2(1 + t) to 2.3e-7


@triton.jit
def slice_kernel(
    z_ptr,              # (N, V) float32 logits
    seed_ptr,           # () int64
    step_ptr,           # (N,) int64, or one for all with stride 0
    row_ptr,            # (N,) int64
    best_ptr,           # (N, S) float32: the best 2^((z - M) LOG2E) / E of a slice of the vocabulary; greedily, the best z
    winner_ptr,         # (N, S) int64: its column
    stats_ptr,          # (N, S, 2) float32: M = max z and sum 2^((z - M) LOG2E)
    health_ptr,         # (N, S) float32: 0, or NaN if a logit is not finite
    z_stride, step_stride, V,
    GREEDY: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
):
    row, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z_ptr += row * z_stride                                 # int64: row * stride overflows int32
    seed, step = tl.load(seed_ptr), tl.load(step_ptr + row * step_stride).to(tl.int32)
    stream = tl.load(row_ptr + row).to(tl.int32)
    # every lane keeps its own state: M, sum and health of a counter's four columns; of each of them the best so far, its
    # 2^((z - M) LOG2E), E and counter. e / E wins if it is larger: compared by products, and found without a division
    m = tl.full((BLOCK,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    health = tl.zeros((BLOCK, 4), tl.float32)
    best = tl.full((BLOCK, 4), float("-inf") if GREEDY else 0.0, tl.float32)
    best_E = tl.full((BLOCK, 4), 1.0, tl.float32)
    winner = tl.zeros((BLOCK, 4), tl.int32)
    j = tl.arange(0, 4)[None, :]
    for start in range(s * SLICE, tl.minimum(s * SLICE + SLICE, V), 4 * BLOCK):
        c = start // 4 + tl.arange(0, BLOCK)
        v = 4 * c[:, None] + j
        z = tl.load(z_ptr + v, mask=v < V, other=FLOOR)
        health += z * 0                                     # 0 * inf and 0 * NaN are NaN
        new = tl.maximum(m, tl.max(z, 1))
        scale = tl.exp2((m - new) * LOG2E)
        e = tl.exp2((z - new[:, None]) * LOG2E)
        total = total * scale + tl.sum(e, 1)
        m = new
        if GREEDY:
            better = z > best
            best = tl.where(better, z, best)
        else:
            w0, w1, w2, w3 = tl.philox(seed, c, stream, step, 0)
            E = exponential(tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK, 4))
            best *= scale[:, None]
            better = e * best_E > best * E                  # not if equal: the lower column stays
            best, best_E = tl.where(better, e, best), tl.where(better, E, best_E)
        winner = tl.where(better, v, winner)
    M = tl.max(m, 0)
    scale = tl.exp2((m - M) * LOG2E)
    if not GREEDY:
        best = best * scale[:, None] / best_E
    top = tl.max(tl.max(best, 1), 0)
    at = row * tl.num_programs(1) + s
    tl.store(best_ptr + at, top)
    tl.store(winner_ptr + at, tl.min(tl.min(tl.where(best == top, winner, V - 1), 1), 0))
    tl.store(stats_ptr + 2 * at, M)
    tl.store(stats_ptr + 2 * at + 1, tl.sum(total * scale, 0))
    tl.store(health_ptr + at, tl.sum(tl.sum(health, 1), 0))


@triton.jit
def join_kernel(
    z_ptr,              # (N, V) float32 logits
    best_ptr,           # (N, S) float32      the four that slice_kernel wrote
    winner_ptr,         # (N, S) int64
    stats_ptr,          # (N, S, 2) float32
    health_ptr,         # (N, S) float32
    token_ptr,          # (N,) int64
    logprob_ptr,        # (N,) float32
    finite_ptr,         # (N,) bool
    z_stride, V, S,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):
    row, s = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * S + s
    best = tl.load(best_ptr + at, mask=s < S, other=float("-inf") if GREEDY else 0.0)
    winner = tl.load(winner_ptr + at, mask=s < S, other=V - 1)
    m = tl.load(stats_ptr + 2 * at, mask=s < S, other=FLOOR)
    total = tl.load(stats_ptr + 2 * at + 1, mask=s < S, other=0)
    M = tl.max(m, 0)
    if not GREEDY:
        best *= tl.exp2((m - M) * LOG2E)                    # every slice's 2^((z - M) LOG2E) / E was relative to its own M
    token = tl.min(tl.where(best == tl.max(best, 0), winner, V - 1), 0)
    token = tl.minimum(token, V - 1)                        # of a row of -inf: a lane beyond V
    z = tl.load(z_ptr + row * z_stride + token)
    health = tl.sum(tl.load(health_ptr + at, mask=s < S, other=0), 0)
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, (z - M) - tl.log2(tl.sum(total * tl.exp2((m - M) * LOG2E), 0)) * LN2)
    tl.store(finite_ptr + row, health == health)


# ----------------------------------------------------------------------------------------------------------------------


def scratch(logits):
    """What `launch` keeps between its two kernels, for any logits of this shape."""
    (N, V), S = logits.shape, -(-logits.shape[1] // SLICE)
    best, stats, health = (logits.new_empty((N, S, *more)) for more in ((), (2,), ()))
    return best, logits.new_empty((N, S), dtype=torch.long), stats, health


def launch(out, logits, seed, step, row, greedy, work):
    """Writes token (N,) int64, logprob (N,) float32 and finite (N,) bool into out. Allocates nothing: fit for a graph."""
    (N, V), S = logits.shape, work[0].shape[1]
    step = step.expand(N)
    with torch.cuda.device_of(logits):
        if N:
            slice_kernel[(N, S)](logits, seed, step, row, *work, logits.stride(0), step.stride(0), V,
                                 GREEDY=greedy, SLICE=SLICE, BLOCK=BLOCK, num_warps=4)
            join_kernel[(N,)](logits, *work, *out, logits.stride(0), V, S, GREEDY=greedy,
                              BLOCK=triton.next_power_of_2(S), num_warps=1)


def draw(logits: Tensor, seed: Tensor, step: Tensor, row: Tensor, greedy: bool) -> tuple[Tensor, Tensor, Tensor]:
    logits, N = rows(logits), len(logits)
    out = tuple(logits.new_empty(N, dtype=dtype) for dtype in (torch.long, torch.float32, torch.bool))
    launch(out, logits, seed, step, row.contiguous(), greedy, scratch(logits))
    return out


sample_op = torch.library.custom_op("kernels::sample", draw, mutates_args=())


@sample_op.register_fake
def _(logits, seed, step, row, greedy):
    return tuple(logits.new_empty(len(logits), dtype=dtype) for dtype in (torch.long, torch.float32, torch.bool))


def sample_tokens(logits, seed, step, row=None, greedy=False):
    """One token a row at temperature 1, exactly and from the whole vocabulary, or with `greedy` the most likely one.

    logits (N, V) float32; seed () int64; step () or (N,) int64; row (N,) int64, the number of each row in the stream of
    random words, 0 ... N-1 if not given -> token (N,) int64, logprob (N,) float32, finite (N,) bool: False if any logit
    of the row is NaN or infinite. The same seed, step and row draw the same; so a row's text depends on no other row if
    `step` is its position. A tensor that a recorded graph reads, seed, step or row, may change between replays. For
    another temperature give logits / temperature: logprob is then that distribution's too. On a CPU this is the
    reference, exact and slow.
    """
    row = torch.arange(len(logits), device=logits.device) if row is None else row
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"sample_tokens: float32 logits (N, V), got {logits.dtype} {tuple(logits.shape)}")
    if seed.shape or step.shape not in ((), row.shape) or row.shape != logits.shape[:1] or {
            x.dtype for x in (seed, step, row)} != {torch.long}:
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (seed, step, row))
        raise ValueError(f"sample_tokens: int64 seed (), step () or (N,) and row (N,) for N = {len(logits)}, got {got}")
    if use_triton(logits):
        return sample_op(logits, seed, step, row, greedy)
    return sample_reference(logits, seed, step.expand(len(logits)), row, greedy)
