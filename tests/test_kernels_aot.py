"""The kernels compiled for GPUs that are not there: no spills, no fp64, few enough instructions.

Compiling needs Triton without its interpreter, hence a second process: this file run as a program, which prints what it
found as JSON. One second a kernel when Triton has not cached it.
"""
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABSENT = dict.fromkeys(("y_ptr", "entropy_ptr", "g_logprob_ptr", "g_entropy_ptr"))      # None: a KL without log-probs


@dataclass
class Case:
    file: str
    kernel: str
    constants: dict                 # as launched
    elements: int                   # of an iteration of the loop
    ceiling: float                  # of instructions an element on an sm_90
    warps: int = 8
    registers: int = 64
    dtypes: tuple = "bf16", "fp32"  # of logits
    stages: int = 3


def attention(D, group, **absent):
    """Of 8 key heads. An element is one of the cache. One warp with all the registers it can have: ten fit on a processor."""
    wide = 1 << (D - 1).bit_length()
    sizes = dict(K=8, GROUP=group, D=D, EPS=1e-6, SCALE=0.18, HEADS=16, WIDE=wide, BLOCK=4096 // wide)
    return Case("decode", "attention_kernel", sizes | absent, 2 * 4096 // wide * D, 5, 1, 255, ("bf16",), 2)


CASES = {
    "logprob forward": Case("logprob", "forward_kernel", dict(BLOCK=2048, Q=4), 8192, 12),
    "logprob forward, one word": Case("logprob", "forward_kernel", dict(BLOCK=2048, Q=4, V=1), 0, 0, dtypes=("bf16",)),
    "logprob backward": Case("logprob", "backward_kernel", dict(BLOCK=4096), 4096, 18),
    "kl forward": Case("kl", "forward_kernel", dict(BLOCK=2048), 2048, 28),
    "kl backward": Case("kl", "backward_kernel", dict(BLOCK=4096, LOGPROBS=False, **ABSENT), 4096, 18),
    "both backward": Case("kl", "backward_kernel", dict(BLOCK=4096, LOGPROBS=True), 4096, 24),
    "sample": Case("sample", "slice_kernel", dict(GREEDY=False, SLICE=16384, BLOCK=256), 1024, 53, 4, 80, ("fp32",)),
    "sample greedily": Case("sample", "slice_kernel", dict(GREEDY=True, SLICE=16384, BLOCK=256), 1024, 14, 4, dtypes=("fp32",)),
    "attention, no norm": attention(64, 7, q_norm_ptr=None, k_norm_ptr=None),
    "attention, norm, D = 128": attention(128, 2),
    "attention, D = 80, no rotation": attention(80, 1, q_norm_ptr=None, k_norm_ptr=None, cos_ptr=None, sin_ptr=None),
    "add, root-mean-square norm": Case("decode", "add_norm_kernel", dict(EPS=1e-6, BLOCK=2048, bias_ptr=None), 0, 0, 4,
                                       dtypes=("bf16",)),
    "add, layer norm": Case("decode", "add_norm_kernel", dict(EPS=1e-5, BLOCK=1024), 0, 0, 4, dtypes=("bf16",)),
    "activation": Case("decode", "activation_kernel", dict(GATED=True, BLOCK=1024), 0, 0, 4, dtypes=("bf16",)),
    "sample join": Case("sample", "join_kernel", dict(GREEDY=False, BLOCK=16), 0, 0, 1, dtypes=("fp32",)),      # no loop
}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
FP64 = "DADD", "DMUL", "DFMA", "DSETP"
POINTERS = dict(dz_ptr="bf16", y_ptr="i64", seed_ptr="i64", step_ptr="i64", row_ptr="i64", winner_ptr="i64",
                token_ptr="i64", finite_ptr="i1", length_ptr="i64", alive_ptr="i1",
                **dict.fromkeys(("qkv_ptr", "keys_ptr", "values_ptr", "delta_ptr", "h_ptr", "out_ptr"), "bf16"))


def variants():
    """Case, target and type of the logits of all that is compiled."""
    for case, c in CASES.items():
        for target in TARGETS:
            for logits in c.dtypes if target == "sm_90" else c.dtypes[:1]:
                yield case, target, logits


def compile_for(kernel, constants, logits, target, warps, stages):
    import triton
    pointers = POINTERS | dict(z_ptr=logits, r_ptr=logits)                              # the others float32
    types = {n: "constexpr" if n in constants else "*" + pointers.get(n, "fp32") if n.endswith("_ptr") else "i32"
             for n in kernel.arg_names}
    index = kernel.arg_names.index
    source = triton.compiler.ASTSource(
        fn=kernel, signature=types, constexprs={(index(n),): value for n, value in constants.items()},
        attrs={(index(n),): [["tt.divisibility", 16]] for n in types if n not in constants})        # aligned arguments
    return triton.compile(source, target=triton.backends.compiler.GPUTarget(*target),
                          options=dict(num_warps=warps, num_stages=stages))


def machine_code(cubin):
    """The executable section of an ELF file with one function."""
    at, (size, count) = struct.unpack_from("<Q", cubin, 0x28)[0], struct.unpack_from("<HH", cubin, 0x3A)
    headers = (struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count))
    code, = (cubin[offset:offset + length] for _, _, flags, _, offset, length in headers if flags & 4)
    return code


def inspect(cubins, target):
    """Of each cubin: registers, bytes of stack, fp64 instructions, instructions in its longest loop, whether it has tensor cores
    multiply. The disassembler takes half a second to start: so all the code for a target goes through it in one piece."""
    import triton
    codes, tools = [machine_code(cubin) for cubin in cubins], Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile() as file:
        def tool(content, name, *flags):
            Path(file.name).write_bytes(content)
            return subprocess.run([tools / name, *flags, file.name], capture_output=True, text=True, check=True).stdout

        sass = tool(b"".join(codes), "nvdisasm", "-b", target.replace("_", "").upper())
        usages = [tool(cubin, "cuobjdump", "-res-usage") for cubin in cubins]
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*);", sass, re.M)    # address, opcode, operands
    assert [int(address, 16) for address, _, _ in lines] == list(range(0, sum(map(len, codes)), 16))
    for code, usage in zip(codes, usages):
        own, lines = lines[:len(code) // 16], lines[len(code) // 16:]
        back = [int(address, 16) - int(jump[1], 16) for address, opcode, operands in own
                if opcode == "BRA" and (jump := re.search(r"\b0x([0-9a-f]+)", operands))]
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        opcodes = [opcode for _, opcode, _ in own]
        yield dict(registers=registers, stack=stack, fp64=sum(o in FP64 for o in opcodes), loop=max(back, default=-16) // 16 + 1,
                   tensor_cores="HMMA" in opcodes)


def main():
    sys.path.insert(0, str(ROOT))
    import importlib
    compiled, found = {target: {} for target in TARGETS}, {}
    for case, target, logits in variants():
        c = CASES[case]
        kernel = getattr(importlib.import_module(f"kernels.{c.file}"), c.kernel)
        compiled[target][case, logits] = compile_for(kernel, c.constants, logits, TARGETS[target], c.warps, c.stages).asm
    for target, texts in compiled.items():
        if TARGETS[target][0] == "hip":
            codes = [re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm["amdgcn"]) for asm in texts.values()]
        else:
            codes = inspect([asm["cubin"] for asm in texts.values()], target)
        found |= {f"{case} {target} {logits}": code for (case, logits), code in zip(texts, codes)}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def instructions_an_element(code, c):
    return code["loop"] * c.warps * 32 / c.elements if c.elements else 0


@pytest.mark.parametrize("case", CASES)
def test_machine_code(found, case):
    c = CASES[case]
    for _, target, logits in (v for v in variants() if v[0] == case):
        code = found[f"{case} {target} {logits}"]
        if target == "gfx942":
            assert code and set(code) == {"0"}
            continue
        instructions = instructions_an_element(code, c)
        print(f"\n{case} {target} {logits}: {code['registers']} registers, {instructions:.1f} an element")
        assert code["stack"] == 0 and code["fp64"] == 0 and code["registers"] <= c.registers
        assert code["loop"] > 1 or not c.elements
        assert code["tensor_cores"] == case.startswith("attention")
        assert instructions <= (c.ceiling if target == "sm_90" else 1.15 * c.ceiling)


def test_memory_is_the_limit(found):
    """On an H200, in bfloat16, the hardest case: the instructions of an operation take less time than its bytes."""
    code = {case: instructions_an_element(found[f"{case} sm_90 bf16"], c) for case, c in CASES.items() if "bf16" in c.dtypes}
    for instructions, nbytes in (
        (code["logprob forward"], 2),                                   # token_logprobs
        (code["logprob backward"], 4),
        (2 * code["logprob forward"] + code["kl forward"], 8),          # token_kl: the normalisers of both first
        (code["kl backward"], 6),
    ):
        assert 132 * 1.755e9 * 128 / instructions > 4.3e12 / nbytes     # elements a second


if __name__ == "__main__":
    main()
