"""The sampling kernel: the right words, the right frequencies, the reference's tokens; what a recorded graph relies on.

Without a GPU the kernels run in Triton's interpreter, 80 ms for each block of a row; the frequencies are then the
reference's, whose tokens the kernels reproduce one by one.
"""
import math

import pytest
import torch

import kernels
from kernels import sample
from kernels import sample_tokens, tl, triton
from kernels.sample import philox, random_words, sample_reference
from test_kernels import DEVICE, LOGITS, needs_triton, normal, path  # noqa: F401  (path is a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide|All-NaN):RuntimeWarning")      # numpy in the interpreter


def number(*values):
    return torch.tensor(values if len(values) > 1 else values[0], device=DEVICE)


def test_philox():
    """The answers that the generator's authors publish with it."""
    for counter, key, words in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2 ** 32 - 1,) * 4, (2 ** 32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(w) for w in philox([torch.tensor(c) for c in counter], key)) == words


@triton.jit
def words_and_exponentials(seed_ptr, word_ptr, r_ptr, E_ptr, row, step, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c, row, step, 0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(4 * BLOCK)
    tl.store(word_ptr + tl.arange(0, 4 * BLOCK), words.to(tl.int64))
    tl.store(E_ptr + c, sample.exponential(tl.load(r_ptr + c).to(tl.uint32)))


@needs_triton
def test_words_and_exponentials():
    """Triton's words are the reference's, bit by bit; E keeps its digits for the winners, near u = 0, and near u = 1."""
    edges = [0x55555555 + i for i in range(-3, 4)] + [2 ** 32 - 1 - i for i in range(64)] + list(range(64))
    edges += [min(2 ** i + j, 2 ** 32 - 1) for i in range(33) for j in (-1, 0, 1)]
    random = torch.randint(0, 2 ** 32, (1024 - len(edges),), generator=torch.Generator().manual_seed(0))
    r = torch.cat((torch.tensor(edges).clamp(min=0), random)).to(DEVICE)
    words, E = torch.zeros(4096, dtype=torch.long, device=DEVICE), torch.zeros(1024, device=DEVICE)
    seed, row, step = number(-0x123456789ABCDEF), 5, 70000
    words_and_exponentials[(1,)](seed, words, r, E, row, step, BLOCK=1024)
    assert torch.equal(words, random_words(seed, number(step).view(1), number(row).view(1), 4096)[0])
    exact = -torch.log1p(-(r.double() + 0.5) * 2.0 ** -32) / math.log(2)
    print(f"\nlargest error of E, relative: {((E - exact).abs() / exact).max():.1e}")
    assert ((E - exact).abs() / exact).max() <= 4e-7
    assert exact.min() < 2e-10 and exact.max() > 32                             # the ends were among them


@needs_triton
@pytest.mark.parametrize("V, N, block", [
    (2, 8, 256),            # fewer than the four columns of a counter
    (50, 16, 256),          # less than a block
    (1025, 4, 256),         # a column more than a block
    (5003, 4, 1024),
    (16385, 2, 4096),       # a slice and a column
    (151936, 1, 4096),      # ten slices, the last one ragged
])
def test_tokens_are_the_reference_s(monkeypatch, V, N, block):
    """Whatever the block, which is only larger here so that the interpreter takes fewer steps."""
    monkeypatch.setattr(kernels, "PATH", "triton")
    monkeypatch.setattr(sample, "BLOCK", block)
    slope = torch.linspace(0, 30, V, device=DEVICE)                             # every block and slice far above the last
    for kind, seed in (("normal", 1), ("peaks", -2), ("slope", 2 ** 40 + 3)):
        z, seed, step = normal(N, V), number(seed), torch.arange(N, device=DEVICE) + 2 ** 20
        z = z + slope if kind == "slope" else LOGITS[kind](z)
        token, logprob, finite = sample_tokens(z, seed, step)
        expected, exact, _ = sample_reference(z, seed, step, torch.arange(N, device=DEVICE), False)
        assert torch.equal(token, expected) and finite.all()
        assert (logprob - exact).abs().max() <= 3e-6 and logprob.dtype == torch.float32
        if kind == "normal" and V > 50:
            assert (token != z.argmax(-1)).any()


def test_greedy(path, monkeypatch):  # noqa: F811
    """The first of the largest, also where many are equal."""
    for V, block in ((37, 256), (5003, 256), (16385, 4096)):
        monkeypatch.setattr(sample, "BLOCK", block)
        z = normal(4, V).round()
        z[3] = 0
        token, logprob, finite = sample_tokens(z, number(0), number(0), greedy=True)
        assert torch.equal(token, z.argmax(-1)) and finite.all() and token[3] == 0
        assert (logprob - z.double().log_softmax(-1).amax(-1)).abs().max() <= 3e-6


def chi_square(counts, p):
    """Standard deviations of the statistic from its mean: bins of one token, or of several rare ones in order of p."""
    p, order = p.sort(descending=True)
    counts, N = counts[order].double(), counts.sum()
    bins = torch.zeros(len(p), dtype=torch.long)
    mass, b = 0.0, 0
    for v in range(len(p)):
        bins[v] = b
        mass += N * p[v].item()
        if mass >= 8:
            mass, b = 0.0, b + 1
    bins.clamp_(max=b - 1)                                                      # what is left joins the last bin
    seen, expected = (torch.zeros(b, dtype=torch.double).index_add_(0, bins, x) for x in (counts, N * p))
    statistic = ((seen - expected) ** 2 / expected).sum().item()
    return (statistic - (b - 1)) / math.sqrt(2 * (b - 1)), b


@pytest.mark.parametrize("V, N, least", [(50, 40000, 30), (5000, 5000, 200)])
def test_frequencies(V, N, least):
    """Chi-square over all tokens: the rare ones in bins of their own, first to last column, and step after step."""
    z = 2.5 * normal(V) if V == 50 else 2 * normal(V)
    counts = torch.zeros(V, dtype=torch.long)
    for step in range(4):
        rows = z.expand(N // 4, V)
        counts += torch.bincount(sample_tokens(rows, number(17), number(step))[0].cpu(), minlength=V)
    deviation, bins = chi_square(counts, z.double().softmax(-1).cpu())
    print(f"\nV = {V}: {bins} bins, {deviation:+.2f} standard deviations")
    assert bins >= least and abs(deviation) < 3.5
    tilted = (0.9 * z.double()).softmax(-1).cpu()
    assert chi_square(counts, tilted)[0] > 3.5                                  # a slightly other distribution is refused


def test_streams(path):  # noqa: F811
    """seed, step and row make the draw, nothing else does: not the place in the batch, not the neighbours."""
    z, seed, step, row = normal(6, 300), number(3), number(10), torch.arange(6, device=DEVICE)
    token, logprob, _ = sample_tokens(z, seed, step)
    for again in (sample_tokens(z, seed, step, row), sample_tokens(z, seed.clone(), step.expand(6), row)):
        assert torch.equal(again[0], token) and torch.equal(again[1], logprob)
    order = torch.tensor([4, 1, 5], device=DEVICE)
    moved = sample_tokens(z[order], seed, step, order)
    assert torch.equal(moved[0], token[order]) and torch.equal(moved[1], logprob[order])
    alike = z[:1].expand(6, 300)
    assert len(sample_tokens(alike, seed, step)[0].unique()) > 1                       # rows differ
    for other in (sample_tokens(z, seed + 2 ** 32, step), sample_tokens(z, seed + 1, step), sample_tokens(z, seed, step + 1)):
        assert not torch.equal(other[0], token)
    step += 1                                                                   # the tensor that a graph would read
    assert not torch.equal(sample_tokens(z, seed, step)[0], token)
    assert torch.equal(sample_tokens(z, seed, step - 1)[0], token)


@pytest.mark.parametrize("greedy", [False, True])
def test_not_finite(path, greedy):  # noqa: F811
    """A row with a NaN or an infinity says so, and still gives a token that exists."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        z = normal(5, 300)
        z[1, 299], z[2], z[3, 7] = bad, bad, bad
        token, _, finite = sample_tokens(z, number(1), number(2), greedy=greedy)
        assert finite.tolist() == [True, False, False, False, True]
        assert ((token >= 0) & (token < 300)).all()
        clean = sample_tokens(normal(5, 300), number(1), number(2), greedy=greedy)[0]
        assert torch.equal(token[[0, 4]], clean[[0, 4]])


@needs_triton
def test_written_places_and_strides():
    """`launch` fills what it is given, allocates nothing and touches nothing beside it; rows may lie apart."""
    wide = torch.full((3, 400), torch.nan, device=DEVICE)
    z = wide[:, 50:350]
    z.copy_(normal(3, 300))
    boxes = [torch.full((5,), value, device=DEVICE) for value in (-7, -7.0, False)]
    row, seed, step = torch.arange(3, device=DEVICE), number(5), number(6)
    work = sample.scratch(z)
    for x in work:
        x.fill_(-1)
    sample.launch([b[1:4] for b in boxes], z, seed, step, row, False, work)
    token, logprob, _ = sample_reference(z.contiguous(), seed, step.expand(3), row, False)
    assert boxes[0].tolist() == [-7, *token.tolist(), -7] and boxes[2].tolist() == [False, True, True, True, False]
    assert (boxes[1][1:4] - logprob).abs().max() <= 1e-6 and boxes[1][0] == boxes[1][4] == -7


def test_bad_arguments(path):  # noqa: F811
    z, seed, step = normal(3, 37), number(1), number(2)
    for call in (lambda: sample_tokens(z.bfloat16(), seed, step), lambda: sample_tokens(z[0], seed, step),
                 lambda: sample_tokens(z, seed.int(), step), lambda: sample_tokens(z, seed, step.expand(2)),
                 lambda: sample_tokens(z, seed, step, step.expand(2))):
        with pytest.raises(ValueError, match="sample_tokens: "):
            call()
    assert [len(x) for x in sample_tokens(z[:0], seed, step)] == [0, 0, 0]


@needs_triton
def test_opcheck():
    z, seed, step, row = normal(3, 37), number(1), number(2), torch.arange(3, device=DEVICE)
    for greedy in (False, True):
        torch.library.opcheck(sample.sample_op, (z, seed, step, row, greedy), test_utils=("test_schema", "test_faketensor"))
