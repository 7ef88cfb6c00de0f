"""What lies between the matrix products of one layer while a model decodes: one new token a row, a cache of keys and values.

    attention    q, k = rotate(norm(q)), rotate(norm(k)); the cache gets k, v at the row's own place; y = softmax(q K^T / sqrt(D)) V
    add + norm   x += delta;  h = x / rms(x) * weight, or (x - mean) / std * weight + bias
    activation   silu(gate) * up, or gelu(h)

A row attends to its own columns and no others: the cache is read once, up to the row's length, by one program for each
key head and all query heads that share it. The residual stream stays in float32, what a product takes next has its
dtype. With these a layer is four products and four launches; torch takes some twenty and reads the cache to its full
width. Rows that have ended cost nothing: their y is 0. There is no gradient.

Letters as in model.py: B rows, H query heads, K key/value heads, D channels of a head, C channels, I inner channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tl, triton, use_triton
from kernels.logprob import LOG2E

TILE = 4096                    # numbers of keys, and of values, that are read at a time: by one warp, of which a processor has many


def norm_reference(x, weight, bias, eps):
    """float32, over the last dimension: root-mean-square norm without a bias, layer norm with one."""
    if bias is None:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)


def attention_reference(qkv, cache, lengths, alive, rope, q_norm, k_norm, eps):
    """Plain torch: see `decode_attention`."""
    _, B, K, width, D = cache.shape
    heads = qkv.view(B, -1, D).float()                                               # (B, H + 2 K, D)
    q, k, v = heads[:, :-2 * K], heads[:, -2 * K:-K], heads[:, -K:]
    if q_norm is not None:
        q, k = norm_reference(q, q_norm, None, eps), norm_reference(k, k_norm, None, eps)
    at = lengths - 1
    if rope is not None:
        cos, sin = (table[at][:, None] for table in rope)                            # (B, 1, D)
        q, k = (x * cos + x.roll(D // 2, -1) * sin for x in (q, k))
    rows = alive.nonzero()[:, 0]
    cache[0, rows, :, at[rows]], cache[1, rows, :, at[rows]] = (x[rows].to(cache.dtype) for x in (k, v))
    q = q.to(cache.dtype).float().view(B, K, -1, D)
    scores = q @ cache[0].float().mT / math.sqrt(D)                                  # (B, K, H / K, width)
    seen = torch.arange(width, device=at.device) <= at[:, None]
    p = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    y = p @ torch.where(seen[:, None, :, None], cache[1], 0).float()                 # 0 * NaN of a column that is not there
    return torch.where(alive[:, None], y.flatten(1), 0).to(qkv.dtype)


def add_norm_reference(x, delta, weight, bias, eps, dtype):
    """Plain torch: see `add_norm`."""
    x = x if delta is None else x + delta
    return x, norm_reference(x, weight, bias, eps).to(dtype)


def activation_reference(h, gated):
    """Plain torch: see `activation`."""
    if not gated:
        return F.gelu(h.float(), approximate="tanh").to(h.dtype)
    gate, up = h.float().chunk(2, -1)
    return (F.silu(gate) * up).to(h.dtype)


# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_heads(ptr, norm_ptr, cos_ptr, sin_ptr, heads, d, mask, D: tl.constexpr, EPS: tl.constexpr):
    """float32 q or k (heads, d), normed and rotated; the two halves of D are the coordinates."""
    x = tl.load(ptr + heads * D + d, mask=mask, other=0).to(tl.float32)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        x *= scale * tl.load(norm_ptr + d, mask=d < D, other=0).to(tl.float32)
    if cos_ptr is not None:
        other = (d + D // 2) % D                            # the other half's channel, loaded again: lanes exchange nothing
        turned = tl.load(ptr + heads * D + other, mask=mask, other=0).to(tl.float32)
        if norm_ptr is not None:
            turned *= scale * tl.load(norm_ptr + other, mask=d < D, other=0).to(tl.float32)
        cos, sin = tl.load(cos_ptr + d, mask=d < D, other=0), tl.load(sin_ptr + d, mask=d < D, other=0)
        x = x * cos + turned * sin
    return x


@triton.jit
def attention_kernel(
    qkv_ptr,            # (B, (H + 2 K) D): q, k, v of the new token
    keys_ptr,           # (B, K, width, D), any strides but the last
    values_ptr,         # (B, K, width, D), the same strides
    length_ptr,         # (B,) int64: tokens of the row, the new one included
    alive_ptr,          # (B,) bool
    cos_ptr,            # (width, D) float32, or None
    sin_ptr,            # (width, D) float32, with the sign of the half that it multiplies, or None
    q_norm_ptr,         # (D,), or None
    k_norm_ptr,         # (D,), or None
    out_ptr,            # (B, H D): y
    row_stride, head_stride, column_stride,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDE)[None, :]            # the query heads of this key head; channels
    out_ptr += row * (K * GROUP * D) + head * GROUP * D + g * D + d
    here = (g < GROUP) & (d < D)
    if tl.load(alive_ptr + row) == 0:
        tl.store(out_ptr, tl.zeros((HEADS, WIDE), tl.float32), mask=here)         # not what lay there: it could be a NaN
        return
    at = tl.load(length_ptr + row).to(tl.int32) - 1
    if cos_ptr is not None:
        cos_ptr += at * D
        sin_ptr += at * D
    qkv_ptr += row * ((K * GROUP + 2 * K) * D)
    keys_ptr += row * row_stride + head * head_stride
    values_ptr += row * row_stride + head * head_stride
    dtype = keys_ptr.dtype.element_ty
    q = load_heads(qkv_ptr, q_norm_ptr, cos_ptr, sin_ptr, head * GROUP + g, d, here, D, EPS).to(dtype)      # (HEADS, WIDE)
    k = load_heads(qkv_ptr, k_norm_ptr, cos_ptr, sin_ptr, K * GROUP + head, d, d < D, D, EPS).to(dtype)     # (1, WIDE)
    v = tl.load(qkv_ptr + (K * GROUP + K + head) * D + d, mask=d < D, other=0).to(dtype)
    tl.store(keys_ptr + at * column_stride + d, k, mask=d < D)
    tl.store(values_ptr + at * column_stride + d, v, mask=d < D)

    # the new token is taken from registers, the columns before it from the cache
    m = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)                          # (HEADS,) largest score so far
    total = tl.full((HEADS,), 1.0, tl.float32)
    y = tl.zeros((HEADS, WIDE), tl.float32) + v.to(tl.float32)
    for start in range(0, at, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = (column < at)[:, None] & (d < D)                                # (BLOCK, WIDE)
        keys = tl.load(keys_ptr + column[:, None] * column_stride + d, mask=there, other=0)
        values = tl.load(values_ptr + column[:, None] * column_stride + d, mask=there, other=0)
        score = tl.where((column < at)[None, :], tl.dot(q, tl.trans(keys), input_precision="ieee"), float("-inf"))
        new = tl.maximum(m, tl.max(score, 1))
        scale = tl.exp2((m - new) * SCALE)
        p = tl.exp2((score - new[:, None]) * SCALE)
        total = total * scale + tl.sum(p, 1)
        y = y * scale[:, None] + tl.dot(p.to(dtype), values, input_precision="ieee")
        m = new
    tl.store(out_ptr, y / total[:, None], mask=here)


@triton.jit
def add_norm_kernel(
    x_ptr,              # (B, C) float32: residual stream
    delta_ptr,          # (B, C), what a product adds to it, or None
    weight_ptr,         # (C,)
    bias_ptr,           # (C,), or None: root-mean-square norm
    sum_ptr,            # (B, C) float32: x + delta; may be x
    h_ptr,              # (B, C)
    C,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * C + c, mask=c < C, other=0)
    if delta_ptr is not None:
        x += tl.load(delta_ptr + row * C + c, mask=c < C, other=0).to(tl.float32)
    tl.store(sum_ptr + row * C + c, x, mask=c < C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0).to(tl.float32)
    if bias_ptr is None:
        h = x * tl.rsqrt(tl.sum(x * x, 0) / C + EPS) * weight
    else:
        x = tl.where(c < C, x - tl.sum(x, 0) / C, 0)
        h = x * tl.rsqrt(tl.sum(x * x, 0) / C + EPS) * weight + tl.load(bias_ptr + c, mask=c < C, other=0).to(tl.float32)
    tl.store(h_ptr + row * C + c, h, mask=c < C)


@triton.jit
def activation_kernel(
    h_ptr,              # (B, 2 I): gate, up; or (B, I)
    out_ptr,            # (B, I)
    inner,              # I
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h_ptr += row * (2 * inner if GATED else inner)
    x = tl.load(h_ptr + i, mask=i < inner, other=0).to(tl.float32)
    if GATED:                                               # x sigmoid(x) up
        out = x / (1 + tl.exp2(-x * LOG2E)) * tl.load(h_ptr + inner + i, mask=i < inner, other=0).to(tl.float32)
    else:                                                   # x (1 + tanh(u)) / 2 = x sigmoid(2 u), 2 u = 2 sqrt(2 / pi) (...)
        out = x / (1 + tl.exp2((x + 0.044715 * x * x * x) * -1.5957691216057308 * LOG2E))
    tl.store(out_ptr + row * inner + i, out, mask=i < inner)


# ----------------------------------------------------------------------------------------------------------------------


def launch_attention(y, qkv, cache, lengths, alive, cos, sin, q_norm, k_norm, eps):
    """`decode_attention` into y (B, H D), without an allocation: fit for a recorded graph. All but the cache contiguous."""
    (_, B, K, _, D), (_, *strides, _) = cache.shape, cache.stride()
    group, wide = qkv.shape[1] // D // K - 2, max(16, triton.next_power_of_2(D))        # 16: the least that tl.dot takes
    with torch.cuda.device_of(qkv):
        if B:
            attention_kernel[(B, K)](
                qkv, cache[0], cache[1], lengths, alive, cos, sin, q_norm, k_norm, y, *strides, K=K, GROUP=group, D=D,
                EPS=eps, SCALE=LOG2E.value / math.sqrt(D), HEADS=max(16, triton.next_power_of_2(group)),
                WIDE=wide, BLOCK=max(16, TILE // wide), num_warps=1, num_stages=2)
    return y


def launch_add_norm(out, h, x, delta, weight, bias, eps):
    """`add_norm` into out (B, C), which may be x, and h (B, C), without an allocation. All contiguous."""
    (B, C), width = x.shape, triton.next_power_of_2(x.shape[1])
    with torch.cuda.device_of(x):
        if B:
            add_norm_kernel[(B,)](x, delta, weight, bias, out, h, C, EPS=eps, BLOCK=width, num_warps=4 if width < 4096 else 8)
    return out, h


def launch_activation(out, h, gated):
    """`activation` into out (B, I), without an allocation. Both contiguous."""
    B, inner = out.shape
    with torch.cuda.device_of(h):
        if B:
            activation_kernel[(B, triton.cdiv(inner, 1024))](h, out, inner, GATED=gated, BLOCK=1024, num_warps=4)
    return out


def attention_into_new(qkv: Tensor, cache: Tensor, lengths: Tensor, alive: Tensor, cos: Tensor | None, sin: Tensor | None,
                       q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> Tensor:
    _, B, K, _, D = cache.shape
    y = qkv.new_empty(B, qkv.shape[1] - 2 * K * D)
    lengths, alive, *rest = [x if x is None else x.contiguous() for x in (lengths, alive, cos, sin, q_norm, k_norm)]
    return launch_attention(y, qkv.contiguous(), cache, lengths, alive, *rest, eps)


def add_norm_into_new(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
                      dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    delta, weight, bias = [x if x is None else x.contiguous() for x in (delta, weight, bias)]
    return launch_add_norm(x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), x.contiguous(), delta, weight, bias, eps)


def activation_into_new(h: Tensor, gated: bool) -> Tensor:
    return launch_activation(h.new_empty(len(h), h.shape[1] // (2 if gated else 1)), h.contiguous(), gated)


attention_op = torch.library.custom_op("kernels::decode_attention", attention_into_new, mutates_args=("cache",))
add_norm_op = torch.library.custom_op("kernels::add_norm", add_norm_into_new, mutates_args=())
activation_op = torch.library.custom_op("kernels::activation", activation_into_new, mutates_args=())
activation_op.register_fake(lambda h, gated: h.new_empty(h.shape[0], h.shape[1] // (2 if gated else 1)))


@attention_op.register_fake
def _(qkv, cache, *_):
    return qkv.new_empty(cache.shape[1], qkv.shape[1] - 2 * cache.shape[2] * cache.shape[4])


@add_norm_op.register_fake
def _(x, delta, weight, bias, eps, dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


def decode_attention(qkv, cache, lengths, alive, rope=None, q_norm=None, k_norm=None, eps=1e-5):
    """Attention of one new token a row, which is written into the cache: keys and values of the row's column lengths - 1.

    qkv (B, (H + 2 K) D): the product of the stacked q, k, v, biases included; cache (2, B, K, width, D), keys and values,
    any strides but the last, changed in place; lengths (B,) int64, tokens of each row with the new one; alive (B,) bool;
    rope: cos and sin (width, D) float32 as model.rope_table gives them, None for learned positions; q_norm, k_norm (D,)
    -> y (B, H D) in qkv's dtype, 0 for a row that is not alive, whose cache stays as it is. q, k, v and the weights of the
    softmax are rounded to the cache's dtype, all else is float32. A length beyond the cache is not looked for.
    """
    if cache.ndim != 5 or qkv.ndim != 2 or len(cache) != 2 or cache.stride(4) != 1 or qkv.shape[1] % (
            cache.shape[2] * cache.shape[4]) or not len(qkv) == len(lengths) == len(alive) == cache.shape[1]:
        got = ", ".join(str(tuple(x.shape)) for x in (qkv, cache, lengths, alive))
        raise ValueError("decode_attention: qkv (B, (H + 2 K) D), cache (2, B, K, width, D), lengths (B,), alive (B,), got " + got)
    if use_triton(qkv):
        return attention_op(qkv, cache, lengths, alive, *(rope or (None, None)), q_norm, k_norm, eps)
    return attention_reference(qkv, cache, lengths, alive, rope, q_norm, k_norm, eps)


def add_norm(x, delta, weight, bias, eps, dtype):
    """x (B, C) float32 plus delta (B, C) or None -> the sum, float32, and its norm in `dtype`, what a product takes.

    weight (C,); bias (C,) for layer norm, None for root-mean-square norm.
    """
    if x.dtype != torch.float32 or x.ndim != 2 or any(t is not None and t.shape[-1:] != x.shape[1:] for t in (delta, weight, bias)):
        raise ValueError(f"add_norm: x (B, C) float32, delta (B, C), weight, bias (C,), got {x.dtype} {tuple(x.shape)} and "
                         + ", ".join(str(t if t is None else tuple(t.shape)) for t in (delta, weight, bias)))
    return (add_norm_op if use_triton(x) else add_norm_reference)(x, delta, weight, bias, eps, dtype)


def activation(h, gated):
    """silu(gate) * up of h (B, 2 I) = gate, up; or gelu of h (B, I), its tanh form -> (B, I) in h's dtype."""
    return (activation_op if use_triton(h) else activation_reference)(h, gated)
