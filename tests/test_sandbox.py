"""run_programs against programs that attack it. Every attempt is real: without the layer that stops it, its test fails.

Most attempts first get past the Python names (sys.modules still holds os, io, ctypes), so that what is tested is the
kernel's refusal: with the filter every system call that a program does not need fails with errno 1 (EPERM).
"""
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

import ppo_reft
from ppo_reft import run_programs

FILTER = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
needs_filter = pytest.mark.skipif(not FILTER, reason="no system-call filter on this platform")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
NO_FILTER = ppo_reft.PROGRAM_HELPER.replace("bpf, buffer = system_call_filter()", "pass")
GOOD = "def solution():\n    return 18"
LOADED = "import sys\n" + "".join(f"{m} = sys.modules['{m}']\n" for m in "os io ctypes signal json builtins".split())


def function(body):
    """A program whose solution() has this body and can use modules that it may not import."""
    return LOADED + "def solution():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ")


def attempt(code):
    """A program that returns the errno with which the kernel refused `code`, or "done"."""
    return function(f"""
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if libc[name](*args) < 0:
        raise OSError(ctypes.get_errno(), name)
try:
    {textwrap.indent(textwrap.dedent(code).strip(), "    ").strip()}
except (OSError, RuntimeError) as error:
    return f"errno {{getattr(error, 'errno', 1)}}"
return "done" """)


# ---------------------------------------------------------------------------- what a program is, and what it is worth

VALUES = {
    "blank line in the body": ("def solution():\n    a = 9\n\n    return a * 2", 18.0),
    "blank line in the docstring": ('def solution():\n    """One.\n\n    Two."""\n    return 18', 18.0),
    "helper before": ("def double(x):\n    return 2 * x\n\ndef solution():\n    return double(9)", 18.0),
    "helper after": ("def solution():\n    return double(9)\n\ndef double(x):\n    return 2 * x", 18.0),
    "module constant": ("N: int = 8\nN += 1\ndef solution():\n    return 2 * N", 18.0),
    "class": ("class A:\n    x = 18\ndef solution():\n    return A.x", 18.0),
    "prose after the function": (GOOD + "\n\nTherefore, the answer is 18. It's done (I hope.", 18.0),
    "prose that parses": (GOOD + "\nTherefore\nanswer: eighteen\nassert False\nif True:\n    raise ValueError", 18.0),
    "print after the function": (GOOD + "\nprint(solution())\nprint(1 / 0)", 18.0),
    "prints inside": ("def solution():\n    print('x' * 100000)\n    return 18", 18.0),
    "loop at top level": ("while True: pass\n" + GOOD, 18.0),
    "Windows line ends": (GOOD.replace("\n", "\r\n") + "\r\n18!", 18.0),
    "name that is not ascii": ("größe = 18\ndef solution():\n    return größe", 18.0),
    "math without import": ("def solution():\n    return math.sqrt(324)", 18.0),
    "imports": ("from __future__ import annotations\nimport datetime\nfrom collections.abc import Sequence\n"
                "def solution():\n    return datetime.datetime.strptime('18', '%d').day", 18.0),
    "numbers": ("from fractions import Fraction\nfrom decimal import Decimal\ndef solution():\n"
                "    return Fraction(36, 2)", 18.0),
    "decimal": ("from decimal import Decimal\ndef solution():\n    return Decimal('18.5')", 18.5),
    "text": ("def solution():\n    return '18 apples'", "18 apples"),
    "long text": ("def solution():\n    return '\\U0001f34e' * 10**6", "\U0001f34e" * 1000),
    "lone surrogate": ("def solution():\n    return 'a\\ud800'", "a?"),
    "no return": ("def solution():\n    x = 18", None),
    "cut inside an expression": ("def solution():\n    a = 18\n    return (a +", None),
    "cut inside a line": ("def solution():\n    a = 18\n    retu", None),
    "True": ("def solution():\n    return True", None),
    "list": ("def solution():\n    return [18]", None),
    "dict": ("def solution():\n    return {18: 18}", None),
    "generator": ("def solution():\n    yield 18", None),
    "nan": ("def solution():\n    return float('nan')", None),
    "inf": ("def solution():\n    return -math.inf", None),
    "complex": ("def solution():\n    return 18 + 0j", None),
    "int too large for a float": ("def solution():\n    return 10**400", None),
    "Decimal too large": ("from decimal import Decimal\ndef solution():\n    return Decimal('1e999')", None),
    "exception": ("def solution():\n    return 1 / 0", None),
    "needs an argument": ("def solution(x):\n    return 18", None),
    "no solution": ("def answer():\n    return 18", None),
    "nothing": ("", None),
    "not Python": ("The answer is 18.", None),
    "import off the list": ("import os\n" + GOOD, None),
    "open": ("def solution():\n    open\n    return 18", None),
    "input": ("def solution():\n    return input()", None),
    "null byte": ("def solution():\n    return '\0'", None),
    "lone surrogate in the program": ("def solution():\n    return '\ud800'", None),
    "deep brackets": ("def solution():\n    return " + "(" * 50000 + "18" + ")" * 50000, None),
    "deep signs": ("def solution():\n    return " + "-" * 500000 + "18", None),
    "1 MB of prose after": (GOOD + "\nIt's 18. " * 100000, 18.0),
    "1 MB of code": ("def solution():\n    x = 0\n" + "    x += 1\n" * 20000 + "    return x - 19982" + " " * 10**6, 18.0),
}


@pytest.fixture(scope="module")
def values():
    return dict(zip(VALUES, run_programs([text for text, _ in VALUES.values()])))


@pytest.mark.parametrize("name", VALUES)
def test_value(values, name):
    value = VALUES[name][1]
    assert values[name] == value and type(values[name]) is type(value)


def test_sympy_number():
    if subprocess.run([sys.executable, "-s", "-c", "import sympy"], env={}, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("sympy is not installed")
    program = "import sympy\ndef solution():\n    x = sympy.Symbol('x')\n    return sympy.solve(3 * x - 54, x)[0]"
    values = "sympy.Rational(36, 2)", "sympy.sqrt(324)", "sympy.Symbol('x')", "sympy.oo", "sympy.I", "sympy.true"
    programs = [program] + [f"import sympy\ndef solution():\n    return {value}" for value in values]
    assert run_programs(programs) == [18.0, 18.0, 18.0, None, None, None, None]


def test_same_value_each_time():
    program = "import random\ndef solution():\n    return str(random.random()) + ''.join({'a', 'b', 'c', 'd', 'e', 'f'})"
    assert run_programs([program]) == run_programs([program])


def test_empty_batch():
    assert run_programs([]) == []


# --------------------------------------------------------------------------------------------------------- the threats
# {secret}: a file; {canary}: a file that must not appear; {victim}: a process

REFUSED = {      # by the filter, with errno 1
    "read a file": "io.open('{secret}').read()",
    "read a file through __subclasses__": """
        kinds = [().__class__.__base__]
        for kind in kinds: kinds += [k for k in type.__subclasses__(kind) if k not in kinds]
        [k for k in kinds if k.__name__ == 'FileIO'][0]('{secret}')""",
    "read a file through gc": """
        gc = sys.modules['gc']
        gc.unfreeze()
        [o for o in gc.get_objects() if type(o) is dict and 'FileIO' in o][0]['FileIO']('{secret}')""",
    "read a file through ctypes": "call('open', b'{secret}', 0)",
    "the trainer's environment": "io.open('/proc/{trainer}/environ', 'rb').read()",
    "the trainer's memory": "io.open('/proc/{trainer}/mem', 'rb').read(1)",
    "process_vm_readv": "call('process_vm_readv', {victim}, None, 0, None, 0, 0)",
    "ptrace": "call('ptrace', 16, {victim}, 0, 0)",
    "write a file": "io.open('{canary}', 'w').write('x')",
    "fill the disk": "f = io.open('{canary}', 'wb', 0); [f.write(b'x' * 10**6) for _ in range(100)]",
    "memory file": "os.memfd_create('x')",
    "remove a file": "os.unlink('{secret}')",
    "rename a file": "os.rename('{secret}', '{canary}')",
    "make a folder": "os.mkdir('{canary}')",
    "change a mode": "os.chmod('{secret}', 0)",
    "list a folder": "os.listdir('/')",
    "stat": "os.stat('{secret}')",
    "socket": "call('socket', 2, 1, 0)",
    "local socket": "call('socketpair', 1, 1, 0, ctypes.create_string_buffer(8))",
    "fork": "os.fork() or os._exit(0)",
    "vfork": "call('vfork')",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'touch {canary}'])",
    "spawn": "os.posix_spawn('/bin/sh', ['sh', '-c', 'touch {canary}'], {{}})",
    "thread": "sys.modules['_thread'].start_new_thread(print, ())",
    "kill a process": "os.kill({victim}, 9)",
    "kill the trainer": "os.kill({trainer}, 9)",
    "signal helper and siblings": "os.kill(-1, 0)",
    "stop its group": "os.kill(0, signal.SIGSTOP)",
    "leave the group": "os.setsid()",
    "trace children": "call('prctl', 36, 1, 0, 0, 0)",
    "raise a limit": "call('setrlimit', 0, ctypes.create_string_buffer(b'\\xff' * 16))",
    "raise a limit of another": "call('prlimit', {trainer}, 0, None, ctypes.create_string_buffer(16))",
    "ignore SIGXCPU": "signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
    "close the pipe": "os.close(3)",
    "replace the pipe": "os.dup2(1, 3)",
    "read from the pipe": "os.read(3, 1)",
    "write to a fourth descriptor": "os.write(4, b'x')",
    "terminal": "os.open('/dev/tty', os.O_RDWR)",
    "terminal's size": "call('ioctl', 1, 0x5414, 0)",
    "become root": "os.setuid(0)",
    "new namespace": "call('unshare', 0x10000000)",
    "change the root": "os.chroot('/tmp')",
    "io_uring": "call('syscall', 425, 8, 0)",
    "bpf": "call('syscall', 321, 0, 0, 0)",
    "sleep": "sys.modules['time'].sleep(60)",
}

ENDED = {        # by a limit or its own doing: no value
    "endless loop": "while True: pass",
    "endless loop that catches everything": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "lock that never opens": "lock = sys.modules['_thread'].allocate_lock()\nlock.acquire()\nlock.acquire()",
    "10 GB string": "return len('x' * 10**10)",
    "700 MB": "return 18 + 0 * len('x' * (700 << 20))",
    "growing list": "x = []\nwhile True: x.append('x' * 10**6 + str(len(x)))",
    "huge power": "return 9 ** 9 ** 9",
    "huge int to str": "sys.set_int_max_str_digits(0)\nreturn str(3 ** 10**7)",
    "catastrophic regex": "import re\nreturn bool(re.match('(a+)+$', 'a' * 50 + 'b')) + 1",
    "deep recursion": "def f(): return f()\nreturn f()",
    "overflow of the C stack": "sys.setrecursionlimit(10**9)\nf = lambda x: max([1, 2], key=f)\nreturn f(1)",
    "null pointer": "return ctypes.string_at(0)",
    "abort": "os.abort()",
    "sys.exit": "sys.exit()",
    "sys.exit with a value": "sys.exit(18)",
    "os._exit": "os._exit(0)",
    "SystemExit": "raise SystemExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "BaseException": "raise BaseException",
    "hostile exception": "class E(Exception):\n  __str__ = __repr__ = lambda s: os._exit(0)\nraise E",
    "hostile __float__": "class F(float):\n  def __float__(s): raise KeyboardInterrupt\nreturn F(18)",
    "hostile __class__": "class A:\n  __class__ = property(lambda s: float)\nreturn A()",
    "object": "class A:\n  __float__ = lambda s: 18.0\n  __eq__ = lambda s, o: True\nreturn A()",
    "metaclass": "class M(type):\n  __instancecheck__ = lambda *a: True\nclass A(metaclass=M): pass\nreturn A",
    "drip of output": "while True: os.write(3, b' ')",
    "flood of output": "while True: os.write(3, b'[' * 10**6)",
    "valid result, then hanging": "os.write(3, b'5.0')\nwhile True: pass",
    "two results": "os.write(3, b'5.0')\nreturn 18",
    "patched json": "json.dumps = lambda *a, **k: '[' * 10**5\nreturn 18",
    "patched float": "builtins.float = lambda x: {'a': x}\nreturn 18",
    "patched builtins": "builtins.isinstance = builtins.len = builtins.getattr = None\nreturn 18",
    "patched exit": "os._exit = sys.exit = lambda *a: None\nos.write = print\nreturn 18",
    "patched write": "os.write = lambda *a: 1 / 0\nreturn 18",
}

FORGED = {       # bytes written into the result pipe -> value
    "JSON int": (b"18", None), "NaN": (b"NaN", None), "Infinity": (b"-Infinity", None), "1e999": (b"1e999", None),
    "true": (b"true", None), "list": (b"[18.0]", None), "object": (b'{"a": 1.0}', None), "nested": (b"[" * 15000, None),
    "long int": (b"1" * 15000, None), "not UTF-8": (b'"\xff\xfe', None), "null bytes": (b"\0" * 100, None),
    "nothing": (b"", None), "too long": (b'"' + b"a" * 40000 + b'"', None),
    "pickle": (b"cos\nsystem\n(S'touch {canary}'\ntR.", None),
    "the helper's protocol": (b'\n[0, "5.0"]\n[1, "5.0"]\n[null, "x"]\n', None),
    "long str": (b'"' + b"a" * 15000 + b'"', "a" * 1000), "surrogate": (b'"\\ud800"', "?"),
    "float: its own value": (b"5.0", 5.0),
}

HARMLESS = {     # tricks that change nothing: still 18
    "10 MB to stdout and stderr": "for f in [sys.stdout, sys.stderr] * 5:\n  f.write('x' * 10**6)\nreturn 18",
    "prints the protocol": "print('[0, \"5.0\"]\\n18', flush=True)\nos.write(1, b'[0, \"5.0\"]\\n')\nreturn 18",
    "__del__ writes": "class A:\n  __del__ = lambda s: os.write(3, b'5.0')\nglobal a\na = A()\nreturn 18",
    "atexit writes": "if 'atexit' in sys.modules:\n  sys.modules['atexit'].register(os.write, 3, b'5.0')\nreturn 18",
    "200 MB": "return 18 + 0 * len('x' * (200 << 20))",
    "patched os": "os.fork = os.waitpid = os.kill = os.close = None\nreturn 18",
    "float subclass": "class F(float):\n  __repr__ = __str__ = lambda s: '5.0'\nreturn F(18)",
    "sees no environment": "return 18 if 'SANDBOX_TEST_SECRET' not in os.environ else 5",
    "is no copy of the trainer": "return 5 if 'pytest' in sys.modules or 'torch' in sys.modules else 18",
}


def attacks(**paths):
    """name -> (program, its value)."""
    programs = {f"refused: {k}": (attempt(v.format(**paths)), "errno 1") for k, v in REFUSED.items()} if FILTER else {}
    programs |= {f"ended: {k}": (function(v), None) for k, v in ENDED.items()}
    for k, (data, value) in FORGED.items():
        data = data.replace(b"{canary}", os.fsencode(paths["canary"]))
        programs[f"forged: {k}"] = function(f"os.write(3, {data!r})\nos._exit(0)"), value
    return programs | {f"harmless: {k}": (function(v), 18.0) for k, v in HARMLESS.items()}


@pytest.fixture(scope="module")
def open_folder():
    """Makes folders that other users may enter, unlike those of pytest's tmp_path."""
    folders = []

    def make(mode):
        folders.append(Path(tempfile.mkdtemp()))
        folders[-1].chmod(mode)
        return folders[-1]

    yield make
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def attacked(open_folder):
    """All attacks in one batch, a good program after each: (values of the attacks, of the good ones, folder, victim)."""
    folder = open_folder(0o777)
    secret, victim = folder / "secret", subprocess.Popen(["sleep", "100"])
    secret.write_text("secret")
    programs = attacks(secret=secret, canary=folder / "canary", victim=victim.pid, trainer=os.getpid())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_reft, "CPU_SECONDS", 1)
        patch.setattr(ppo_reft, "WALL_SECONDS", 2)
        patch.setenv("SANDBOX_TEST_SECRET", "secret")
        values = run_programs([text for attack, _ in programs.values() for text in (attack, GOOD)])
    yield dict(zip(programs, values[::2])), values[1::2], folder, victim
    victim.kill()
    victim.wait()


PATHS = dict(secret="/secret", canary="/canary", victim=0, trainer=0)


@pytest.mark.parametrize("name", attacks(**PATHS))
def test_attack(attacked, name):
    value = attacks(**PATHS)[name][1]
    assert attacked[0][name] == value and type(attacked[0][name]) is type(value)


def test_attacks_leave_no_trace(attacked):
    _, good, folder, victim = attacked
    assert good == [18.0] * len(good)
    assert [p.name for p in folder.iterdir()] == ["secret"] and (folder / "secret").read_text() == "secret"
    assert victim.poll() is None


@pytest.mark.parametrize("cpu, wall, name", [(1, 40, "endless loop"), (40, 1, "endless loop")])
def test_each_limit_alone(monkeypatch, cpu, wall, name):
    monkeypatch.setattr(ppo_reft, "CPU_SECONDS", cpu)
    monkeypatch.setattr(ppo_reft, "WALL_SECONDS", wall)
    start = time.monotonic()
    assert run_programs([function(ENDED[name]), GOOD]) == [None, 18.0]
    assert time.monotonic() - start < 20


def standalone(folder):
    """The sandbox alone as a module in `folder`, for processes that may not read the scripts or should start fast."""
    parts = ["import inspect, json, math, os, subprocess, sys, warnings\nfrom contextlib import suppress"]
    constants = "CPU_SECONDS", "WALL_SECONDS", "MAX_CHARS", "PROGRAM_HELPER"
    parts += [f"{name} = {getattr(ppo_reft, name)!r}" for name in constants]
    (folder / "sandbox.py").write_text("\n".join(parts) + "\n" + inspect.getsource(run_programs))
    return {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: all other tests ran as a plain user")
def test_attacks_as_plain_user(attacked, open_folder):
    """The same batch from a trainer that is not root, with a Python that such a user can start."""
    env, user = standalone(open_folder(0o755)), dict(user=12345, group=12345, extra_groups=[])
    for python in sys.executable, "/usr/local/bin/python3", "/usr/bin/python3":
        try:
            if not subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], **user).returncode:
                break
        except OSError:
            continue
    else:
        pytest.skip("no Python 3.11 that a plain user can start")
    victim = subprocess.Popen(["sleep", "100"], **user)
    canary = attacked[2] / "canary"
    programs = attacks(secret=attacked[2] / "secret", canary=canary, victim=victim.pid, trainer=victim.pid)
    script = ("import json, sandbox, sys; sandbox.CPU_SECONDS, sandbox.WALL_SECONDS = 1, 2\n"
              "print(json.dumps(sandbox.run_programs(json.load(sys.stdin))))")
    done = subprocess.run([python, "-c", script], env=env, input=json.dumps([text for text, _ in programs.values()]),
                          text=True, stdout=subprocess.PIPE, **user)
    assert dict(zip(programs, json.loads(done.stdout))) == {name: value for name, (_, value) in programs.items()}
    assert victim.poll() is None and not canary.exists()
    victim.kill()
    victim.wait()


# ------------------------------------------------------------------------------------------- the layers under the filter

@needs_filter
def test_without_filter(monkeypatch, open_folder):
    """Without seccomp a warning, programs run, and limits, user and network namespace still hold."""
    assert NO_FILTER != ppo_reft.PROGRAM_HELPER
    monkeypatch.setattr(ppo_reft, "PROGRAM_HELPER", NO_FILTER)
    monkeypatch.setattr(ppo_reft, "WALL_SECONDS", 1)
    root, own_network = os.geteuid() == 0, "import ctypes, os; os._exit(ctypes.CDLL(None).unshare(%d) != 0)"
    own_network = not subprocess.run([sys.executable, "-c", own_network % (0x40000000 if root else 0x50000000)]).returncode
    if root and "4294967295" not in open("/proc/self/uid_map").read():
        pytest.skip("root of a user namespace, there is no other user to become")
    server, victim = socket.create_server(("127.0.0.1", 0)), subprocess.Popen(["sleep", "100"])
    address = bytes((2, 0, *divmod(server.getsockname()[1], 256), 127, 0, 0, 1)) + bytes(8)
    connect = f"os.close(0); call('socket', 2, 1, 0); call('connect', 0, ctypes.create_string_buffer({address!r}), 16)"
    programs = {GOOD: 18.0, attempt("os.fork() or os._exit(0)"): "errno 11", attempt("io.open('/etc/passwd')"): "errno 24",
                attempt(f"os.close(0); io.open('{open_folder(0o777)}/canary', 'wb', 0).write(b'x')"): "errno 27",
                function("sys.modules['time'].sleep(60)\nreturn 18"): None,
                function("os.kill(0, signal.SIGSTOP)\nreturn 18"): None,
                function("os.closerange(0, 100)\nwhile True: pass"): None,
                function("return float(sum(ctypes.CDLL(None).fcntl(fd, 1) >= 0 for fd in range(1000)))"): 4.0,
                function("return float(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"): 0.0,      # dumpable
                function("return float(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))"): 1.0,     # no new privileges
                attempt(f"io.open('/proc/{os.getpid()}/environ')"): "errno 24"}
    if own_network:
        programs[attempt(connect)] = "errno 101"                             # network is unreachable
    if root:
        programs |= {attempt(f"os.kill({victim.pid}, 9)"): "errno 1", function("return float(os.getuid())"): 65534.0,
                     attempt(f"os.close(0); io.open('/proc/{os.getpid()}/environ')"): "errno 13"}
    with pytest.warns(UserWarning, match="no system-call filter"):
        values = run_programs(list(programs))
    assert values == list(programs.values())
    assert victim.poll() is None
    victim.kill()
    victim.wait()
    server.close()


# ------------------------------------------------------------------------------------ helper and trainer come to an end

@pytest.mark.parametrize("helper, values", [
    ("raise SystemExit(1)", [None, None, None]),
    ("import os; os.kill(os.getpid(), 9)", [None, None, None]),
    ("print('[0, \"2.0\"]')", [2.0, 2.0, None]),                 # dies after one program, is started again, dies again
    ("print('x', [], '[0,', '[9, \"1.0\"]', '[\"a\", \"1.0\"]', [0], 7, 'null', '[' * 99999, '[1, \"3.0\"]', sep='\\n')",
     [3.0, 3.0, None]),
    ("import sys; sys.stdout.buffer.write(bytes(range(256)))", [None, None, None]),
])
def test_helper_dies(monkeypatch, helper, values):
    monkeypatch.setattr(ppo_reft, "PROGRAM_HELPER", helper)
    with pytest.warns(UserWarning, match="the helper of run_programs died"):
        assert sorted(map(str, run_programs([GOOD] * 3))) == sorted(map(str, values))
    monkeypatch.undo()
    assert run_programs([GOOD]) == [18.0]


def test_helper_hangs(monkeypatch):
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, timeout, **kwargs: real(*args, timeout=min(timeout, 0.5), **kwargs))
    monkeypatch.setattr(ppo_reft, "PROGRAM_HELPER", "print('[0, \"2.0\"]', flush=True); import time; time.sleep(60)")
    with pytest.warns(UserWarning, match="died"):
        assert run_programs([GOOD] * 3) == [2.0, 2.0, None]


def descendants(pid):
    children = []
    for folder in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{folder}/stat") as f:
                if int(f.read().rsplit(")", 1)[1].split()[1]) == pid:
                    children += [int(folder), *descendants(int(folder))]
        except OSError:
            pass
    return children


@needs_linux
@pytest.mark.parametrize("how, helper", [(signal.SIGINT, ppo_reft.PROGRAM_HELPER), (signal.SIGKILL, ppo_reft.PROGRAM_HELPER),
                                         (signal.SIGKILL, NO_FILTER)], ids=["ctrl-c", "kill", "kill, no filter"])
def test_trainer_dies(tmp_path, monkeypatch, how, helper):
    """Ctrl-C and sudden death: no helper and no program stays."""
    monkeypatch.setattr(ppo_reft, "PROGRAM_HELPER", helper)
    hanging = function(ENDED["lock that never opens"])
    script = f"import sandbox; sandbox.WALL_SECONDS = 50; sandbox.run_programs([{hanging!r}] * 4)"
    trainer = subprocess.Popen([sys.executable, "-c", script], env=standalone(tmp_path), stderr=subprocess.PIPE)
    end, pids = time.monotonic() + 20, []
    try:
        while len(pids) < 2:                                      # helper and a program
            assert time.monotonic() < end and trainer.poll() is None
            time.sleep(0.05)
            pids = descendants(trainer.pid)
        assert os.getsid(trainer.pid) not in map(os.getsid, pids)     # Ctrl-C in a terminal reaches the trainer alone
        time.sleep(0.3)
        trainer.send_signal(how)
        error = trainer.communicate(timeout=10)[1]
    finally:
        trainer.kill()
    assert how != signal.SIGINT or b"KeyboardInterrupt" in error
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}/cmdline") and open(f"/proc/{pid}/cmdline").read()]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


@needs_linux
def test_nothing_left_behind():
    before = set(descendants(os.getpid()))
    run_programs([GOOD, attempt("os.fork()"), function("while True: os.write(3, b'x' * 10**5)")])
    assert set(descendants(os.getpid())) <= before and len(os.listdir("/proc/self/fd")) < 100


# ----------------------------------------------------------------------------------------------------- tests of programs

def test_programs_checked_by_tests():
    """A function against its tests, as in MBPP: 1.0 if all pass. The default argument keeps a tested `solution` apart."""
    def checked(program, *tests):
        body = "".join(f"    {test}\n" for test in tests) + "    return 1.0\n"
        return program + "\n\ndef solution(solution=globals().get('solution')):\n" + body

    tests = "assert add(2, 3) == 5", "assert add(0, 0) == 0"
    programs = [checked("def add(a, b):\n    return a + b", *tests), checked("def add(a, b):\n    return a * b", *tests),
                checked("def add(a, b):\n    pass", *tests), checked("def add(a, b):\n    return (a", *tests),
                checked("def solution(a, b):\n    return a + b", "assert solution(2, 3) == 5"),
                checked("def solution():\n    return 1.0", *tests)]
    assert run_programs(programs) == [1.0, None, None, None, 1.0, None]


# ---------------------------------------------------------------------------------------------------------------- speed

def test_speed():
    """Hundreds of programs a second on two cores; the floor is low, since other work may share them."""
    program = ('def solution():\n    """A has {0} apples and buys 5."""\n    apples = {0}\n    bought = 5\n'
               '    result = apples + bought\n    return result')
    start, programs = time.perf_counter(), [program.format(i) for i in range(256)]
    assert run_programs(programs) == run_programs(programs) == [i + 5.0 for i in range(256)]
    rate = 512 / (time.perf_counter() - start)
    print(f"{rate:.0f} programs/s")
    assert rate > 100
