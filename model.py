"""One small language model for all scripts: GPT, tokenizer, generation with a KV cache, Hugging Face checkpoints.

It knows no questions, answers or rewards. The one layout and index convention, everywhere in this project:

    tokens          (B, T)    [ prompt | response | pad ]   left-aligned, padded on the right, a row starts at position 0
    response_mask   (B, T-1)  True where tokens[:, t+1] was sampled by the policy, the end token included
    every per-token tensor    (B, T-1)   index t is the action tokens[:, t+1] taken in the state tokens[:, :t+1]
    outcomes        (B,)      the verifier's verdict on the whole response

Left-aligned rows need no attention mask and no position ids: causal attention never looks at the padding on the right.
The pad id is a filler and nothing else, masks come from lengths, so it may equal the end token.

Letters: B rows, T tokens, C channels, H query heads, K key/value heads, D channels of a head, V vocabulary.
"""
import copy
import heapq
import itertools
import json
import math
import os
import re
import unicodedata
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property, partial, reduce
from pathlib import Path
from types import SimpleNamespace

import regex
import safetensors
import safetensors.torch
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import activation, add_norm, decode_attention, sample_tokens, use_triton


class InputError(ValueError):
    """Something that the user gave is wrong; the message is one line that names the file and what is wrong with it."""


# ---------------------------------------------------------------------------------------------------------------- model
@dataclass
class GPTConfig:
    """Shape and family of a GPT; the defaults are Llama's. gpt2: layer norm, learned positions, gelu, biases everywhere;
    qwen2: qkv_bias; qwen3: qk_norm. None becomes pad_id = eos_id, n_kv_head = n_head, head_dim = C / H."""
    vocab_size: int
    eos_id: int
    pad_id: int | None = None
    max_len: int = 1024                 # the context: prompt and response together
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    n_kv_head: int | None = None
    head_dim: int | None = None
    n_inner: int | None = None          # 8/3 C for the gated MLP (it has three matrices), 4 C for gelu
    norm: str = "rms"                   # or "layer"
    norm_eps: float = 1e-5
    positions: str = "rope"             # or "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # rope type llama3: factor, low_freq_factor, high_freq_factor, original length
    mlp: str = "swiglu"                 # or "gelu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True
    value_head: bool = False

    @property
    def init_std(self) -> float:
        """Standard deviation of fresh weights, sqrt(2 / (5 C)) (Nguyen and Salazar 2019): 0.02 at width 1000, 0.08 at 64."""
        return math.sqrt(2 / (5 * self.n_embd))

    def __post_init__(self):
        self.pad_id = self.eos_id if self.pad_id is None else self.pad_id
        self.n_kv_head = self.n_kv_head or self.n_head
        if min(self.vocab_size, self.max_len, self.n_layer, self.n_head, self.n_kv_head, self.n_embd) < 1:
            raise InputError("a size of the model is below 1")
        if not self.head_dim and self.n_embd % self.n_head:
            raise InputError(f"{self.n_head} heads do not divide a width of {self.n_embd}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise InputError(f"{self.n_kv_head} key/value heads do not divide {self.n_head} heads")
        if self.positions == "rope" and self.head_dim % 2:
            raise InputError(f"RoPE turns pairs of channels, a head has {self.head_dim}")
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd if self.mlp == "gelu" else math.ceil(self.n_embd / 3) * 8
        if (self.norm, self.positions, self.mlp) not in (("rms", "rope", "swiglu"), ("layer", "learned", "gelu")):
            raise ValueError(f"no family has {self.norm} norm, {self.positions} positions and a {self.mlp} MLP")

    @property
    def family(self) -> str:
        """The Hugging Face model_type whose form this model has."""
        if self.positions == "learned":
            return "gpt2"
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias and not self.out_bias else "llama"


class Block(nn.Module):
    """The parameters of one layer. What is multiplied with the same input lies in one matrix: qkv = q, k, v stacked,
    up = gate, up stacked. Plain tensors, so that `block` reads those that `generate` prepared just as well."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        bias = dict(norm1=c.norm == "layer", norm2=c.norm == "layer", qkv=c.qkv_bias, out=c.out_bias, up=c.mlp_bias,
                    down=c.mlp_bias)
        gated = 2 if c.mlp == "swiglu" else 1
        shapes = dict(norm1=(c.n_embd,), qkv=((c.n_head + 2 * c.n_kv_head) * c.head_dim, c.n_embd),
                      out=(c.n_embd, c.n_head * c.head_dim), norm2=(c.n_embd,), up=(gated * c.n_inner, c.n_embd),
                      down=(c.n_embd, c.n_inner))
        for name, shape in shapes.items():
            # the residual stream sums 2 L projections: scaled so that its variance does not grow with depth
            std = c.init_std / math.sqrt(2 * c.n_layer) if name in ("out", "down") else c.init_std
            weight = torch.ones(shape) if name.startswith("norm") else torch.randn(shape) * std
            self.register_parameter(name, nn.Parameter(weight))
            self.register_parameter(name + "_bias", nn.Parameter(torch.zeros(shape[0])) if bias[name] else None)
        for name in ("q_norm", "k_norm"):
            self.register_parameter(name, nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None)

    def forward(self, layer, c, x, rope, attend, checkpointed):
        """`layer`, which is block or what it was compiled to, with these parameters. checkpointed: of what it makes only x is kept
        for the backward pass, which makes the rest again."""
        if checkpointed:
            return checkpoint(layer, c, self, x, rope, attend, use_reentrant=False, preserve_rng_state=False)
        return layer(c, self, x, rope, attend)


def norm(x, weight, bias, eps):
    """Root-mean-square norm without a bias, layer norm with one."""
    return F.rms_norm(x, weight.shape, weight, eps) if bias is None else F.layer_norm(x, weight.shape, weight, bias, eps)


def rope_table(c: GPTConfig, length: int, device):
    """cos and sin of each position's angles, (length, D) each; sin carries the sign of the half that it multiplies. None
    for a family without RoPE."""
    if c.positions != "rope":
        return None
    freqs = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if s := c.rope_scaling:
        # llama3: wavelengths beyond the original context are stretched, short ones kept, a linear blend between
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        periods = s["original_max_position_embeddings"] * freqs / (2 * math.pi)     # turns within the original context
        keep = ((periods - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    angles = torch.arange(length, device=device).float()[:, None] * freqs            # (length, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """x (B, T, heads, D) turned by angles (.., T, 1, D); the two halves of D are the coordinates, as in Hugging Face."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def causal_attention(q, k, v):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                # (B, heads, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
    return y.transpose(1, 2).flatten(2)


def block(c: GPTConfig, w, x, rope, attend):
    """One layer, x (B, T, C) -> (B, T, C), with the tensors of w; attend(q, k, v) -> (B, T, H D)."""
    B, T, _ = x.shape
    h = norm(x, w.norm1, w.norm1_bias, c.norm_eps)
    qkv = F.linear(h, w.qkv, w.qkv_bias).view(B, T, c.n_head + 2 * c.n_kv_head, c.head_dim)    # (B, T, H + 2 K, D)
    qk, v = qkv[:, :, :-c.n_kv_head], qkv[:, :, -c.n_kv_head:]
    if c.qk_norm:
        qk = torch.cat((norm(qk[:, :, :c.n_head], w.q_norm, None, c.norm_eps),
                        norm(qk[:, :, c.n_head:], w.k_norm, None, c.norm_eps)), 2)
    if rope is not None:
        qk = rotate(qk, *rope)
    y = attend(qk[:, :, :c.n_head], qk[:, :, c.n_head:], v)
    x = x + F.linear(y, w.out, w.out_bias)
    h = F.linear(norm(x, w.norm2, w.norm2_bias, c.norm_eps), w.up, w.up_bias)
    if c.mlp == "swiglu":
        gate, up = h.chunk(2, -1)
        h = F.silu(gate) * up
    else:
        h = F.gelu(h, approximate="tanh")
    return x + F.linear(h, w.down, w.down_bias)


def trunk(c: GPTConfig, w, tokens, places, rope, attend_in, block=block):
    """tokens (B, T) at positions places (B or 1, T) -> hidden (B, T, C) after the final norm. Training, prefill and decoding on
    a CPU differ in the attention that attend_in(layer) gives and in where the tensors of w come from."""
    x = F.embedding(tokens, w.embed)
    if c.positions == "learned":
        x = x + F.embedding(places, w.positions)
    else:
        rope = [F.embedding(places, table)[:, :, None] for table in rope]            # (B or 1, T, 1, D)
    for layer, weights in enumerate(w.blocks):
        x = block(c, weights, x, rope, attend_in(layer))
    return norm(x, w.norm, w.norm_bias, c.norm_eps)


def decode(c: GPTConfig, w, newest, lengths, alive, cache, rope, dtype):
    """trunk for the newest token (n,) of each row, at position lengths - 1, by the kernels of a decoding step: hidden (n, C) in
    dtype. A layer is four products and four launches; its keys and values go into cache (layers, 2, n, K, width, D)."""
    x, delta, eps = F.embedding(newest, w.embed), None, c.norm_eps
    if c.positions == "learned":
        x = x + F.embedding(lengths - 1, w.positions)
    for weights, kv in zip(w.blocks, cache):
        x, h = add_norm(x, delta, weights.norm1, weights.norm1_bias, eps, dtype)     # the residual stream stays in fp32
        qkv = F.linear(h, weights.qkv, weights.qkv_bias)                             # (n, (H + 2 K) D)
        y = decode_attention(qkv, kv, lengths, alive, rope, weights.q_norm, weights.k_norm, eps)
        x, h = add_norm(x, F.linear(y, weights.out, weights.out_bias), weights.norm2, weights.norm2_bias, eps, dtype)
        h = activation(F.linear(h, weights.up, weights.up_bias), c.mlp == "swiglu")
        delta = F.linear(h, weights.down, weights.down_bias)
    return add_norm(x, delta, w.norm, w.norm_bias, eps, dtype)[1]


@cache
def compiled_block():
    """`block` with all that lies between its products in a few kernels; compiled once for all layers and lengths."""
    torch._dynamo.config.specialize_int = True          # the model's sizes are constants, rows and tokens are not
    return torch.compile(block, dynamic=True)


class GPT(nn.Module):
    """gpt(tokens (B, T)) -> hidden (B, T, C) after the final norm; the scripts apply `head_weight` in chunks."""
    compiled = False                    # whether forward takes the compiled block; one switch for all models, as the next
    checkpointed = False                # whether training keeps the input of each layer only
    sharded = False                     # whether the weights that are trained are spread over several processes

    def __init__(self, config: GPTConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Parameter(torch.randn(c.vocab_size, c.n_embd) * c.init_std)
        places = nn.Parameter(torch.randn(c.max_len, c.n_embd) * c.init_std) if c.positions == "learned" else None
        self.register_parameter("positions", places)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.Parameter(torch.ones(c.n_embd))
        self.register_parameter("norm_bias", nn.Parameter(torch.zeros(c.n_embd)) if c.norm == "layer" else None)
        own_head = None if c.tied_head else nn.Parameter(torch.randn(c.vocab_size, c.n_embd) * c.init_std)
        self.register_parameter("head", own_head)
        self.value_head = nn.Linear(c.n_embd, 1) if c.value_head else None

    def forward(self, tokens):
        c, T = self.config, tokens.shape[1]
        if T > c.max_len:
            raise InputError(f"rows of {T} tokens do not fit into the context of {c.max_len}")
        places = torch.arange(T, device=tokens.device)[None]
        layer, again = compiled_block() if self.compiled else block, self.checkpointed and torch.is_grad_enabled()
        return trunk(c, self, tokens, places, rope_table(c, T, tokens.device), lambda number: causal_attention,
                     lambda c, w, x, rope, attend: w(layer, c, x, rope, attend, again))

    @property
    def head_weight(self):
        """(V, C), the embedding itself if the head is tied."""
        return self.embed if self.head is None else self.head

    def frozen(self):
        """A copy that is not trained, for the reference of a KL. On a GPU the matrices of its layers are in bf16: autocast would
        round them to that each time, so the numbers are the same, in half of the memory."""
        ref = copy.deepcopy(self).requires_grad_(False)
        for name, p in ref.blocks.named_parameters():
            if p.is_cuda and "norm" not in name:
                p.data = p.data.bfloat16()
        return ref

    def logits(self, tokens):
        """(B, T) -> (B, T, V), all of it in memory: for tests and small uses."""
        return F.linear(self(tokens), self.head_weight)

    def add_value_head(self):
        """A linear value head on the trunk's hidden state that starts at 0: a random one would pull at the trunk before the
        policy has learned anything."""
        self.value_head = nn.Linear(self.config.n_embd, 1).to(self.embed.device)
        nn.init.zeros_(self.value_head.weight), nn.init.zeros_(self.value_head.bias)
        self.config.value_head = True

    def values(self, hidden):
        """hidden (B, T, C) -> V(s_t) (B, T), in fp32 also under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)


def training_memory(c: GPTConfig, tokens: int, cached: int, trained=1, checkpointed=False, mixed=True, shards=1) -> dict:
    """Bytes that a process needs to train a GPT in fp32 with AdamW beside a frozen reference, by what they are for: micro-batches
    of so many tokens, padding included, and rollouts of which so many tokens are cached at a time. trained: models, 2 with a critic
    of its own. mixed: products in bf16, as on a GPU; then "copies" are the weights in bf16. shards: processes over which FSDP
    spreads what it can; "gathered" is what of that is whole at a time. "least" is what has to fit together, of an update or of a
    rollout, whose cache may be cut in pieces. The activations are what autograd keeps, counted, and a layer's worth of gradients;
    what CUDA takes for itself comes on top.
    """
    with torch.device("meta"):
        gpt = GPT(c)
    total, layers = (sum(p.numel() for p in part.parameters()) for part in (gpt, gpt.blocks))
    matrices = sum(p.numel() for name, p in gpt.blocks.named_parameters() if "norm" not in name)
    width, gated, spread = 2 if mixed else 4, c.mlp == "swiglu", shards > 1
    heads = (3 * c.n_head + 2 * c.n_kv_head) * c.head_dim           # q, k, v, and what attention makes of them, twice
    layer = (16 if gated else 8) * c.n_embd + width * (2 * c.n_embd + heads + (4 if gated else 2) * c.n_inner)       # a token's
    layer += 10 * (c.n_head + c.n_kv_head) * c.head_dim if c.qk_norm else 0
    kept = c.n_layer * (4 * c.n_embd if checkpointed else layer) + layer + 12 * c.n_embd
    head = 4 * c.vocab_size * c.n_embd + 2 ** 28 if mixed else 12 * min(tokens * c.vocab_size, 2 ** 24)              # its gradient
    copies = (4 - width) * matrices
    found = {"parameters": total, "weights": 4 * trained * total / shards, "gradients": 4 * trained * total / shards,
             "optimiser": 8 * trained * total / shards,
             "reference": 4 * total / shards if spread else 4 * total - copies,
             "gathered": spread * 4 * ((2 * trained + 1) * (total - layers) + 3 * layers / c.n_layer),
             "copies": copies + (4 - width) * c.vocab_size * c.n_embd,
             "cache": cached * c.n_layer * 2 * c.n_kv_head * c.head_dim * width, "activations": trained * tokens * kept + head}
    always = found["weights"] + found["optimiser"] + found["reference"] + found["gathered"]
    in_use = copies / c.n_layer if spread and checkpointed else copies              # by the layers of a forward pass
    return found | {"least": always + max(found["gradients"] + in_use + found["activations"], found["copies"])}


# ----------------------------------------------------------------------------------------------------------- generation
class Recorded:
    """A decoding step that is one launch in place of hundreds from its second call on: the first runs it as it is, the
    warm-up that capturing asks for, the second captures it, and every call but the first replays what was captured.

    A graph holds addresses and owns nothing. So it lives beside its step, which owns all that lies there, except for what
    a run of the step makes and drops: that lies in the pool that was given to capture."""

    def __init__(self, step, capture):
        self.step, self.capture = step, capture
        self.is_warm, self.graph = False, None

    def __call__(self):
        if not self.is_warm:
            self.is_warm = True
            return self.step()
        if self.graph is None:
            self.graph = self.capture(self.step)
        self.graph.replay()


def cuda_graph(pool, step):
    """step as a CUDA graph, captured and not run, with its intermediate tensors in pool."""
    graph, side, current = torch.cuda.CUDAGraph(), side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        graph.capture_begin(pool.id)        # torch.cuda.graph would empty the allocator's cache first, at each capture
        try:
            step()
        finally:
            graph.capture_end()
    current.wait_stream(side)               # capturing reset the random generator's counters over there
    return graph


@cache
def side_stream(device: int):
    """The stream to capture on. One for good: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


# steps between looks at who has ended; the smallest batch, where batches are powers of two (None: any size); the columns by
# which the visible cache grows; how a step is captured. On CUDA a look is a sync and a new shape is a new graph, on a CPU
# both are free
SCHEDULE = dict(cpu=(1, None, 8, None), cuda=(32, 16, 256, cuda_graph))


def whole(p):
    """The tensor p; of one whose parts lie with several processes, as FSDP leaves them, all of it: each of them must ask."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def decoding_weights(gpt: GPT, dtype, device):
    """The same names as in gpt, detached, whole, the matrices in dtype: look-ups, casts and gathering are paid once a call."""
    def lean(module):
        return {name: p if p is None else whole(p if "norm" in name or name in ("embed", "positions") else p.to(dtype)).to(device)
                for name, p in module._parameters.items()}
    return SimpleNamespace(**lean(gpt) | {"head": whole(gpt.head_weight.to(dtype)).to(device)},
                           blocks=[SimpleNamespace(**lean(b)) for b in gpt.blocks])


def free_memory(device) -> float:
    """Bytes that tensors can still take: what the device has left and what the allocator holds for nobody."""
    if device.type == "cpu":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def rows_at_once(gpt: GPT, rows: int, longest: int, width: int, device) -> int:
    """How many of the rows `generate` takes at a time: all, or equal parts whose cache of width columns, prefill and sampling
    fit into free memory."""
    c = gpt.config
    itemsize, heads = 4 if device.type == "cpu" else 2, c.n_head + 2 * c.n_kv_head
    row = 2 * c.n_layer * c.n_kv_head * c.head_dim * width * itemsize                # the cache
    row += 16 * longest * (c.n_embd + c.n_inner + heads * c.head_dim)                # what one layer of the prefill makes
    row += 64 * c.vocab_size                            # logits up to their sums in fp64, once outside and once inside a graph
    weights = itemsize * sum(p.numel() for p in gpt.parameters())
    fitting = max(1, int(min(rows, 0.9 * (free_memory(device) - weights) / row)))
    n = math.ceil(rows / math.ceil(rows / fitting))
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < n * row + weights:
        torch.cuda.empty_cache()                        # while capturing, the allocator cannot give back what it holds
    return n


def draw_tokens(logits, greedy):
    """sample_tokens in plain torch, with the device's generator: token, log-prob and whether all is finite, of logits (n, V)."""
    finite = logits.sum(-1).isfinite()                  # a NaN or an infinity stays in it
    probs = logits.softmax(-1)
    if greedy:
        new = logits.argmax(-1)
    else:
        # invert the cumulative distribution, in double: exact for rare tokens too, and one random number a row
        cdf = probs.cumsum(-1, dtype=torch.float64)
        u = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device) * cdf[:, -1:]
        new = torch.searchsorted(cdf, u, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return new, probs.gather(1, new[:, None])[:, 0].log(), finite


def generate(gpt: GPT, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, group_size: int = 1, device=None):
    """Sample group_size responses to each prompt: tokens (B, T), response_mask (B, T-1) and the log-probs (B, T-1) with which
    the tokens of the responses were drawn, in the layout at the top of this file; B = len(prompts) * group_size, the rows of
    a prompt are adjacent, T is the longest row.

    A row ends with eos_id (in the mask) or after max_new_tokens. temperature 0 takes the most likely token; another than 1
    counts in the log-probs too. device: where, if not where the weights are. Draws hang on that device's global random
    generator. Raises InputError if a prompt is empty or prompt and response do not fit into the context, FloatingPointError if
    a logit was not finite.
    """
    longest = max(map(len, prompts), default=0)
    if not prompts or not all(prompts) or min(max_new_tokens, group_size) < 1:
        raise InputError("generate: an empty prompt, or no prompt, or max_new_tokens or group_size below 1")
    if longest + max_new_tokens > gpt.config.max_len:
        raise InputError(f"{longest} prompt tokens and {max_new_tokens} new tokens exceed the context of {gpt.config.max_len}")
    rows = [prompt for prompt in map(tuple, prompts) for _ in range(group_size)]
    device = torch.device(device or gpt.embed.device)
    n = rows_at_once(gpt, len(rows), longest, longest + max_new_tokens, device)
    with torch.inference_mode():
        # once, not for each of the parts: with FSDP all processes gather them, and each takes as many parts as its memory asks for
        w = decoding_weights(gpt, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        parts = [_generate(gpt.config, w, rows[i:i + n], max_new_tokens, temperature, device) for i in range(0, len(rows), n)]
        T = max(part[0].shape[1] for part in parts)
        tokens, logprobs = (torch.cat([F.pad(part[i], (0, T - part[i].shape[1]), value=filler) for part in parts])
                            for i, filler in ((0, gpt.config.pad_id), (3, 0.0)))
        prompt_lengths, lengths = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    t = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    response_mask = (t >= prompt_lengths[:, None] - 1) & (t < lengths[:, None] - 1)
    return tokens.clone(), response_mask, logprobs[:, 1:].clone()    # a clone made here is an ordinary tensor: autograd takes it


def _generate(c, w, prompts, max_new_tokens, temperature, device):
    """One sample to each of the prompts (tuples), all at once, by weights w as decoding_weights() gives them: tokens (B, T),
    prompt_lengths (B,), lengths (B,) and the log-probs (B, T) with which the tokens of the response were drawn."""
    on_cuda, (look_every, smallest, granule, capture) = device.type == "cuda", SCHEDULE[device.type]
    longest = max(map(len, prompts))
    dtype, fused = w.head.dtype, use_triton(w.embed)
    width = longest + max_new_tokens
    rope = rope_table(c, width, device)

    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    source = torch.tensor([distinct[p] for p in prompts], device=device)             # (B,)
    padded = torch.tensor([[*p, *[c.pad_id] * (longest - len(p))] for p in distinct], device=device)
    prompt_lengths = torch.tensor([len(p) for p in distinct], device=device)

    # the state of a row: rows that go on are always the first n, so every step works on plain slices
    B = len(source)
    tokens = torch.full((B, width), c.pad_id, device=device)
    tokens[:, :longest] = padded[source]
    lengths = prompt_lengths[source]                    # tokens in the row so far
    alive = torch.ones(B, dtype=torch.bool, device=device)
    order = torch.arange(B, device=device)              # which row of the result
    logprobs = torch.zeros(B, width, device=device)     # of the tokens that were drawn, at their places
    healthy = torch.ones(B, dtype=torch.bool, device=device)         # all logits were finite so far
    seed = torch.randint(2 ** 63 - 1, (), device=device) if fused else None
    # zeros, not empty: a masked key still multiplies its value by 0, and 0 * NaN = NaN
    kv = torch.zeros(c.n_layer, 2, B, c.n_kv_head, width, c.head_dim, dtype=dtype, device=device)

    def add_tokens(n, hidden):
        """Sample the next token of the first n rows from hidden (n, C) and append it."""
        if on_cuda:
            logits = torch.mm(hidden.to(dtype), w.head.t(), out_dtype=torch.float32)     # bf16 logits would be too coarse
        else:
            logits = F.linear(hidden, w.head)
        if temperature not in (0, 1):
            logits = logits / temperature
        if fused:
            new, logprob, finite = sample_tokens(logits, seed, lengths[:n], order[:n], greedy=temperature == 0)
        else:
            new, logprob, finite = draw_tokens(logits, greedy=temperature == 0)
        healthy[:n] &= finite
        new = torch.where(alive[:n], new, c.pad_id)
        tokens[:n].scatter_(1, lengths[:n, None], new[:, None])
        logprobs[:n].scatter_(1, lengths[:n, None], logprob[:, None])
        lengths[:n] += alive[:n]                        # an ended row stands still until it leaves
        alive[:n] &= new != c.eos_id

    def prefill_attention(layer, q, k, v):
        for cached, x in zip(kv[layer], (k, v)):
            cached[:, :, :longest] = x.transpose(1, 2)[source]      # a prompt is computed once and shared out
        return causal_attention(q, k, v)

    def decode_step(n, columns):
        """A function that takes the first n rows one token further, attending to the first columns of the cache only; the
        kernels attend to a row's own columns anyway."""
        rows, places = torch.arange(n, device=device), torch.arange(columns, device=device)
        caches = [(*layer[:, :n], *layer[:, :n, :, :columns]) for layer in kv]       # views, made once

        def attend(layer, visible, at, q, k, v):
            keys, values, seen_keys, seen_values = caches[layer]
            keys[rows, :, at], values[rows, :, at] = k[:, 0].to(dtype), v[:, 0].to(dtype)
            # the query heads that share a key head are as good as several queries in one row
            q = q[:, 0].unflatten(1, (c.n_kv_head, -1))                              # (n, K, H / K, D)
            y = F.scaled_dot_product_attention(q, seen_keys, seen_values, attn_mask=visible)
            return y.reshape(n, 1, -1)                  # reshape: in which order y lies in memory is up to the backend

        def step():
            at = lengths[:n] - 1                        # where the newest tokens are
            visible = (places <= at[:, None])[:, None, None]                         # (n, 1, 1, columns)
            newest = tokens[:n].gather(1, at[:, None])
            add_tokens(n, trunk(c, w, newest, at[:, None], rope, lambda layer: partial(attend, layer, visible, at))[:, 0])

        def fused_step():
            newest = tokens[:n].gather(1, lengths[:n, None] - 1)[:, 0]
            add_tokens(n, decode(c, w, newest, lengths[:n], alive[:n], kv[:, :, :n], rope, dtype))

        return fused_step if fused else step

    def drop_ended(n):
        """Swap ended rows behind those that go on; how many rows the next steps take. The only device-to-host sync of the
        loop."""
        fewer = left = int(alive[:n].sum())
        if left and smallest:
            fewer = min(n, max(smallest, 1 << (left - 1).bit_length()))              # few sizes, few graphs
        if fewer == n:
            return n
        holes, movers = (~alive[:left]).nonzero()[:, 0], alive[left:n].nonzero()[:, 0] + left
        here, there = torch.cat((holes, movers)), torch.cat((movers, holes))
        for x in (tokens, lengths, alive, order, logprobs):
            x[here] = x[there]
        for layer in kv:
            layer[:, holes] = layer[:, movers]
        return fewer

    # the matrices are bf16 already: autocast rounds where it does in training and leaves the residual stream in fp32
    with (torch.autocast(device.type, torch.bfloat16, enabled=on_cuda, cache_enabled=False),
          torch.cuda.device(device) if on_cuda else nullcontext()):                      # a graph is of the current device
        hidden = trunk(c, w, padded, torch.arange(longest, device=device)[None], rope,
                       lambda layer: partial(prefill_attention, layer))
        ends = hidden[torch.arange(len(distinct), device=device), prompt_lengths - 1]
        add_tokens(B, ends[source])
        n, done, shape = drop_ended(B), 1, None
        pool = torch.cuda.MemPool() if on_cuda else None            # all graphs of a call share it: one runs at a time
        recorded = []                                   # all stay until the end: a pool that no graph uses takes no other one
        while n and done < max_new_tokens:
            columns = width if fused else min(width, math.ceil((longest + done) / granule) * granule)
            if shape != (n, columns):
                shape, step = (n, columns), decode_step(n, columns)
                if capture:
                    step = Recorded(step, partial(capture, pool))
                    recorded.append(step)
            for _ in range(min(look_every, columns - longest - done + 1, max_new_tokens - done)):
                step()
                done += 1
            n = drop_ended(n)
        step = recorded = None                          # graphs go before their pool, whose memory the device gets back

    if not healthy.all():
        raise FloatingPointError("generate: the model gave logits that are NaN or infinite")
    back = order.argsort()
    T = int(lengths.max())
    return tokens[back, :T], prompt_lengths[source], lengths[back], logprobs[back, :T]


# ------------------------------------------------------------------------------------------------------------ tokenizer
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NAMED = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"     # to a chat template
METASPACE = "\u2581"                                    # SentencePiece's space
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200b)))

# tokenizer.json's patterns are written for Oniguruma. What may stand in one, outside and inside of [..], and how the package
# regex writes the same: None if likewise, else a text or a function of the match. All else is refused
WORD = r"[[\w²³¹¼½¾]--[\u200c\u200d]]"                  # Oniguruma's \w, which in a class lacks ²³¹¼½¾
EVERYWHERE = {
    r"\\[sSdDrntfv]": None, r"\\h": "[0-9A-Fa-f]", r"\\H": "[^0-9A-Fa-f]",
    r"\\([pP])\{(\^?)(\w\w?)\}": lambda m: rf"\{m[1]}{{{m[2]}gc={m[3]}}}",              # a general category
    r"\\([pP])\{(\^?)(\w+)\}": lambda m: rf"\{m[1]}{{{m[2]}sc={m[3]}}}",                # a script
    r"\\u([0-9A-Fa-f]{4})|\\x([0-7][0-9A-Fa-f])": lambda m: regex.escape(chr(int(m[1] or m[2], 16))),
    r"\\x\{(0*[0-9A-Fa-f]{1,5})\}": lambda m: regex.escape(chr(int(m[1], 16))),
    r"\\([!-/:-@\[-`{-~ ])": lambda m: regex.escape(m[1])}
OUTSIDE = {
    r"\[(?!\^?\])\^?": None, r"\(\?(?:[:=!>]|<[=!])": None, r"\((?!\?)": "(?:", r"[)|*+?]": None,
    r"\(\?i:(?:[a-zA-Z'|]|\[[a-zA-Z]+\])*\)": None,     # the 's, 't, 're of English; more depends on who folds the case
    r"\{\d+\}(?![?+])|\{\d+,\d*\}\??(?!\+)": None, r"\{(,\d+\}\??)(?!\+)": lambda m: "{0" + m[1],
    r"\.": r"[^\n]", r"\^": r"(?:\A|(?<=\n)(?!\Z))", r"\$": r"(?=\n|\Z)", r"\\A": None, r"\\z": r"\Z", r"\\Z": r"(?=\n?\Z)",
    r"\\w": WORD, r"\\W": f"[^{WORD}]", r"\\b": f"(?:(?<={WORD})(?!{WORD})|(?<!{WORD})(?={WORD}))",
    r"[^\\(){}\[]": lambda m: regex.escape(m[0])}
INSIDE = {
    r"\\w": r"[\w--[\u200c\u200d]]", r"\\W": r"[^\w--[\u200c\u200d]]",
    r"\[:digit:\]": r"\d", r"\[:space:\]": r"\s", r"\[:alpha:\]": r"\p{Alphabetic}", r"\[(?!\^?\]|:)\^?|\]|&&": None,
    r"-(?!-)": None, r"(?!--|~~|\|\|)[^\\\[\]]": lambda m: regex.escape(m[0])}
DIALECT = [[(re.compile(part), new) for part, new in rules.items()] for rules in (EVERYWHERE | OUTSIDE, EVERYWHERE | INSIDE)]


def _translated(pattern: str) -> str:
    """tokenizer.json's pattern as one of the package regex, without captures. ValueError for what has no counterpart there."""
    at, depth, parts = 0, 0, []                         # depth of nested [..]
    while at < len(pattern):
        found = ((match, new) for part, new in DIALECT[depth > 0] if (match := part.match(pattern, at)))
        match, new = next(found, (None, None))
        if match is None:
            raise ValueError(f"{pattern[at:at + 8]!r} in the pattern {pattern!r}")
        parts.append(new(match) if callable(new) else new or match[0])
        depth += (match[0] in ("[", "[^")) - (match[0] == "]" and depth > 0)
        at = match.end()
    return "".join(parts)


def _splitter(pattern: str, keep_rest=True):
    """text -> what matches tokenizer.json's pattern and, unless it is dropped, what lies between; some may be empty."""
    pattern = _translated(pattern)
    return regex.compile(f"({pattern})", regex.V1).split if keep_rest else regex.compile(pattern, regex.V1).findall


def _quoted(text: str) -> str:
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)


def _steps(part: dict | None, name: str) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or post-processor of tokenizer.json: none, one, or those of a Sequence."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in the vocabulary of a byte-level BPE."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def _merge(symbols: str, ranks: dict) -> list[str]:
    """Join neighbours in the order of the merges, the first pair from the left where one merge fits several."""
    parts, n = list(symbols), len(symbols)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))           # neighbours among the parts that are left
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == n or ranks.get((parts[i], parts[j])) != rank:               # one of the two has been joined to another
            continue
        parts[i], parts[j] = parts[i] + parts[j], ""
        after[i] = k = after[j]
        if k < n:
            before[k] = i
        for left, right in ((before[i], i), (i, k)):
            if left >= 0 and right < n and (new := ranks.get((parts[left], parts[right]))) is not None:
                heapq.heappush(heap, (new, left))
    return [part for part in parts if part]


def _ranks_decide(ranks: dict) -> bool:
    """Whether joining by the rank of the joined token, as tiktoken does, gives what the listed merges give: each token has one
    merge, and no pair across the seam of its halves has its turn while these are made."""
    made = {left + right: (rank, left, right) for (left, right), rank in ranks.items()}
    for (left, right), limit in ranks.items():
        first = second = 0
        while first >= 0 or second >= 0:
            if made.get(left + right, (limit,))[0] < limit:
                return False
            (first, _, left_end), (second, right_start, _) = made.get(left, (-1, "", "")), made.get(right, (-1, "", ""))
            # back to before the later of the last joins; of two equal ones the right one came later, so a pair before it wins
            limit, left, right = (first, left_end, right) if first > second else (second + 1, left, right_start)
    return len(made) == len(ranks)


def _cut_out(text: str, finder, special=False):
    """The text cut at added tokens, with special=True also at those: a text, then in turn an id and a text; texts may be empty."""
    done, (pattern, tokens, plain) = 0, finder
    for match in pattern.finditer(text) if plain or special and tokens else ():
        token, (start, end) = tokens[match[0]], match.span()
        in_word = regex.match(r"\w", text[start - 1:start]) or regex.match(r"\w", text[end:end + 1])
        if token.get("special") and not special or token.get("single_word") and in_word:
            continue
        if token.get("lstrip"):
            start = max(done, len(text[:start].rstrip(SPACES)))
        if token.get("rstrip"):
            end = len(text) - len(text[end:].lstrip(SPACES))
        if start >= end:                                # a token of spaces that the one before has taken in
            continue
        yield text[done:start]
        yield token["id"]
        done = end
    yield text[done:]


class Tokenizer:
    """BPE over bytes, or over characters with bytes for those that the vocabulary lacks (Llama 2), with the ids of the
    checkpoint's own tokenizer on any text.

    encode adds no BOS or EOS and reads special tokens in a text as plain text; decode spells special tokens out and
    replaces incomplete UTF-8. bos_ids: what the checkpoint puts before every text, so what a prompt starts with. space:
    the bytes that encode puts before a text and decode takes away again, b" " for Llama 2. files: the checkpoint's
    tokenizer files, name -> content, written back as they came.
    """

    def __init__(self, files: dict[str, str], source="tokenizer.json"):
        self.files, self.source = files, source
        self.model_vocab_size = math.inf                # how many ids the model has, set by load_checkpoint
        self._piece_ids = cache(self._encode_piece)     # texts have few different pieces
        spec = _parse(files["tokenizer.json"], source)
        self._settings = _parse(files.get("tokenizer_config.json", "{}"), Path(source).with_name("tokenizer_config.json"))
        try:
            self._read_normalizer(spec.get("normalizer"))
            self._read_model(spec["model"])
            self._read_splits(spec.get("pre_tokenizer"), spec["model"])
            self._read_added(spec.get("added_tokens") or [])
            self.bos_ids = self._first_ids(spec.get("post_processor"))
            self.max_id = max(self._usable)             # of all that encode can give
            self._named = {name: token["content"] if isinstance(token, dict) else token
                           for name in NAMED if (token := self._settings.get(name))}
            texts = map(self._named.get, ("eos_token", "pad_token"))
            self.eos_id, self.pad_id = (self._added.get(text, self._vocab.get(text)) for text in texts)
        except InputError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, regex.error) as error:
            raise InputError(f"{source}: not readable as a tokenizer ({type(error).__name__}: {error})") from error
        self.pad_id = self.eos_id if self.pad_id is None else self.pad_id

    @classmethod
    def from_file(cls, path):
        """path: a tokenizer.json; the end and pad tokens come from the tokenizer_config.json beside it."""
        path = Path(path)
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        return cls({n: _read(path.with_name(n)) for n in names if n == path.name or path.with_name(n).exists()}, path)

    @classmethod
    def from_pieces(cls, pieces: list[str], eos: str = "<eos>"):
        """A vocabulary that is just this list, longest piece first wherever a text could go on in two ways; id = index,
        eos comes last and is the filler too. A text with anything else in it raises InputError."""
        alphabet = _byte_alphabet()
        vocab = {"".join(alphabet[b] for b in piece.encode()): i for i, piece in enumerate(pieces)}
        if len(vocab) < len(pieces) or "" in vocab or eos in pieces:
            raise InputError("the pieces of a vocabulary must be different, not empty and not the end token")
        longest_first = "|".join(map(_quoted, sorted(pieces, key=len, reverse=True)))
        split = dict(type="Split", pattern={"Regex": longest_first}, behavior="Isolated", invert=False)
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
        added = dict(id=len(pieces), content=eos, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
        # no merges: every piece that the split cuts out is looked up whole
        bpe = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, ignore_merges=True, vocab=vocab, merges=[])
        spec = dict(version="1.0", truncation=None, padding=None, added_tokens=[added], normalizer=None, post_processor=None,
                    pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]), decoder=level, model=bpe)
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=eos, pad_token=eos,
                        clean_up_tokenization_spaces=False)
        files = {"tokenizer.json": spec, "tokenizer_config.json": settings}
        return cls({name: json.dumps(content, indent=1) for name, content in files.items()}, "the built-in vocabulary")

    def _refuse(self, what):
        raise InputError(f"{self.source}: {what}; supported: byte-level BPE (as in GPT-2, Llama 3, Qwen, SmolLM2) and "
                         "SentencePiece's BPE with byte fallback (Llama 2)")

    def _read_normalizer(self, normalizer):
        self._normalizers, self.space = [], b""
        for step in _steps(normalizer, "normalizers"):
            kind = step["type"]
            if kind in ("NFC", "NFD", "NFKC", "NFKD"):
                self._normalizers.append(partial(unicodedata.normalize, kind))
            elif kind == "Prepend" and step["prepend"] == METASPACE:
                self._normalizers.append(lambda text: text and METASPACE + text)
                self.space = b" "
            elif kind == "Replace" and "String" in step["pattern"]:
                self._normalizers.append(lambda text, old=step["pattern"]["String"], new=step["content"]: text.replace(old, new))
            else:
                self._refuse(f"normalizer {kind}")

    def _normalize(self, text):
        for change in self._normalizers:
            text = change(text)
        return text

    def _read_model(self, model):
        if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            self._refuse(f"a {model.get('type')} tokenizer, or one with a prefix or suffix inside words")
        if model.get("dropout"):
            self._refuse(f"dropout {model['dropout']} of merges")
        self._vocab, self._ignore_merges = model["vocab"], bool(model.get("ignore_merges"))
        if not all(type(i) is int and i >= 0 for i in self._vocab.values()):
            self._refuse("an id that is not a whole number")
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        # every id that encode can give
        self._usable = {self._vocab[part] for left, right in self._ranks for part in (left, right, left + right)}
        if self._ignore_merges:
            self._usable |= set(self._vocab.values())

    def _read_splits(self, pre_tokenizer, model):
        """What cuts a text into the pieces inside of which merges join."""
        *steps, last = _steps(pre_tokenizer, "pretokenizers") or [{"type": "none"}]
        self._bpe = None                                # tiktoken, where it gives the same as the merges
        self._scheme = None                             # before which texts a Metaspace puts a space: always, first, never
        if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
            self._alphabet = _byte_alphabet()
            self._usable |= {self._vocab[char] for char in self._alphabet if char in self._vocab}
            table = {ord(char): b for b, char in enumerate(self._alphabet)}
            self._bytes = {}                            # id -> bytes
            for token, i in self._vocab.items():
                try:
                    self._bytes[i] = token.translate(table).encode("latin-1")
                except UnicodeEncodeError:              # not made of bytes: a special token listed in the vocabulary
                    self._bytes[i] = token.encode()
            if _ranks_decide(self._ranks):
                self._parts = self._alphabet + [left + right for left, right in self._ranks]
                joined = {part.translate(table).encode("latin-1"): rank for rank, part in enumerate(self._parts)}
                self._bpe = tiktoken.Encoding("merges", pat_str=r"[\s\S]+", mergeable_ranks=joined, special_tokens={})
            self._splits = [self._read_split(step) for step in steps]
            if last.get("use_regex", True):
                self._splits.append(_splitter(GPT2_SPLIT))
        elif model.get("byte_fallback") and not steps and last["type"] in ("none", "Metaspace"):
            self._alphabet = None
            self._fallback = [self._vocab[f"<0x{b:02X}>"] for b in range(256)]
            self._usable |= {*self._fallback, *(i for token, i in self._vocab.items() if len(token) == 1)}
            self._bytes = {i: token.replace(METASPACE, " ").encode() for token, i in self._vocab.items()}
            self._bytes |= {i: bytes([b]) for b, i in enumerate(self._fallback)}
            if last["type"] == "Metaspace":
                self._scheme = last.get("prepend_scheme") or ("always" if last.get("add_prefix_space", True) else "never")
                self.space = b"" if self._scheme == "never" else b" "
                if last["replacement"] != METASPACE:
                    self._refuse(f"a Metaspace of {last['replacement']!r}")
            if last.get("split", last["type"] == "Metaspace"):
                self._splits = [_splitter(f"{METASPACE}[^{METASPACE}]*")]
            else:
                # the text is one piece; where no merge reaches over a space from the left, its words give the same ids
                whole = self._ignore_merges or any(right[0] == METASPACE != left[-1] for left, right in self._ranks)
                self._splits = [] if whole else [_splitter(f"{METASPACE}+[^{METASPACE}]*")]
        else:
            self._refuse(f"pre-tokenizer {last['type']} at the end, or ByteLevel with a prefix space")

    def _read_split(self, step):
        if step["type"] == "Digits":
            return _splitter(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        kind, behavior = step["type"], step.get("behavior")
        # the second is how tiktoken's patterns are written at times: what lies between the matches is dropped
        if kind != "Split" or behavior != "Isolated" and (behavior, step["invert"]) != ("Removed", True):
            self._refuse(f"pre-tokenizer {kind} {behavior or ''}")
        pattern, literal = step["pattern"].get("Regex"), step["pattern"].get("String")
        try:
            return _splitter(pattern if literal is None else _quoted(literal), keep_rest=behavior == "Isolated")
        except (ValueError, regex.error) as error:
            self._refuse(f"the pattern {pattern!r} ({error})")

    def _read_added(self, added):
        self._added = {token["content"]: token["id"] for token in added if token["content"]}
        self._bytes |= {i: text.encode() for text, i in self._added.items()}
        self.vocab_size = max(self._bytes) + 1
        # what is added but not special ("<think>" of Qwen3) is one token wherever it stands, in the text as it is or, if
        # "normalized", in the normalised one. A special one is plain text, but no other begins inside of it
        self._finders = []
        for stage in (False, True):
            tokens = {self._normalize(t["content"]) if stage else t["content"]: t
                      for t in added if t["content"] and bool(t.get("normalized")) == stage}
            longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
            plain = {token["id"] for token in tokens.values() if not token.get("special")}
            self._finders.append((re.compile(longest_first), tokens, bool(plain)))
            self._usable |= plain
        self._special = {token["content"] for token in added if token["content"] and token.get("special")}

    def _first_ids(self, post_processor):
        """What the post-processor puts before a text. What it puts after one is left to the scripts, as the end token."""
        first = []
        for step in _steps(post_processor, "processors"):
            if step["type"] == "TemplateProcessing":
                before = itertools.takewhile(lambda item: "SpecialToken" in item, step["single"])
                own = [i for item in before for i in step["special_tokens"][item["SpecialToken"]["id"]]["ids"]]
            elif step["type"] in ("RobertaProcessing", "BertProcessing"):
                own = [step["cls"][1]]
            elif step["type"] == "ByteLevel":
                own = []
            else:
                self._refuse(f"post-processor {step['type']}")
            first = own + first                         # a later step goes around what the ones before it gave
        if not all(type(i) is int and i >= 0 for i in first):
            self._refuse("an id that is not a whole number")
        return first

    def encode_prompt(self, text: str) -> list[int]:
        """bos_ids, then the text: what a row starts with. Raises InputError if the model has no embedding for a BOS."""
        if max(self.bos_ids, default=0) >= self.model_vocab_size:
            raise InputError(f"{self.source}: every text starts with the id {max(self.bos_ids)}, the model has "
                             f"{self.model_vocab_size} ids")
        return self.bos_ids + self.encode(text)

    def encode(self, text: str, goes_on: bool = False) -> list[int]:
        """goes_on: other text came before, up to a line break, so that Llama 2's tokenizers put no space first. Raises
        InputError if the vocabulary has no token for a character (small vocabularies only)."""
        return self._encode("\n" + text)[len(self._encode("\n")):] if goes_on and self.space else self._encode(text)

    def encode_chat(self, messages: list[dict], begun: str = "") -> list[int]:
        """A conversation [{"role": ..., "content": text}, ...] in the checkpoint's chat template, up to where the assistant
        has its next turn, and the text with which that turn has begun. Special tokens that the template writes become their
        ids; in the messages they, and other added tokens of the template, are plain text.

        Where one message has the content None, an answer yet to be sampled, only what follows its end token. Raises InputError
        if there is no template or it cannot be rendered.
        """
        given = begun + "".join(message["content"] or "" for message in messages)
        free = (c for c in map(chr, range(0xe000, 0xf900)) if c not in given)            # characters of private use
        answer = next(free)
        control = self._special | {token for token in self._added if token in self._chat_template and token.strip()}
        hidden = {next(free): token for token in sorted(control, key=len, reverse=True) if token in given}
        hide = lambda text: reduce(lambda text, pair: text.replace(pair[1], pair[0]), hidden.items(), text)
        shown = [message | {"content": answer if message["content"] is None else hide(message["content"])} for message in messages]
        try:
            text = self._compiled_template.render(messages=shown, add_generation_prompt=True, tools=None, documents=None,
                                                  **self._named)
        except InputError:
            raise
        except Exception as error:                      # a template is a program: of another role, of its own raise_exception
            raise InputError(f"{self.source}: the chat template fails ({type(error).__name__}: {error})") from error
        if None in (message["content"] for message in messages):
            if answer not in text:
                raise InputError(f"{self.source}: the chat template leaves out the answers that it is given")
            text = text.rpartition(answer)[2]
            before, _, after = text.partition(self.decode([self.eos_id]))
            text = text if before.strip() else after    # as it stands where the template writes no end token behind an answer
        ids = self._encode(text + hide(begun), special=True, hidden=hidden)
        if max(ids, default=0) >= self.model_vocab_size:
            raise InputError(f"{self.source}: the chat template gives the id {max(ids)}, the model has {self.model_vocab_size} ids")
        return ids

    @cached_property
    def _chat_template(self) -> str:
        found = self.files.get("chat_template.jinja", self._settings.get("chat_template"))
        if isinstance(found, list):                     # several, by name
            found = next((template.get("template") for template in found if template.get("name") == "default"), None)
        if not isinstance(found, str):
            raise InputError(f"{Path(self.source).parent}: no chat template in tokenizer_config.json or chat_template.jinja")
        return found

    @cached_property
    def _compiled_template(self):
        """In the environment that transformers gives it: a template is a stranger's program."""
        try:
            from jinja2 import TemplateError, ext, sandbox
        except ImportError:
            raise InputError(f"{self.source}: the chat template needs jinja2 (pip install jinja2)") from None

        class Generation(ext.Extension):
            """{% generation %} ... {% endgeneration %}, which marks an answer, stands for what is in it."""
            tags = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(["name:endgeneration"], drop_needle=True)

        def raise_exception(message):
            raise TemplateError(message)

        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                            extensions=[ext.loopcontrols, Generation])
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)          # jinja2's own escapes for HTML
        environment.globals |= dict(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
        return environment.from_string(self._chat_template)

    def _encode(self, text, special=False, hidden={}):
        """hidden: {what stands in for a token that is plain text in its place: the token}; encoded apart, as in transformers."""
        ids, cut = [], (lambda text: re.split(f"([{''.join(hidden)}])", text)) if hidden else lambda text: [text]
        for i, given in enumerate(_cut_out(text, self._finders[0], special)):
            parts = _cut_out(self._normalize(given), self._finders[1], special) if isinstance(given, str) else [given]
            for j, part in enumerate(parts):
                if isinstance(part, int):               # an added token
                    ids.append(part)
                    continue
                for k, text in enumerate(cut(part)):
                    pieces = self._pieces(hidden.get(text, text), is_first=i == j == k == 0)
                    ids += itertools.chain.from_iterable(map(self._piece_ids, pieces))
        return ids

    def _pieces(self, text, is_first):
        if self._scheme:
            text = text.replace(" ", METASPACE)
            if text and text[0] != METASPACE and (self._scheme == "always" or is_first and self._scheme == "first"):
                text = METASPACE + text
        pieces = [text]
        for split in self._splits:
            pieces = itertools.chain.from_iterable(map(split, pieces))
        return filter(None, pieces)

    def _encode_piece(self, piece):
        piece = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")      # half a surrogate pair has no bytes
        symbols = "".join(self._alphabet[b] for b in piece.encode()) if self._alphabet else piece
        if self._ignore_merges and symbols in self._vocab:
            return [self._vocab[symbols]]
        ids, done = [], 0
        parts = map(self._parts.__getitem__, self._bpe.encode_ordinary(piece)) if self._bpe else _merge(symbols, self._ranks)
        for part in parts:
            if part in self._vocab:
                ids.append(self._vocab[part])
            elif self._alphabet:
                char = piece.encode()[done:].decode("utf-8", "replace")[0]
                raise InputError(f"{self.source}: the vocabulary has no token for {char!r}")
            else:
                ids += [self._fallback[b] for b in part.encode()]
            done += len(part)
        return ids

    def decode(self, ids: list[int], goes_on: bool = False) -> str:
        """The text, without the space that Llama 2's tokenizers put first; goes_on: other text came before, so they put none."""
        return b"".join(map(self.token_bytes, ids)).removeprefix(b"" if goes_on else self.space).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; nothing for an id that only pads the embedding."""
        return self._bytes.get(token, b"")

    def save(self, folder):
        for name, content in self.files.items():
            _write(Path(folder) / name, content.encode())


# ---------------------------------------------------------------------------------------------------------- checkpoints
# our parameter -> the tensors stacked in it, without ".weight" or ".bias"
LLAMA_NAMES = dict(
    embed="model.embed_tokens", norm="model.norm", head="lm_head", block="model.layers.",
    norm1="input_layernorm", norm2="post_attention_layernorm", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
    qkv="self_attn.q_proj self_attn.k_proj self_attn.v_proj", out="self_attn.o_proj",
    up="mlp.gate_proj mlp.up_proj", down="mlp.down_proj")
GPT2_NAMES = dict(
    embed="transformer.wte", positions="transformer.wpe", norm="transformer.ln_f", head="lm_head", block="transformer.h.",
    norm1="ln_1", norm2="ln_2", qkv="attn.c_attn", out="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj")
FAMILIES = dict(gpt2="GPT2LMHeadModel", llama="LlamaForCausalLM", qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")     # some editors put a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error


def _parse(text: str, source) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{source}: not a JSON object")
    return value


@contextmanager
def _becoming(path: Path):
    """A file that becomes path when it is whole: a kill in the middle leaves the old one, and a full disc nothing beside it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _write(path: Path, content: bytes):
    with _becoming(path) as temporary:
        temporary.write_bytes(content)


def _hf_parts(c: GPTConfig, name: str, shape) -> list[tuple[str, tuple]]:
    """The Hugging Face tensors, (name, shape), that our parameter of this name stacks along its rows."""
    names = GPT2_NAMES if c.family == "gpt2" else LLAMA_NAMES
    *stem, leaf = name.split(".")
    base, kind = (leaf[:-5], "bias") if leaf.endswith("_bias") else (leaf, "weight")
    parts = [f"{names['block']}{stem[1]}.{part}" if stem else part for part in names[base].split()]
    rows = [shape[0] // len(parts)] * len(parts)
    if len(parts) == 3:                                 # q, k, v
        rows = [c.head_dim * heads for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
    return [(f"{part}.{kind}", (r, *shape[1:])) for part, r in zip(parts, rows)]


def _is_transposed(name: str) -> bool:
    return re.search(r"\.c_\w+\.weight$", name) is not None          # GPT-2's Conv1D stores (in, out)


SIZE, NUMBER, FLAG = "a whole number above 0", "a number above 0", "true or false"      # what a value of config.json must be


def _read_config(raw: dict, path: Path) -> GPTConfig:
    """GPTConfig of a Hugging Face config.json, without the end token."""
    def refuse(what, supported):
        raise InputError(f"{path}: {what} is not supported; supported: {supported}")

    def take(key, kind, default=..., within=raw):
        """The value of key; default, if there is one, where it is missing or null."""
        value = within.get(key)
        if value is None and default is not ...:
            return default
        if key not in within:
            raise InputError(f"{path}: {key} is missing")
        if not {SIZE: type(value) is int and 0 < value < 2 ** 31, FLAG: type(value) is bool,
                NUMBER: type(value) in (int, float) and 0 < value < 2 ** 63}[kind]:
            raise InputError(f"{path}: {key} is {value!r}, not {kind}")
        return value

    kind = raw.get("model_type")
    if kind not in list(FAMILIES):
        refuse(f"model_type {kind!r}", ", ".join(FAMILIES))
    if raw.get("quantization_config"):
        refuse("a quantised checkpoint", "float32, bfloat16, float16")
    if kind == "gpt2":
        if raw.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
            refuse(f"activation_function {raw['activation_function']!r}", "gelu_new")
        if take("scale_attn_by_inverse_layer_idx", FLAG, False) or not take("scale_attn_weights", FLAG, True):
            refuse("scaling attention by the layer", "1 / sqrt(head_dim)")
        fields = dict(
            max_len=take("n_positions", SIZE), n_layer=take("n_layer", SIZE), n_head=take("n_head", SIZE),
            n_embd=take("n_embd", SIZE), n_inner=take("n_inner", SIZE, None), tied_head=take("tie_word_embeddings", FLAG, True),
            norm="layer", norm_eps=take("layer_norm_epsilon", NUMBER, 1e-5), positions="learned", mlp="gelu",
            qkv_bias=True, out_bias=True, mlp_bias=True)
    else:
        if raw.get("hidden_act", "silu") != "silu":
            refuse(f"hidden_act {raw['hidden_act']!r}", "silu")
        if take("use_sliding_window", FLAG, False) or "sliding_attention" in str(raw.get("layer_types")):
            refuse("sliding-window attention", "full attention")
        # transformers 5 puts all of it into rope_parameters, before there were rope_theta and rope_scaling
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            refuse(f"RoPE with {rope!r}", "one object for all layers")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            refuse(f"rope type {rope_type!r}", "default, llama3")
        scaling = None
        if rope_type == "llama3":
            scaling = {key: take(key, NUMBER, within=rope) for key in
                       ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
            if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                raise InputError(f"{path}: low_freq_factor of RoPE is not below high_freq_factor: {rope!r}")
        bias = take("attention_bias", FLAG, False) and kind != "qwen2"
        fields = dict(
            max_len=take("max_position_embeddings", SIZE), n_layer=take("num_hidden_layers", SIZE),
            n_head=take("num_attention_heads", SIZE), n_kv_head=take("num_key_value_heads", SIZE, None),
            head_dim=take("head_dim", SIZE, None), n_embd=take("hidden_size", SIZE), n_inner=take("intermediate_size", SIZE),
            tied_head=take("tie_word_embeddings", FLAG, False), norm_eps=take("rms_norm_eps", NUMBER, 1e-6),
            rope_theta=take("rope_theta", NUMBER, take("rope_theta", NUMBER, 10000.0), within=rope), rope_scaling=scaling,
            qkv_bias=kind == "qwen2" or bias, out_bias=bias, qk_norm=kind == "qwen3",
            mlp_bias=kind == "llama" and take("mlp_bias", FLAG, False))
    try:
        return GPTConfig(take("vocab_size", SIZE), 0, **fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _token_ids(raw: dict, key: str, path: Path) -> list[int]:
    """A token of a config, which may be one id, a list of them or null."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [value]
    if value is not None and not (ids and all(type(i) is int for i in ids)):
        raise InputError(f"{path}: {key} is {value!r}, not the id of a token or a list of such")
    return [] if value is None else ids


def _open(file: Path):
    try:
        return safetensors.safe_open(file, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        problem = f"damaged or incomplete ({error})" if file.exists() else "no such file"
        raise InputError(f"{file}: {problem}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _open_weights(folder: Path) -> dict:
    """Tensor name -> the open safetensors file that holds it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists() and not single.exists():
        shards = _parse(_read(index), index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(f"{index}: weight_map does not name the file of each tensor")
        files = [folder / name for name in sorted({*shards.values()})]
    elif not single.exists() and (pickled := [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise InputError(f"{pickled[0]}: a pickle, which can run any code when opened; supported: model.safetensors")
    else:
        files = [single]
    return {name: opened for opened in map(_open, files) for name in opened.keys()}


def load_checkpoint(folder):
    """(gpt, tokenizer) from a Hugging Face folder: config.json, model.safetensors or its shards, tokenizer.json.

    Weights become float32, on the CPU; a value_head.safetensors beside them is read too. One end token: config.json's
    (else generation_config.json's) eos_token_id; of several, the one that tokenizer_config.json calls eos_token, else the
    first. The filler is pad_token_id or, without one, the end token. Raises InputError for anything missing, damaged or
    unsupported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path, generation = folder / "config.json", folder / "generation_config.json"
    raw = _parse(_read(path), path)
    c = _read_config(raw, path)
    if not (folder / "tokenizer.json").exists():
        raise InputError(f"{folder / 'tokenizer.json'}: no such file; supported: BPE in a tokenizer.json, byte-level BPE or "
                         "Llama 2's, not a tokenizer.model (SentencePiece) or a pair of vocab.json and merges.txt")
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")

    ends = _token_ids(raw, "eos_token_id", path)
    if not ends and generation.exists():
        ends = _token_ids(_parse(_read(generation), generation), "eos_token_id", generation)
    c.eos_id = tokenizer.eos_id if tokenizer.eos_id in ends or not ends else ends[0]
    if c.eos_id is None or not 0 <= c.eos_id < c.vocab_size:
        raise InputError(f"{path}: eos_token_id is {c.eos_id}, the vocabulary has {c.vocab_size} ids")
    pads = (*_token_ids(raw, "pad_token_id", path), tokenizer.pad_id, c.eos_id)
    _token_ids(raw, "bos_token_id", path)               # the tokenizer has its own say; only an odd value is refused
    c.pad_id = next(p for p in pads if p is not None and 0 <= p < c.vocab_size)
    tokenizer.eos_id, tokenizer.pad_id = c.eos_id, c.pad_id
    tokenizer.model_vocab_size = c.vocab_size
    if tokenizer.max_id >= c.vocab_size:
        raise InputError(f"{folder}: tokenizer.json gives {tokenizer.decode([tokenizer.max_id])!r} the id {tokenizer.max_id}, "
                         f"config.json's vocab_size is {c.vocab_size}")

    where = _open_weights(folder)
    if c.n_layer > len(where):                          # before they are built
        raise InputError(f"{path}: {c.n_layer} layers, but the checkpoint has {len(where)} tensors")
    try:
        with torch.device("meta"):                      # shapes only: no random weights that are thrown away at once
            gpt = GPT(c)
    except RuntimeError as error:                       # larger than any memory
        raise InputError(f"{path}: {error}") from None
    parts = {name: _hf_parts(c, name, tuple(p.shape)) for name, p in gpt.state_dict().items()}
    # a headless GPT-2 was saved without the prefix
    stored = {part: next((n for n in (part, part.removeprefix("transformer.")) if n in where), None)
              for part, _ in itertools.chain(*parts.values())}
    if missing := [part for part, name in stored.items() if name is None]:
        raise InputError(f"{folder}: the checkpoint has no tensor {_listed(missing)}")

    def read(name):
        tensor = where[name].get_tensor(name)
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"{folder}: {name} is stored as {tensor.dtype}; supported: float32, bfloat16, float16")
        return tensor.float()

    def fetch(part, shape):
        name = stored[part]
        tensor = read(name).t() if _is_transposed(part) else read(name)
        if tensor.shape != shape:
            raise InputError(f"{folder}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
        return tensor

    # what no parameter takes is another model's, but for tables that any model works out and a copy of a tied embedding
    unused = [name for name in where if name not in stored.values()
              and not re.search(r"(^|\.)(rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias)$", name)]
    if unused == ["lm_head.weight"] and torch.equal(read("lm_head.weight"), read(stored[parts["embed"][0][0]])):
        unused = []
    if unused:
        raise InputError(f"{folder}: the model of config.json has no place for the tensor {_listed(unused)}")
    if (path := folder / "adapter_config.json").exists():
        raise InputError(f"{path}: an adapter that is not merged into the weights is not supported")
    gpt.load_state_dict({name: torch.cat([fetch(*part) for part in parts[name]]).contiguous() for name in parts}, assign=True)
    if (path := folder / "value_head.safetensors").exists():
        gpt.add_value_head()
        opened = _open(path)
        try:
            gpt.value_head.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})
        except RuntimeError as error:
            raise InputError(f"{path}: not the value head of a model of width {c.n_embd}") from error
    return gpt, tokenizer


def _write_weights(path: Path, gpt: GPT, write: bool):
    """model.safetensors as the package safetensors would write it (a JSON header behind its length, then the data), but one
    parameter after the other: the weights are never held a second time."""
    parameters = {name: p for name, p in gpt.state_dict().items() if not name.startswith("value_head.")}
    parts = {name: _hf_parts(gpt.config, name, tuple(p.shape)) for name, p in parameters.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for part, shape in sorted(itertools.chain(*parts.values())):
        start, end = end, end + 4 * math.prod(shape)
        header[part] = {"dtype": "F32", "shape": shape[::-1] if _is_transposed(part) else shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _becoming(path) if write else nullcontext(os.devnull) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, p in parameters.items():
            p = whole(p)
            if write:
                for (part, _), tensor in zip(parts[name], p.float().cpu().split([shape[0] for _, shape in parts[name]])):
                    file.seek(8 + len(text) + header[part]["data_offsets"][0])
                    file.write((tensor.t() if _is_transposed(part) else tensor).contiguous().numpy())


def save_checkpoint(folder, gpt: GPT, tokenizer: Tokenizer, write: bool = True):
    """Write gpt as a Hugging Face folder that transformers and vLLM open: config.json, model.safetensors (float32) and
    the tokenizer's files; a value head goes into value_head.safetensors. Each file is replaced as a whole. Where the weights
    are spread over several processes all of them call this, and one writes."""
    folder, c = Path(folder), gpt.config
    folder.mkdir(parents=True, exist_ok=True)
    raw = dict(architectures=[FAMILIES[c.family]], model_type=c.family, vocab_size=c.vocab_size,
               bos_token_id=tokenizer.bos_ids[0] if tokenizer.bos_ids else None,
               eos_token_id=c.eos_id, pad_token_id=c.pad_id, tie_word_embeddings=c.tied_head,
               dtype="float32", torch_dtype="float32")      # transformers 5 and 4 call it so, and RoPE likewise
    if c.family == "gpt2":
        raw |= dict(n_positions=c.max_len, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_inner=c.n_inner,
                    layer_norm_epsilon=c.norm_eps, activation_function="gelu_new",
                    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    else:
        rope = dict(rope_type="llama3", **c.rope_scaling) if c.rope_scaling else dict(rope_type="default")
        raw |= dict(max_position_embeddings=c.max_len, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                    num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, hidden_size=c.n_embd,
                    intermediate_size=c.n_inner, hidden_act="silu", rms_norm_eps=c.norm_eps, attention_bias=c.out_bias,
                    mlp_bias=c.mlp_bias, rope_parameters=dict(rope, rope_theta=c.rope_theta),
                    rope_theta=c.rope_theta, rope_scaling=rope if c.rope_scaling else None)
    _write_weights(folder / "model.safetensors", gpt, write)
    value_head = {} if gpt.value_head is None else {k: whole(v).float().cpu() for k, v in gpt.value_head.state_dict().items()}
    if not write:
        return
    _write(folder / "config.json", json.dumps(raw, indent=2).encode())
    tokenizer.save(folder)
    head = folder / "value_head.safetensors"
    if value_head:
        _write(head, safetensors.torch.save(value_head))
    else:
        head.unlink(missing_ok=True)
