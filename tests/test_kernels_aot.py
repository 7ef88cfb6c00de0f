"""The kernels compiled for GPUs that are not there: no spills, no fp64, few enough instructions.

Compiling needs Triton without its interpreter, hence a second process: this file run as a program, which prints what it
found as JSON. One second a kernel when Triton has not cached it.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABSENT = dict.fromkeys(("y_ptr", "entropy_ptr", "g_logprob_ptr", "g_entropy_ptr"))      # None: a KL without log-probs
CASES = {   # file, kernel, constants as launched, ceiling of instructions an element on an sm_90
    "logprob forward": ("logprob", "forward_kernel", dict(BLOCK=2048, Q=4), 12),
    "logprob backward": ("logprob", "backward_kernel", dict(BLOCK=4096), 18),
    "kl forward": ("kl", "forward_kernel", dict(BLOCK=2048), 28),
    "kl backward": ("kl", "backward_kernel", dict(BLOCK=4096, LOGPROBS=False, **ABSENT), 18),
    "both backward": ("kl", "backward_kernel", dict(BLOCK=4096, LOGPROBS=True), 24),
}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
FP64 = "DADD", "DMUL", "DFMA", "DSETP"
WARPS = 8


def compile_for(kernel, constants, logits, target):
    import triton
    pointers = dict(z_ptr=logits, r_ptr=logits, dz_ptr="bf16", y_ptr="i64")             # the others float32
    types = {n: "constexpr" if n in constants else "*" + pointers.get(n, "fp32") if n.endswith("_ptr") else "i32"
             for n in kernel.arg_names}
    index = kernel.arg_names.index
    source = triton.compiler.ASTSource(
        fn=kernel, signature=types, constexprs={(index(n),): value for n, value in constants.items()},
        attrs={(index(n),): [["tt.divisibility", 16]] for n in types if n not in constants})        # aligned arguments
    return triton.compile(source, target=triton.backends.compiler.GPUTarget(*target), options=dict(num_warps=WARPS))


def inspect(compiled):
    """Registers, bytes of stack, opcodes of the machine code and instructions in its longest loop."""
    import triton
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True, check=True)
                       for tool, flag in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    opcodes, labels, loop = [], {}, 0
    for line in sass.stdout.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(opcodes)
        elif m := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*);", line):
            opcodes.append(m[1])
            jump = re.search(r"\.L_x_\d+", m[2])
            if m[1] == "BRA" and jump and jump[0] in labels:
                loop = max(loop, len(opcodes) - labels[jump[0]])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    return dict(registers=registers, stack=stack, fp64=sum(o in FP64 for o in opcodes), loop=loop)


def main():
    sys.path.insert(0, str(ROOT))
    import importlib
    found = {}
    for case, (file, name, constants, _) in CASES.items():
        kernel = getattr(importlib.import_module(f"kernels.{file}"), name)
        for target, triple in TARGETS.items():
            for logits in ("bf16", "fp32") if target == "sm_90" else ("bf16",):
                compiled = compile_for(kernel, constants, logits, triple)
                if triple[0] == "hip":
                    found[f"{case} {target}"] = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
                    continue
                result = inspect(compiled)
                elements = constants["BLOCK"] * constants.get("Q", 1)
                found[f"{case} {target} {logits}"] = result | dict(instructions=result["loop"] * WARPS * 32 / elements)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_machine_code(found, case):
    *_, ceiling = CASES[case]
    for target in TARGETS:
        for logits in ("bf16", "fp32") if target == "sm_90" else ("bf16",):
            if target == "gfx942":
                assert found[f"{case} {target}"] and set(found[f"{case} {target}"]) == {"0"}
                continue
            code = found[f"{case} {target} {logits}"]
            print(f"\n{case} {target} {logits}: {code['registers']} registers, {code['instructions']:.1f} an element")
            assert code["stack"] == 0 and code["fp64"] == 0 and code["registers"] <= 64 and code["loop"] > 0
            assert code["instructions"] <= (ceiling if target == "sm_90" else 1.15 * ceiling)


def test_memory_is_the_limit(found):
    """On an H200, in bfloat16, the hardest case: the instructions of an operation take less time than its bytes."""
    code = {case: found[f"{case} sm_90 bf16"]["instructions"] for case in CASES}
    for instructions, nbytes in (
        (code["logprob forward"], 2),                                   # token_logprobs
        (code["logprob backward"], 4),
        (2 * code["logprob forward"] + code["kl forward"], 8),          # token_kl: the normalisers of both first
        (code["kl backward"], 6),
    ):
        assert 132 * 1.755e9 * 128 / instructions > 4.3e12 / nbytes     # elements a second


if __name__ == "__main__":
    main()
