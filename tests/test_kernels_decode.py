"""The kernels of a decoding step against plain torch, and a whole model stepped through them against its own forward.

Without a GPU they run in Triton's interpreter, where tl.dot reads bfloat16 wrongly: float32 and float16 there.
"""
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import model
from kernels import activation, add_norm, decode, decode_attention, sample
from test_kernels import DEVICE, NoKernel, PeakMemory, needs_triton, normal, path  # noqa: F401  (path is a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning")      # numpy in the interpreter

LENGTHS = [1, 2, 17, 64, 65, 66, 90]            # the first token; less than a block of columns, all but one, one, one more
HEADS = {   # K, query heads of each, D, RoPE, QK-norm
    "one head": (1, 1, 32, True, False),
    "gpt2": (2, 1, 64, False, False),
    "SmolLM2": (2, 3, 64, True, False),
    "qwen2": (1, 7, 64, True, False),
    "qwen3": (2, 2, 128, True, True),
    "small": (2, 2, 16, True, True),
    "no power of two": (2, 1, 80, True, True),
    "more than a tile": (1, 17, 16, False, True),
}


def attention_inputs(K, group, D, rope, qk_norm, lengths=LENGTHS, dtype=torch.float32):
    """Arguments of decode_attention: a cache whose unused columns are NaN, one row that has ended."""
    B, width = len(lengths), max(lengths) + 3
    qkv = normal(B, (group + 2) * K * D).to(dtype)
    cache, lengths = normal(2, B, K, width, D, seed=1).to(dtype), torch.tensor(lengths, device=DEVICE)
    cache.masked_fill_((torch.arange(width, device=DEVICE) >= lengths[:, None] - 1)[:, None, :, None], torch.nan)
    alive = torch.arange(B, device=DEVICE) != 2
    c = SimpleNamespace(positions="rope", rope_theta=100.0, head_dim=D, rope_scaling=None)
    tables = model.rope_table(c, width, DEVICE) if rope else None
    norms = [1 + normal(D, seed=i) / 4 for i in (2, 3)] if qk_norm else [None, None]
    return qkv, cache, lengths, alive, tables, *norms, 1e-5


def truth(qkv, cache, lengths, alive, rope, q_norm, k_norm, eps):
    """Row by row in float64, from the formulas; y and the new key and value of each row."""
    _, B, K, _, D = cache.shape
    found = []
    for b in range(B):
        q, k, v = qkv[b].double().view(-1, D).split([qkv.shape[1] // D - 2 * K, K, K])
        if q_norm is not None:
            q, k = (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w for x, w in ((q, q_norm), (k, k_norm)))
        if rope is not None:
            q, k = (model.rotate(x[None, None], *(t[lengths[b] - 1].double() for t in rope))[0, 0] for x in (q, k))
        columns = slice(0, lengths[b] - 1)
        keys, values = (torch.cat((old[b, :, columns].double(), new[:, None]), 1) for old, new in zip(cache, (k, v)))
        p = (q.view(K, -1, D) @ keys.mT / D ** 0.5).softmax(-1)
        found.append((torch.cat([*(p @ values)]).flatten(), k, v))
    return (torch.stack(x) for x in zip(*found))


@pytest.mark.parametrize("heads", HEADS)
def test_attention(path, heads):  # noqa: F811
    """Right values; the new key and value at the row's own place, nothing else in the cache touched or looked at."""
    inputs = attention_inputs(*HEADS[heads])
    before, lengths, alive = inputs[1].clone(), inputs[2], inputs[3]
    exact, keys, values = truth(*inputs)
    y = decode_attention(*inputs)
    assert y.shape == exact.shape and (y[~alive] == 0).all()
    assert (y - exact)[alive].abs().max() <= 3e-6
    rows = alive.nonzero()[:, 0]
    for cache, new, old in zip(inputs[1], (keys, values), before):
        assert (cache[rows, :, lengths[rows] - 1] - new[rows]).abs().max() <= 3e-6
        cache[rows, :, lengths[rows] - 1] = torch.nan
        assert torch.equal(cache.nan_to_num(7), old.nan_to_num(7))


def test_attention_in_half_precision(path):  # noqa: F811
    dtype, tolerance = (torch.bfloat16, 2e-2) if DEVICE == "cuda" else (torch.float16, 2e-3)
    inputs = attention_inputs(2, 3, 64, True, True, dtype=dtype)
    exact, keys, _ = truth(*inputs)
    y, alive = decode_attention(*inputs), inputs[3]
    assert y.dtype == inputs[1].dtype == dtype and (y - exact)[alive].abs().max() <= tolerance
    rows = alive.nonzero()[:, 0]
    assert (inputs[1][0, rows, :, inputs[2][rows] - 1] - keys[rows]).abs().max() <= 4 * tolerance


def test_attention_of_large_scores(path):  # noqa: F811
    """A column that outweighs the others by e^1000, first, last or new, is what comes out."""
    inputs = attention_inputs(1, 2, 16, False, False, [70] * 4)
    qkv, cache = inputs[:2]
    qkv[:, :32] = 100.0
    qkv[:, 32:48] = 0
    cache[0, :, :, :69] = 0
    cache[0, 0, 0, 0], cache[0, 1, 0, 68], qkv[3, 32:48] = 40.0, 40.0, 40.0
    y = decode_attention(*inputs).view(4, 2, 16)
    for row, value in ((0, cache[1, 0, 0, 0]), (1, cache[1, 1, 0, 68]), (3, qkv[3, 48:])):
        assert torch.equal(y[row], value.expand(2, 16))


def test_rows_do_not_depend_on_others(path):  # noqa: F811
    """A slice of a larger cache, and a row alone: the same bits."""
    qkv, cache, lengths, alive, *more = attention_inputs(2, 3, 16, True, True)
    wide = torch.full((2, len(lengths) + 2, 2, cache.shape[3], 16), torch.nan, device=DEVICE)
    wide[:, 1:-1] = cache
    y = decode_attention(qkv, wide[:, 1:-1], lengths, alive, *more)
    alone = decode_attention(qkv[5:6], cache[:, 5:6], lengths[5:6], alive[5:6], *more)
    if path == "triton":
        assert torch.equal(y[5:6], alone)
    assert (y[5] - alone[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("C, bias, delta", list(itertools.product((64, 576, 1000), (False, True), (False, True))))
def test_add_norm(path, C, bias, delta):  # noqa: F811
    x, weight = 3 * normal(3, C) + 1, 1 + normal(C, seed=1)
    bias, delta = normal(C, seed=2) if bias else None, normal(3, C, seed=3) if delta else None
    before = x.clone()
    total, h = add_norm(x, delta, weight, bias, 1e-5, torch.float32)
    exact = x.double() + (0 if delta is None else delta)
    assert (total - exact).abs().max() <= 1e-6 and torch.equal(x, before)
    if bias is not None:
        exact -= exact.mean(-1, keepdim=True)
    exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (0 if bias is None else bias)
    assert h.dtype == torch.float32 and (h - exact).abs().max() <= 1e-5
    assert add_norm(x, delta, weight, bias, 1e-5, torch.bfloat16)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("inner", [5, 1024, 1408])
def test_activation(path, inner):  # noqa: F811
    h = 4 * normal(3, 2 * inner)
    h[0, 0], h[1, 1], h[2, 2] = 1e4, -1e4, 0.0
    gate, up = h.double().chunk(2, -1)
    out, exact = activation(h, True), F.silu(gate) * up
    assert ((out - exact).abs() <= 1e-6 * (1 + exact.abs())).all()
    out, exact = activation(h, False), F.gelu(h.double(), approximate="tanh")
    assert ((out - exact).abs() <= 2e-6 * (1 + exact.abs())).all()


FAMILIES = dict(
    gpt2=dict(norm="layer", positions="learned", mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True),
    llama=dict(n_kv_head=2), qwen2=dict(qkv_bias=True, n_kv_head=1), qwen3=dict(qk_norm=True, n_kv_head=2, head_dim=32))


def step(gpt, tokens, cache, lengths, alive):
    """One decoding step as generate would take it: a layer is four products and five kernels, its first norm the layer
    before's last. tokens (B,) -> hidden (B, C)."""
    c, at = gpt.config, lengths - 1
    rope, eps = model.rope_table(c, cache.shape[4], DEVICE), c.norm_eps
    x, delta = gpt.embed[tokens], None
    if c.positions == "learned":
        x = x + gpt.positions[at]
    for layer, w in enumerate(gpt.blocks):
        x, h = add_norm(x, delta, w.norm1, w.norm1_bias, eps, torch.float32)
        y = decode_attention(F.linear(h, w.qkv, w.qkv_bias), cache[layer], lengths, alive, rope, w.q_norm, w.k_norm, eps)
        x, h = add_norm(x, F.linear(y, w.out, w.out_bias), w.norm2, w.norm2_bias, eps, torch.float32)
        delta = F.linear(activation(F.linear(h, w.up, w.up_bias), c.mlp == "swiglu"), w.down, w.down_bias)
    return add_norm(x, delta, gpt.norm, gpt.norm_bias, eps, torch.float32)[1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_stepped_through_them(path, family):  # noqa: F811
    """Token by token through the cache = the model's own forward, for rows of other lengths, one of which ends."""
    torch.manual_seed(0)
    c = model.GPTConfig(vocab_size=50, eos_id=0, max_len=8, n_layer=2, n_head=4, n_embd=32, **FAMILIES[family])
    gpt = model.GPT(c)
    for name, p in gpt.named_parameters():
        if "norm" in name or "bias" in name:
            p += torch.randn_like(p) / 4
    gpt, tokens = gpt.to(DEVICE), torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = gpt(tokens)
    cache = torch.full((c.n_layer, 2, 2, c.n_kv_head, c.max_len, c.head_dim), torch.nan, device=DEVICE)
    for t in range(5):
        at = torch.tensor([t, max(t - 2, 0)], device=DEVICE)
        alive = torch.tensor([t < 4, t > 1], device=DEVICE)                     # one begins later, one ends earlier
        hidden = step(gpt, tokens.gather(1, at[:, None])[:, 0], cache, at + 1, alive)
        assert (hidden - expected[[0, 1], at])[alive].abs().max() <= 1e-5 and hidden.isfinite().all()


def test_arguments_with_strides(path):  # noqa: F811
    """Each as a transposed, expanded or sliced tensor: as if it were contiguous."""
    apart = lambda x: torch.stack((x, x), -1)[..., 0]                # every other number in memory
    qkv, cache, lengths, alive, tables, *norms, eps = attention_inputs(*HEADS["qwen3"], lengths=[5] * 3)
    args = qkv, cache.clone(), lengths[:1].expand(3), apart(alive), tuple(map(apart, tables)), *map(apart, norms), eps
    assert torch.equal(decode_attention(*args), decode_attention(qkv, cache, lengths, alive, tables, *norms, eps))
    assert torch.equal(args[1][:, 0].nan_to_num(), cache[:, 0].nan_to_num())
    x, delta, weight, bias = normal(40, 3).T, normal(40, 3, seed=1).T, apart(normal(40, seed=2)), apart(normal(40, seed=3))
    for a, b in zip(add_norm(x, delta, weight, bias, 1e-5, torch.float32),
                    add_norm(*(t.contiguous() for t in (x, delta, weight, bias)), 1e-5, torch.float32)):
        assert torch.equal(a, b)


def test_bad_arguments(path):  # noqa: F811
    qkv, cache, lengths, alive, *more = attention_inputs(2, 1, 16, True, False)
    for args in ((qkv[:, 1:], cache, lengths, alive), (qkv[1:], cache, lengths, alive), (qkv, cache[0], lengths, alive),
                 (qkv, cache.mT, lengths, alive), (qkv, cache, lengths[1:], alive)):
        with pytest.raises(ValueError, match="decode_attention: "):
            decode_attention(*args, *more)
    x, weight = normal(3, 8), normal(8)
    for args in ((x.double(), None, weight, None), (x, x[:, 1:], weight, None), (x, None, weight[1:], None),
                 (x, None, weight, weight[1:])):
        with pytest.raises(ValueError, match="add_norm: "):
            add_norm(*args, 1e-5, torch.float32)


@needs_triton
def test_opcheck():
    qkv, cache, lengths, alive, rope, *norms, eps = attention_inputs(1, 2, 16, True, True, [3, 2])
    cache, x = cache.nan_to_num(0), normal(2, 8)
    for op, args in ((decode.attention_op, (qkv, cache, lengths, alive, *rope, *norms, eps)),
                     (decode.attention_op, (qkv, cache, lengths, alive, None, None, None, None, eps)),
                     (decode.add_norm_op, (x, x + 1, x[0], x[1], eps, torch.bfloat16)),
                     (decode.add_norm_op, (x, None, x[0], None, eps, torch.float32)),
                     (decode.activation_op, (x, True)), (decode.activation_op, (x, False))):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_launches_allocate_nothing(monkeypatch):
    """What a recorded graph reads and writes is what its caller holds."""
    for module, kernel in ((decode, "attention_kernel"), (decode, "add_norm_kernel"), (decode, "activation_kernel"),
                           (sample, "slice_kernel"), (sample, "join_kernel")):
        monkeypatch.setattr(module, kernel, NoKernel())
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, number = meta(4, 50, dtype=torch.float32), meta(dtype=torch.long)
    out, work = (meta(4, dtype=torch.long), meta(4), meta(4, dtype=torch.bool)), sample.scratch(logits)
    calls = [lambda: decode.launch_attention(y, qkv, cache, lengths, alive, cos, cos, None, None, 1e-5),
             lambda: decode.launch_add_norm(x, h, x, y, weight, None, 1e-5),
             lambda: decode.launch_activation(y, up, True),
             lambda: sample.launch(out, logits, number, number, lengths, False, work)]
    qkv, cache, lengths, alive = meta(4, 128), meta(2, 4, 2, 9, 16), meta(4, dtype=torch.long), meta(4, dtype=torch.bool)
    cos, y, x, h, up, weight = meta(9, 16), meta(4, 64), meta(4, 64, dtype=torch.float32), meta(4, 64), meta(4, 128), meta(64)
    for call in calls:
        with PeakMemory() as memory:
            call()
        assert memory.peak == 0


class BytesMoved(TorchDispatchMode):
    """Sums the bytes of what each operation reads and writes: all its tensors, of an embedding only the rows that are taken."""
    moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function._schema.name != "aten::embedding" and not function.is_view:
            self.moved += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        return result


@needs_triton
@pytest.mark.parametrize("rows, factor", [(64, 1.2), (1024, 1.3)])
def test_bytes_of_a_decoding_step(rows, factor, monkeypatch):
    """SmolLM2-135M with 228 tokens in each row, on the meta device: weights, keys and values once, and what lies between."""
    monkeypatch.setattr(decode, "use_triton", lambda x: True)
    c, length = model.GPTConfig(vocab_size=49152, eos_id=0, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536), 228
    with torch.device("meta"):
        gpt = model.GPT(c)
        cache = torch.empty(30, 2, rows, 3, length, 64, dtype=torch.bfloat16)
        newest, alive, rope = torch.ones(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool), torch.empty(2, length, 64)
    w = model.decoding_weights(gpt, torch.bfloat16, torch.device("meta"))
    with torch.inference_mode(), BytesMoved() as counted:
        hidden = model.decode(c, w, newest, newest, alive, cache, tuple(rope), torch.bfloat16)
    floor = cache.nbytes + sum(weight.nbytes for block in w.blocks for weight in vars(block).values() if weight is not None)
    print(f"\n{rows} rows: {counted.moved / 1e6:.0f} MB, {counted.moved / floor:.2f} of the floor")
    assert hidden.shape == (rows, 576) and floor < counted.moved < factor * floor
