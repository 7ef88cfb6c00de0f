"""Log-probability, entropy and exact KL per token, from logits or through the vocabulary head a tile at a time; the next
token; what lies between the matrix products of a decoding step.

    token_logprobs(logits, targets)                             -> logprobs, entropy
    token_kl(logits, ref_logits)                                -> kl
    linear_logprobs(hidden, weight, targets)                    -> logprobs, entropy
    linear_kl(hidden, weight, ref_hidden, ref_weight)           -> kl
    linear_stats(hidden, weight, targets, ref_hidden, ref_weight) -> logprobs, entropy, kl, ref_logprobs   all in one pass
    sample_tokens(logits, seed, step)                           -> token, logprob, finite
    decode_attention(qkv, cache, lengths, alive, ...)           -> y          the cache gets the new keys and values
    add_norm(x, delta, weight, bias, eps, dtype)                -> x + delta, its norm
    activation(h, gated)                                        -> silu(gate) * up, or gelu(h)

CPU tensors take plain torch; CUDA tensors take Triton and nothing else. The environment variable KERNELS=torch or
KERNELS=triton, read at import, forces one path on any device: Triton on a CPU is its interpreter, slow, for tests.
"""

import importlib
import importlib.util
import os
import sys
from types import SimpleNamespace

import torch

PATH = os.environ.get("KERNELS", "")
if PATH not in ("", "torch", "triton"):
    raise ValueError(f"KERNELS={PATH}: must be torch, triton or unset")

HAS_TRITON = importlib.util.find_spec("triton") is not None
if PATH == "triton" and HAS_TRITON and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:                     # its own functions are compiled ones by now
        raise RuntimeError("KERNELS=triton on a CPU: set TRITON_INTERPRET=1, or import kernels before triton")
    os.environ["TRITON_INTERPRET"] = "1"
if HAS_TRITON:
    import triton
    import triton.language as tl
else:                                               # Mac, Windows: the kernels are functions that nobody calls
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=float)


def use_triton(x):
    """Whether a tensor takes the Triton kernels. No fallback: what they cannot do for a CUDA tensor is an error."""
    if not (PATH == "triton" or PATH == "" and x.is_cuda):
        return False
    if not HAS_TRITON:
        raise RuntimeError("this path needs triton (pip install triton); KERNELS=torch takes plain torch instead")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the kernels take float32, bfloat16 or float16, not {x.dtype}")
    return True


FILES = {"token_logprobs": "logprob", "token_kl": "kl",
         "linear_logprobs": "linear", "linear_kl": "linear", "linear_stats": "linear",
         "sample_tokens": "sample", "decode_attention": "decode", "add_norm": "decode", "activation": "decode"}


def __getattr__(name):                              # on first use, so that `python -m kernels.kl` loads kl.py once
    if name not in FILES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"kernels.{FILES[name]}"), name)
    return globals()[name]
