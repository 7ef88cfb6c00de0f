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
import json
import math
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import safetensors
import safetensors.torch
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn


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
        self.head_dim = self.head_dim or self.n_embd // self.n_head
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


def causal_attention(layer, q, k, v):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                # (B, heads, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
    return y.transpose(1, 2).flatten(2)


def block(c: GPTConfig, w, x, rope, attend):
    """One layer, x (B, T, C) -> (B, T, C), with the tensors of w; attend(q, k, v) -> (B, T, H D)."""
    B, T, _ = x.shape
    h = norm(x, w.norm1, w.norm1_bias, c.norm_eps)
    qkv = F.linear(h, w.qkv, w.qkv_bias).view(B, T, -1, c.head_dim)                  # (B, T, H + 2 K, D)
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


def trunk(c: GPTConfig, w, tokens, places, rope, attend):
    """tokens (B, T) at positions places (B or 1, T) -> hidden (B, T, C) after the final norm. The only forward there is:
    training, prefill and decoding differ in attend(layer, q, k, v) and in where the tensors of w come from."""
    x = F.embedding(tokens, w.embed)
    if c.positions == "learned":
        x = x + F.embedding(places, w.positions)
    else:
        rope = [F.embedding(places, table)[:, :, None] for table in rope]            # (B or 1, T, 1, D)
    for layer, weights in enumerate(w.blocks):
        x = block(c, weights, x, rope, partial(attend, layer))
    return norm(x, w.norm, w.norm_bias, c.norm_eps)


class GPT(nn.Module):
    """gpt(tokens (B, T)) -> hidden (B, T, C) after the final norm; the scripts apply `head_weight` in chunks."""

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
        return trunk(c, self, tokens, places, rope_table(c, T, tokens.device), causal_attention)

    @property
    def head_weight(self):
        """(V, C), the embedding itself if the head is tied."""
        return self.embed if self.head is None else self.head

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


# ----------------------------------------------------------------------------------------------------------- generation
# steps between looks at who has ended, the share of the rows that must have gone before the others close up, and the
# columns by which the visible cache grows. On CUDA a look is a sync and a new shape is a new graph; on a CPU both are free
SCHEDULE = dict(cpu=(1, 0, 8), cuda=(32, 0.5, 256))


def decoding_weights(gpt: GPT, dtype):
    """The same names as in gpt, detached, the matrices in dtype: attribute look-ups and casts are paid once a call."""
    def lean(module):
        return {name: p if p is None or "norm" in name or name in ("embed", "positions") else p.to(dtype)
                for name, p in module._parameters.items()}
    return SimpleNamespace(**lean(gpt) | {"head": gpt.head_weight.to(dtype)},
                           blocks=[SimpleNamespace(**lean(b)) for b in gpt.blocks])


def generate(gpt: GPT, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, group_size: int = 1):
    """Sample group_size responses to each prompt: tokens (B, T), response_mask (B, T-1), in the layout at the top of this
    file; B = len(prompts) * group_size, the rows of a prompt are adjacent, T is the longest row.

    A row ends with eos_id (in the mask) or after max_new_tokens. temperature 0 takes the most likely token. Draws come
    from the device's global random generator. Raises InputError if a prompt is empty or prompt and response do not fit
    into the context, FloatingPointError if a logit was not finite.
    """
    with torch.inference_mode():
        tokens, prompt_lengths, lengths = _generate(gpt, prompts, max_new_tokens, temperature, group_size)
    t = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    response_mask = (t >= prompt_lengths[:, None] - 1) & (t < lengths[:, None] - 1)
    return tokens.clone(), response_mask                # a clone made here is an ordinary tensor: autograd takes it


def _generate(gpt, prompts, max_new_tokens, temperature, group_size):
    c, device = gpt.config, gpt.embed.device
    on_cuda, (look_every, gone_share, granule) = device.type == "cuda", SCHEDULE[device.type]
    longest = max(map(len, prompts), default=0)
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise InputError("generate: an empty prompt, or no prompt, or max_new_tokens below 1")
    if longest + max_new_tokens > c.max_len:
        raise InputError(f"{longest} prompt tokens and {max_new_tokens} new tokens exceed the context of {c.max_len}")
    dtype = torch.bfloat16 if on_cuda else torch.float32
    w = decoding_weights(gpt, dtype)
    width = longest + max_new_tokens
    rope = rope_table(c, width, device)

    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    source = torch.tensor([distinct[tuple(p)] for p in prompts], device=device).repeat_interleave(group_size)    # (B,)
    padded = torch.tensor([[*p, *[c.pad_id] * (longest - len(p))] for p in distinct], device=device)
    prompt_lengths = torch.tensor([len(p) for p in distinct], device=device)

    # the state of a row: rows that go on are always the first n, so every step works on plain slices
    B = len(source)
    tokens = torch.full((B, width), c.pad_id, device=device)
    tokens[:, :longest] = padded[source]
    lengths = prompt_lengths[source]                    # tokens in the row so far
    alive = torch.ones(B, dtype=torch.bool, device=device)
    order = torch.arange(B, device=device)              # which row of the result
    health = torch.zeros(B, device=device)              # sum of all logits: a NaN or an infinity stays in it
    # zeros, not empty: a masked key still multiplies its value by 0, and 0 * NaN = NaN
    kv = torch.zeros(c.n_layer, 2, B, c.n_kv_head, width, c.head_dim, dtype=dtype, device=device)

    def add_tokens(n, hidden):
        """Sample the next token of the first n rows from hidden (n, C) and append it."""
        if on_cuda:
            logits = torch.mm(hidden.to(dtype), w.head.t(), out_dtype=torch.float32)     # bf16 logits would be too coarse
        else:
            logits = F.linear(hidden, w.head)
        health[:n] += logits.sum(-1)
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            # invert the cumulative distribution, in double: exact for rare tokens too, and one random number a row
            cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
            u = torch.rand(n, 1, dtype=torch.float64, device=device) * cdf[:, -1:]
            new = torch.searchsorted(cdf, u, right=True).squeeze(1).clamp_(max=c.vocab_size - 1)
        new = torch.where(alive[:n], new, c.pad_id)
        tokens[:n].scatter_(1, lengths[:n, None], new[:, None])
        lengths[:n] += alive[:n]                        # an ended row stands still until it leaves
        alive[:n] &= new != c.eos_id

    def prefill_attention(layer, q, k, v):
        for cached, x in zip(kv[layer], (k, v)):
            cached[:, :, :longest] = x.transpose(1, 2)[source]      # a prompt is computed once and shared out
        return causal_attention(layer, q, k, v)

    def decode_step(n, columns):
        """A function that takes the first n rows one token further, attending to the first columns of the cache only."""
        rows, places = torch.arange(n, device=device), torch.arange(columns, device=device)
        caches = [(*layer[:, :n], *layer[:, :n, :, :columns]) for layer in kv]       # views, made once

        def attend(visible, at, layer, q, k, v):
            keys, values, seen_keys, seen_values = caches[layer]
            keys[rows, :, at], values[rows, :, at] = k[:, 0].to(dtype), v[:, 0].to(dtype)
            # the query heads that share a key head are as good as several queries in one row
            q = q.view(n, c.n_kv_head, -1, c.head_dim)
            return F.scaled_dot_product_attention(q, seen_keys, seen_values, attn_mask=visible).view(n, 1, -1)

        def step():
            at = lengths[:n] - 1                        # where the newest tokens are
            visible = (places <= at[:, None])[:, None, None]                         # (n, 1, 1, columns)
            newest = tokens[:n].gather(1, at[:, None])
            add_tokens(n, trunk(c, w, newest, at[:, None], rope, partial(attend, visible, at))[:, 0])

        return step

    def drop_ended(n):
        """Swap ended rows behind those that go on; the number of the latter. The only device-to-host sync of the loop."""
        left = int(alive[:n].sum())
        if left == n or n - left < gone_share * n:
            return n
        holes, movers = (~alive[:left]).nonzero()[:, 0], alive[left:n].nonzero()[:, 0] + left
        here, there = torch.cat((holes, movers)), torch.cat((movers, holes))
        for x in (tokens, lengths, alive, order):
            x[here] = x[there]
        for layer in kv:
            layer[:, holes] = layer[:, movers]
        return left

    # the matrices are bf16 already: autocast rounds where it does in training and leaves the residual stream in fp32
    with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda, cache_enabled=False):
        hidden = trunk(c, w, padded, torch.arange(longest, device=device)[None], rope, prefill_attention)
        ends = hidden[torch.arange(len(distinct), device=device), prompt_lengths - 1]
        add_tokens(B, ends[source])
        n, done, shape = drop_ended(B), 1, None
        while n and done < max_new_tokens:
            columns = min(width, math.ceil((longest + done) / granule) * granule)
            if shape != (n, columns):
                shape, step = (n, columns), decode_step(n, columns)
                if on_cuda:
                    step = record(step)
                    done += 1                           # recording made one step
            for _ in range(min(look_every, columns - longest - done + 1, max_new_tokens - done)):
                step()
                done += 1
            n = drop_ended(n)

    if not health.isfinite().all():
        raise FloatingPointError("generate: the model gave logits that are NaN or infinite")
    back = order.argsort()
    return tokens[back, :int(lengths.max())], prompt_lengths[source], lengths[back]


def record(step):
    """Run step once, capture it as a CUDA graph, return the replay: one launch in place of hundreds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()                                          # a real step, and the warm-up that capturing asks for
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()                                          # recorded, not run
    return graph.replay


# ------------------------------------------------------------------------------------------------------------ tokenizer
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in the vocabulary of a byte-level BPE."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


@cache
def _ranges(category: str) -> str:
    r"""The characters of \p{category} or, for "s", of \s, as the inside of a regex class."""
    if category == "s":
        return "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    points = [p for p in range(sys.maxunicode + 1) if unicodedata.category(chr(p)).startswith(category)]
    starts = [p for p, before in zip(points, [-2, *points]) if p != before + 1]
    ends = [p for p, after in zip(points, [*points[1:], -2]) if p != after - 1]
    return "".join(rf"\U{a:08x}-\U{b:08x}" for a, b in zip(starts, ends))


def _python_regex(pattern: str):
    r"""tokenizer.json's regex in the dialect of re, which has no \p{..} and counts more characters as \s."""
    inside, parts = False, []
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        inside = part == "[" or (inside and part != "]")
        if part.startswith(r"\p{") or part == r"\s":
            ranges = _ranges(part[3:-1] or "s")
            part = ranges if inside else f"[{ranges}]"
        parts.append(part)
    return re.compile(f"({''.join(parts)})")


class Tokenizer:
    """Byte-level BPE, run by tiktoken, with the ids of the checkpoint's own tokenizer on any text.

    encode adds no BOS or EOS and reads special tokens in a text as plain text; decode spells special tokens out and
    replaces incomplete UTF-8. files: the checkpoint's tokenizer files, name -> content, written back as they came.
    """

    def __init__(self, files: dict[str, str], source="tokenizer.json"):
        self.files, self.source = files, source
        spec = _parse(files["tokenizer.json"], source)
        try:
            self._read_model(spec["model"], spec.get("added_tokens") or [])
            self._read_splits(spec)
        except (KeyError, TypeError, AttributeError, re.error) as error:
            raise InputError(f"{source}: not readable as a tokenizer ({type(error).__name__}: {error})") from error
        settings = _parse(files.get("tokenizer_config.json", "{}"), Path(source).with_name("tokenizer_config.json"))
        self.eos_id, self.pad_id = (self._id_of(settings.get(name)) for name in ("eos_token", "pad_token"))
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
        quoted = [re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", piece) for piece in sorted(pieces, key=len, reverse=True)]
        split = dict(type="Split", pattern={"Regex": "|".join(quoted)}, behavior="Isolated", invert=False)
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
        raise InputError(f"{self.source}: {what}; supported: byte-level BPE (as in GPT-2, Llama 3, Qwen, SmolLM2)")

    def _read_model(self, model, added):
        if model.get("byte_fallback") or model.get("type") == "Unigram":
            self._refuse("a SentencePiece tokenizer")
        if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            self._refuse(f"a {model.get('type')} tokenizer, or one with a prefix or suffix inside words")
        self._vocab, alphabet = model["vocab"], _byte_alphabet()
        table = {ord(char): b for b, char in enumerate(alphabet)}
        self._bytes = {}                                # id -> bytes
        for token, i in self._vocab.items():
            try:
                self._bytes[i] = token.translate(table).encode("latin-1")
            except UnicodeEncodeError:                  # not made of bytes: a special token listed in the vocabulary
                self._bytes[i] = token.encode()
        # tiktoken wants one number that is id and merge priority at once: it gets the priority, _ids turns it into the id
        self._ids = [self._vocab.get(char, -1) for char in alphabet]
        self._ranks = {bytes([b]): b for b in range(256)}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        by_priority = [self._vocab[left + right] for left, right in merges]
        for i in by_priority + (sorted(self._bytes) if model.get("ignore_merges") else []):
            if self._bytes[i] not in self._ranks:
                self._ranks[self._bytes[i]] = len(self._ids)
                self._ids.append(i)
        self._added = {t["content"]: t["id"] for t in added}
        self._bytes |= {i: text.encode() for text, i in self._added.items()}
        self.vocab_size = max(self._bytes) + 1
        # what is added but not special ("<think>" of Qwen3) is one token wherever it stands in a text
        plain = sorted((t["content"] for t in added if not t.get("special")), key=len, reverse=True)
        self._plain = re.compile(f"({'|'.join(map(re.escape, plain))})") if plain else None

    def _read_splits(self, spec):
        normalizer = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
        self._forms = [n["type"] for n in normalizer.get("normalizers", [normalizer])]
        for form in self._forms:
            if form not in ("NFC", "NFD", "NFKC", "NFKD"):
                self._refuse(f"normalizer {form}")
        pre = spec.get("pre_tokenizer") or {"type": "none"}
        *steps, last = pre.get("pretokenizers", [pre])
        if last["type"] != "ByteLevel" or last["add_prefix_space"]:
            self._refuse(f"pre-tokenizer {last['type']} at the end, or ByteLevel with a prefix space")
        patterns = []
        for step in steps:
            if step["type"] == "Digits":
                patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
            elif step["type"] == "Split" and step["behavior"] == "Isolated":
                given = step["pattern"]
                patterns.append(given["Regex"] if "Regex" in given else re.escape(given["String"]))
            else:
                self._refuse(f"pre-tokenizer {step['type']} {step.get('behavior', '')}")
        if last.get("use_regex", True):
            patterns.append(GPT2_SPLIT)
        # each step cuts within the pieces of the one before. tiktoken has one pattern: the last; re does those before
        *before, pattern = patterns or [r"[\s\S]+"]
        self._cuts = [_python_regex(p) for p in before]
        # tiktoken drops what the pattern leaves out; the original keeps it as a piece
        whole = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
        self._bpe = tiktoken.Encoding("model", pat_str=whole, mergeable_ranks=self._ranks, special_tokens={})

    def _id_of(self, token):
        text = token["content"] if isinstance(token, dict) else token
        return self._added.get(text, self._vocab.get(text))

    def encode(self, text: str) -> list[int]:
        """Raises InputError if the vocabulary has no token for a character (small vocabularies only)."""
        ids = []
        for i, part in enumerate(self._plain.split(text) if self._plain else [text]):
            if i % 2:                                   # split() puts the separators at odd places
                ids.append(self._added[part])
                continue
            for form in self._forms:
                part = unicodedata.normalize(form, part)
            pieces = [part]
            for cut in self._cuts:
                pieces = [p for piece in pieces for p in cut.split(piece) if p]
            for piece in pieces:
                ids += self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece):
        ids = [self._ids[rank] for rank in self._bpe.encode_ordinary(piece)]
        if -1 in ids:
            known = sum(len(self._bytes[i]) for i in ids[:ids.index(-1)])
            char = piece.encode()[known:].decode("utf-8", "replace")[0]
            raise InputError(f"{self.source}: the vocabulary has no token for {char!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

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
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error


def _parse(text: str, source) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{source}: not a JSON object")
    return value


def _write(path: Path, content: bytes):
    """Whole or not at all: a kill in the middle leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


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


def _read_config(raw: dict, path: Path) -> GPTConfig:
    """GPTConfig of a Hugging Face config.json, without the end token."""
    def refuse(what, supported):
        raise InputError(f"{path}: {what} is not supported; supported: {supported}")

    kind = raw.get("model_type")
    if kind not in FAMILIES:
        refuse(f"model_type {kind!r}", ", ".join(FAMILIES))
    if raw.get("quantization_config"):
        refuse("a quantised checkpoint", "float32, bfloat16, float16")
    try:
        if kind == "gpt2":
            if raw.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
                refuse(f"activation_function {raw['activation_function']!r}", "gelu_new")
            if raw.get("scale_attn_by_inverse_layer_idx") or not raw.get("scale_attn_weights", True):
                refuse("scaling attention by the layer", "1 / sqrt(head_dim)")
            return GPTConfig(
                raw["vocab_size"], 0, max_len=raw["n_positions"], n_layer=raw["n_layer"], n_head=raw["n_head"],
                n_embd=raw["n_embd"], n_inner=raw.get("n_inner"), tied_head=raw.get("tie_word_embeddings", True),
                norm="layer", norm_eps=raw.get("layer_norm_epsilon", 1e-5), positions="learned", mlp="gelu",
                qkv_bias=True, out_bias=True, mlp_bias=True)
        if raw.get("hidden_act", "silu") != "silu":
            refuse(f"hidden_act {raw['hidden_act']!r}", "silu")
        if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or []):
            refuse("sliding-window attention", "full attention")
        # transformers 5 puts all of it into rope_parameters, before there were rope_theta and rope_scaling
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            refuse(f"rope type {rope_type!r}", "default, llama3")
        scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        bias = bool(raw.get("attention_bias", False)) and kind != "qwen2"
        return GPTConfig(
            raw["vocab_size"], 0, max_len=raw["max_position_embeddings"], n_layer=raw["num_hidden_layers"],
            n_head=raw["num_attention_heads"], n_kv_head=raw.get("num_key_value_heads"), head_dim=raw.get("head_dim"),
            n_embd=raw["hidden_size"], n_inner=raw["intermediate_size"], tied_head=raw.get("tie_word_embeddings", False),
            norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            rope_scaling={key: rope[key] for key in scaling} if rope_type == "llama3" else None,
            qkv_bias=kind == "qwen2" or bias, out_bias=bias, qk_norm=kind == "qwen3",
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)))
    except KeyError as error:
        raise InputError(f"{path}: {error} is missing") from error


def _open(file: Path):
    try:
        return safetensors.safe_open(file, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        problem = f"damaged or incomplete ({error})" if file.exists() else "no such file"
        raise InputError(f"{file}: {problem}") from error


def _open_weights(folder: Path) -> dict:
    """Tensor name -> the open safetensors file that holds it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists() and not single.exists():
        files = [folder / name for name in sorted({*_parse(_read(index), index).get("weight_map", {}).values()})]
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
        raise InputError(f"{folder / 'tokenizer.json'}: no such file; supported: byte-level BPE in a tokenizer.json, not a "
                         "tokenizer.model (SentencePiece) or a pair of vocab.json and merges.txt")
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")

    eos = raw.get("eos_token_id")
    if eos is None and generation.exists():
        eos = _parse(_read(generation), generation).get("eos_token_id")
    if isinstance(eos, list):
        eos = tokenizer.eos_id if tokenizer.eos_id in eos else eos[0]
    c.eos_id = tokenizer.eos_id if eos is None else eos
    if c.eos_id is None or not 0 <= c.eos_id < c.vocab_size:
        raise InputError(f"{path}: eos_token_id is {c.eos_id}, the vocabulary has {c.vocab_size} ids")
    pads = (raw.get("pad_token_id"), tokenizer.pad_id, c.eos_id)
    c.pad_id = next(p for p in pads if p is not None and 0 <= p < c.vocab_size)
    tokenizer.eos_id, tokenizer.pad_id = c.eos_id, c.pad_id
    if max(tokenizer._ids) >= c.vocab_size:
        raise InputError(f"{folder}: tokenizer.json has ids up to {max(tokenizer._ids)}, config.json {c.vocab_size} ids")

    where = _open_weights(folder)

    def fetch(name, shape):
        # a headless GPT-2 was saved without the prefix
        stored = next((n for n in (name, name.removeprefix("transformer.")) if n in where), None)
        if stored is None:
            raise InputError(f"{folder}: the checkpoint has no tensor {name}")
        tensor = where[stored].get_tensor(stored).float()
        tensor = tensor.t() if _is_transposed(name) else tensor
        if tensor.shape != shape:
            raise InputError(f"{folder}: {stored} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
        return tensor

    with torch.device("meta"):                          # shapes only: no random weights that are thrown away at once
        gpt = GPT(c)
    state = {name: torch.cat([fetch(*part) for part in _hf_parts(c, name, tuple(p.shape))]).contiguous()
             for name, p in gpt.state_dict().items()}
    gpt.load_state_dict(state, assign=True)
    if (path := folder / "value_head.safetensors").exists():
        gpt.add_value_head()
        opened = _open(path)
        gpt.value_head.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})
    return gpt, tokenizer


def save_checkpoint(folder, gpt: GPT, tokenizer: Tokenizer):
    """Write gpt as a Hugging Face folder that transformers and vLLM open: config.json, model.safetensors (float32) and
    the tokenizer's files; a value head goes into value_head.safetensors. Each file is replaced as a whole."""
    folder, c = Path(folder), gpt.config
    folder.mkdir(parents=True, exist_ok=True)
    raw = dict(architectures=[FAMILIES[c.family]], model_type=c.family, vocab_size=c.vocab_size, bos_token_id=None,
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
    tensors = {}
    for name, p in gpt.state_dict().items():
        if name.startswith("value_head."):
            continue
        parts = _hf_parts(c, name, tuple(p.shape))
        for (part, shape), tensor in zip(parts, p.float().cpu().split([shape[0] for _, shape in parts])):
            tensors[part] = (tensor.t() if _is_transposed(part) else tensor).clone(memory_format=torch.contiguous_format)
    _write(folder / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    _write(folder / "config.json", json.dumps(raw, indent=2).encode())
    tokenizer.save(folder)
    head = folder / "value_head.safetensors"
    if gpt.value_head is not None:
        _write(head, safetensors.torch.save({k: v.float().cpu() for k, v in gpt.value_head.state_dict().items()}))
    else:
        head.unlink(missing_ok=True)
