"""Programs that a model wrote: what they are worth, what they cannot do, and whether they pass tests (score.py's --task code)."""
import ast
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

import score
import ppo_reft as programs
from model import InputError

run_programs = programs.run_programs
GOOD = "def solution():\n    return 18"
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def function(body):
    """A program whose solution() has this body."""
    return "def solution():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ")


# ---- what a program is, and what it is worth ---------------------------------------------------------------------------------

VALUES = {
    "blank line in the body": ("def solution():\n    a = 9\n\n    return a * 2", 18.0),
    "blank line in the docstring": ('def solution():\n    """One.\n\n    Two."""\n    return 18', 18.0),
    "helper before": ("def double(x):\n    return 2 * x\n\ndef solution():\n    return double(9)", 18.0),
    "helper after": ("def solution():\n    return double(9)\n\ndef double(x):\n    return 2 * x", 18.0),
    "module constant": ("N: int = 8\nN += 1\ndef solution():\n    return 2 * N", 18.0),
    "loop at top level": ("T = []\nfor i in range(19):\n    T.append(i)\ndef solution():\n    return T[-1]", 18.0),
    "class": ("class A:\n    x = 18\ndef solution():\n    return A.x", 18.0),
    "prose after the function": (GOOD + "\n\nTherefore, the answer is 18. It's done (I hope.", 18.0),
    "prose that parses": (GOOD + "\nTherefore\nanswer: eighteen\nassert False\nif True:\n    raise ValueError", 18.0),
    "print after the function": (GOOD + "\nprint(solution())\nprint(1 / 0)", 18.0),
    "exit after the function": (GOOD + "\nraise SystemExit", 18.0),
    "prints inside": ("def solution():\n    print('x' * 100000)\n    return 18", 18.0),
    "a line that joins the next": (GOOD + "\nx = \\", 18.0),
    "Windows line ends": (GOOD.replace("\n", "\r\n") + "\r\n18!\r\nIt's.", 18.0),
    "old Mac line ends": (GOOD.replace("\n", "\r") + "\r18!\rIt's.", 18.0),
    "name that is not ascii": ("größe = 18\ndef solution():\n    return größe", 18.0),
    "math without import": ("def solution():\n    return math.sqrt(324)", 18.0),
    "imports": ("from __future__ import annotations\nimport datetime\nimport string\nfrom collections import Counter\n"
                "def solution():\n    return datetime.date(2024, 1, 18).day + len(string.digits) - 10", 18.0),
    "decimal": ("from decimal import Decimal\ndef solution():\n    return Decimal('18.5')", 18.5),
    "text": ("def solution():\n    return '18 apples'", "18 apples"),
    "text of quotes": ("def solution():\n    return '\"18\\''", "\"18'"),
    "empty text": ("def solution():\n    return ''", ""),
    "long text": ("def solution():\n    return '\\U0001f34e' * 10**6", "\U0001f34e" * 1000),
    "lone surrogate": ("def solution():\n    return 'a\\ud800'", "a\ufffd"),
    "null character in a text": ("def solution():\n    return '\0'", "\0"),
    "no return": ("def solution():\n    x = 18", None),
    "cut inside an expression": ("def solution():\n    a = 18\n    return (a +", None),
    "cut inside a line": ("def solution():\n    a = 18\n    retu", None),
    "True": ("def solution():\n    return True", None),
    "list": ("def solution():\n    return [18]", None),
    "dict": ("def solution():\n    return {18: 18}", None),
    "bytes": ("def solution():\n    return b'18'", None),
    "function": ("def solution():\n    return solution", None),
    "object": ("class A:\n    pass\ndef solution():\n    return A()", None),
    "nan": ("def solution():\n    return float('nan')", None),
    "inf": ("def solution():\n    return -math.inf", None),
    "complex": ("def solution():\n    return 18 + 0j", None),
    "beyond 2**53": ("def solution():\n    return 2**60 + 1", 2.0**60),
    "int too large for a float": ("def solution():\n    return 10**400", None),
    "int too long to print": ("def solution():\n    return 10**5000", None),
    "text of a large int": ("def solution():\n    return str(10**400)", "1" + "0" * 400),
    "quotient of large ints": ("def solution():\n    return math.factorial(3000) // math.factorial(2999)", 3000.0),
    "remainder of large ints": ("def solution():\n    return divmod(10**9000 + 7, 10**4000)[1]", 7.0),
    "Decimal too large": ("from decimal import Decimal\ndef solution():\n    return Decimal('1e999')", None),
    "exception": ("def solution():\n    return 1 / 0", None),
    "needs an argument": ("def solution(x):\n    return 18", None),
    "no solution": ("def answer():\n    return 18", None),
    "nothing": ("", None),
    "not Python": ("The answer is 18.", None),
    "null character": ("def solution():\n    return 18\0", None),
    "lone surrogate in the program": ("def solution():\n    return '\ud800'", None),
    "deep brackets": ("def solution():\n    return " + "(" * 50000 + "18" + ")" * 50000, None),
    "deep signs": ("def solution():\n    return " + "-" * 500000 + "18", None),
    "200 kB of prose after": (GOOD + "\nIt's 18. " * 20000, 18.0),
    "long code": ("def solution():\n    x = 0\n" + "    x += 1\n" * 5000 + "    return x - 4982" + " " * 10**6, 18.0),
}


@pytest.fixture(scope="module")
def values():
    return dict(zip(VALUES, run_programs([text for text, _ in VALUES.values()])))


@pytest.mark.parametrize("name", VALUES)
def test_value(values, name):
    value = VALUES[name][1]
    assert values[name] == value and type(values[name]) is type(value)


def test_same_value_each_time_and_beside_any_neighbour():
    program = ("import random, time\ndef solution():\n    letters = ''.join({'a', 'b', 'c', 'd', 'e', 'f'})\n"
               "    return f'{random.random()} {letters} {time.time()} {hash(letters)} {id(letters)}'")
    neighbour = "import random\nrandom.seed(7)\nx = [object] * 999\ndef solution():\n    return random.random()"
    alone, = run_programs([program])
    assert len(alone) > 30
    found = run_programs([neighbour, program] * 4)
    assert found[1::2] == [alone] * 4 and found[::2] == run_programs([neighbour]) * 4


def test_nothing_of_a_program_is_left_for_the_next():
    makes = "x = 18\ndef helper():\n    return 18\n" + GOOD
    for name in "x", "helper()", "solution()", "value":
        texts = [makes, "def answer():\n    return 18", f"def solution():\n    return {name}"]
        assert run_programs(texts * 4) == [18.0, None, None] * 4


def test_empty_batch():
    assert run_programs([]) == []


def test_gold_programs():
    names = ["apples", "plums", "pears"]
    texts = [f'def solution():\n    """Ann has {i} {name} and buys {i * 7}."""\n    {name} = {i}\n    bought = {i * 7}\n'
             f"    result = {name} + bought\n    return result" for i in range(100) for name in names]
    assert run_programs(texts) == [8.0 * i for i in range(100) for _ in names]


# ---- threats -----------------------------------------------------------------------------------------------------------------

BOMB = "x = []\nfor i in range(40):\n    x = [x, x]\n"                      # small, but printed it has 2**40 leaves
ENDED = {        # no value
    "endless loop": function("while True: pass"),
    "endless loop at top level": "while True: pass\n" + GOOD,
    "endless loop that catches everything": function("while True:\n  try:\n    while True: pass\n  except BaseException: pass"),
    "endless loop when printed": "class A:\n  def __repr__(s):\n    while True: pass\ndef solution():\n  return A()",
    "endless comparison": "class A:\n  def __eq__(s, o):\n    while True: pass\ndef solution():\n  return A() == 5",
    "endless iterator": function("import itertools\nreturn sum(1 for _ in itertools.count())"),
    "endless sum": function("return sum(range(10**15))"),
    "sleep": function("import time\ntime.sleep(60)\nreturn 18"),
    "asynchronous sleep": function("import asyncio\nasyncio.run(asyncio.sleep(60))\nreturn 18"),
    "clock that stands still": function("import time\nend = time.time() + 1\nwhile time.time() < end: pass\nreturn 18"),
    "10 GB string": function("return len('x' * 10**10)"),
    "10 GB format": function("return len(f'{5:10000000000}')"),
    "700 MB": function("return 18 + 0 * len('x' * (700 << 20))"),
    "growing list": function("x = []\nwhile True: x.append('x' * 10**6 + str(len(x)))"),
    "allocation that ends the worker": function("return len(('a,' * 10**7).split(','))"),
    "the same at top level": "x = ('a,' * 10**7).split(',')\n" + GOOD,
    "huge power": function("return 9 ** 9 ** 9"),
    "huge shift": function("return 1 << 10**12"),
    "huge products": function("x = 3\nfor i in range(60): x = x * x\nreturn x"),
    "huge factorial": function("return math.factorial(10**9)"),
    "huge int to str": function("return str(3 ** 10**6)"),
    "catastrophic regex": function("import re\nreturn len(re.findall(r'(x+x+)+y(?<=z)', 'x' * 60)) + 1"),
    "deep recursion": function("def f(): return f()\nreturn f()"),
    "deep list": "x = []\nfor i in range(10**6): x = [x]\ndef solution():\n    return x",
    "list that holds itself": function("x = []\nx.append(x)\nreturn x"),
    "list that explodes when printed": BOMB + "def solution():\n    return x",
    "raised text of 100 MB": function("raise ValueError('x' * 10**8)"),
    "prints without end": function("while True: print('x' * 1000)"),
    "sys.exit": function("import sys\nsys.exit()"),
    "SystemExit": function("raise SystemExit(18)"),
    "KeyboardInterrupt": function("raise KeyboardInterrupt"),
    "os._exit": function("import os\nos._exit(0)"),
    "os.abort": function("import os\nos.abort()"),
    "read a file": function("return open('{secret}').read()"),
    "read a file by pathlib": function("import pathlib\nreturn pathlib.Path('{secret}').read_text()"),
    "write a file": function("open('{canary}', 'w').write('x')\nreturn 18"),
    "write a file by pathlib": function("import pathlib\npathlib.Path('{canary}').write_text('x')\nreturn 18"),
    "make a folder": function("import os\nos.mkdir('{canary}')\nreturn 18"),
    "remove a file": function("import os\nos.remove('{secret}')\nreturn 18"),
    "rename a file": function("import os\nos.rename('{secret}', '{canary}')\nreturn 18"),
    "list a folder": function("import os\nreturn str(os.listdir('/'))"),
    "environment": function("import os\nreturn os.environ['SANDBOX_TEST_SECRET']"),
    "getenv": function("import os\nreturn os.getenv('SANDBOX_TEST_SECRET')"),
    "a shell": function("import os\nreturn os.system('touch {canary}')"),
    "fork": function("import os\nreturn os.fork()"),
    "signal": function("import os\nos.kill({victim}, 9)\nreturn 18"),
    "socket": function("import socket\nreturn socket.create_connection(('127.0.0.1', {port})).fileno()"),
    "urllib": function("import urllib.request\nreturn urllib.request.urlopen('http://127.0.0.1:{port}').status"),
    **{f"import {name}": function(f"import {name}\nreturn 18") for name in
       "subprocess ctypes threading multiprocessing signal importlib builtins gc inspect pickle shutil tempfile torch".split()},
    "__import__": function("return __import__('os').getpid()"),
    "__subclasses__": function("return len(().__class__.__base__.__subclasses__())"),
    "globals of a function": function("return str(solution.__globals__)"),
    "frames": function("import sys\nreturn str(sys._getframe(1).f_globals)"),
    "modules": function("import sys\nreturn str(sys.modules)"),
    "input": function("return input()"),
    **{f"5,000 lines of {line!r}": f"{line}\n" * 5000 for line in ["(", "if 1:", "try:", "@x", '"""', "x = [", "\\", "def f():"]},
    "5,000 deeper and deeper lines": "\n".join(" " * i + "if 1:" for i in range(5000)),
    "10 MB of code": "x = 1\n" * 2_500_000 + GOOD,
    "10 MB of prose": "It's 18. (\n" * 10**6,
}
HARMLESS = {     # tricks that change nothing: still 18
    "prints 1 MB": function("for i in range(10): print('x' * 10**5)\nreturn 18"),
    "list that explodes when printed, as the last line": BOMB + GOOD + "\nx",
    "the same, raised": BOMB + GOOD + "\nraise ValueError(x)",
    "int that cannot be printed, as the last line": GOOD + "\n10**5000",
    "its own type, repr, float": "type = repr = float = str = lambda *a: 5\n" + GOOD,
    "its own value": "value = 5\n" + GOOD + "\nvalue = 5",
    "50 MB": function("return 18 + 0 * len('x' * (50 << 20))"),
    "5,000 wrong lines after": GOOD + "\n" + "x = '\n" * 5000,
    "a helper that is not implemented": f"def helper():\n    raise NotImplementedError\n{GOOD}\nhelper()",
    **{f"after it {line!r}, which Monty lacks": f"{GOOD}\n{line}" for line in [
        "def g():\n    yield 1", "class B(int): pass", "from math import *", "raise NotImplementedError"]},
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """All attacks in one batch with shorter limits, a good program after each: (values, values of the good ones, folder,
    process that must live, server that nobody may reach, seconds)."""
    folder, victim = tmp_path_factory.mktemp("attacked"), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (folder / "secret").write_text("secret")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    places = {"{secret}": folder / "secret", "{canary}": folder / "canary", "{victim}": victim.pid,
              "{port}": server.getsockname()[1]}
    texts = list((ENDED | HARMLESS).values())
    for name, place in places.items():
        texts = [text.replace(name, str(place)) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "LIMITS", programs.LIMITS | {"max_feed_duration_secs": 0.5})
        patch.setenv("SANDBOX_TEST_SECRET", "secret")
        start = time.monotonic()
        values = run_programs([text for attack in texts for text in (attack, GOOD)])
    yield dict(zip(ENDED | HARMLESS, values[::2])), values[1::2], folder, victim, server, time.monotonic() - start
    victim.kill()
    victim.wait()
    server.close()


@pytest.mark.parametrize("name", ENDED | HARMLESS)
def test_attack(attacked, name):
    assert attacked[0][name] == (18.0 if name in HARMLESS else None)


def test_attacks_leave_no_trace(attacked):
    _, good, folder, victim, server, seconds = attacked
    assert good == [18.0] * len(good)
    assert [path.name for path in folder.iterdir()] == ["secret"] and (folder / "secret").read_text() == "secret"
    assert victim.poll() is None
    with pytest.raises(BlockingIOError):
        server.accept()
    assert seconds < 3 * len(ENDED)


def test_limits_as_they_are():
    start = time.monotonic()
    assert run_programs([ENDED["endless loop"], ENDED["endless loop at top level"], GOOD]) == [None, None, 18.0]
    assert 2.5 < time.monotonic() - start < 10                             # 3 s each, two at a time or one after the other
    sizes = [function(f"return len('x' * ({size} << 20))") for size in (100, 300)]
    assert run_programs(sizes) == [100 * 2**20, None]
    assert run_programs([ENDED["the same at top level"], GOOD]) == [None, 18.0]


def test_the_trainer_does_not_grow():
    """Of what a program makes only a short text comes here: neither what solution() returns nor what its last line yields."""
    tracemalloc.start()
    assert run_programs(["def solution():\n    return [0] * 10**6", GOOD + "\n[0] * 10**6"]) == [None, 18.0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 10**6                                                # 8 MB as a list


# ---- the workers -------------------------------------------------------------------------------------------------------------

def children(pid=None):
    """Ids of the living processes that this one, or pid, started."""
    found = []
    for folder in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = open(f"/proc/{folder}/stat").read().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == (pid or os.getpid()) and state != "Z":
            found.append(int(folder))
    return found


@needs_linux
def test_workers_that_are_killed_are_replaced():
    """As by Ctrl-C in a terminal, which every process of the run gets: the values are those of an undisturbed run."""
    before, busy = set(children()), function("x = 0\nfor i in range(2 * 10**6): x += 1\nreturn x")
    killed = []

    def kill():
        end = time.monotonic() + 10
        while not killed and time.monotonic() < end:
            time.sleep(0.1)
            killed.extend(set(children()) - before)
        for pid in killed:
            os.kill(pid, signal.SIGINT)

    thread = threading.Thread(target=kill)
    thread.start()
    found = run_programs([busy] * 4)
    thread.join()
    assert killed and found == [2e6] * 4


@needs_linux
def test_no_worker_outlives_a_batch_or_the_trainer():
    before = set(children())
    assert run_programs([GOOD, ENDED["the same at top level"]]) == [18.0, None]
    assert set(children()) <= before and len(os.listdir("/proc/self/fd")) < 100
    parts = ["import datetime, functools, math, os, re, time", "from concurrent.futures import ThreadPoolExecutor",
             "from contextlib import ExitStack, suppress"]                               # alone: the scripts take seconds to import
    parts += [f"{name} = {getattr(programs, name)!r}" for name in ("LIMITS", "POLICY", "STRING")]
    parts += [inspect.getsource(getattr(programs, name)) for name in ("run_programs", "run_program", "printed_value")]
    script = "\n".join([*parts, f"run_programs([{ENDED['endless loop']!r}] * 4)"])
    trainer = subprocess.Popen([sys.executable, "-c", script])
    end = time.monotonic() + 30
    while not (workers := children(trainer.pid)):
        assert time.monotonic() < end and trainer.poll() is None
        time.sleep(0.05)
    trainer.kill()
    trainer.wait()
    while any(os.path.exists(f"/proc/{pid}/cmdline") and open(f"/proc/{pid}/cmdline").read() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["not installed", "no worker"])
def test_what_is_missing_is_said(monkeypatch, how):
    if how == "not installed":
        monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    else:
        monkeypatch.setenv("MONTY_BIN", "/nowhere/monty")
    with pytest.raises(InputError, match="pip install pydantic-monty") as error:
        run_programs([GOOD])
    assert "\n" not in str(error.value)


def test_only_runs_with_programs_import_the_package():
    imports = [line for line in Path(programs.__file__).read_text().splitlines() if re.match("import|from", line)]
    assert len(imports) > 3 and "pydantic_monty" not in "".join(imports)


def test_speed():
    """Over a thousand programs a second on two idle cores; the floor is low, since other work may share them."""
    start, texts = time.perf_counter(), [f"def solution():\n    apples = {i}\n    return apples + 5" for i in range(500)]
    assert run_programs(texts) == [i + 5.0 for i in range(500)]
    rate = len(texts) / (time.perf_counter() - start)
    print(f"{rate:.0f} programs/s")
    assert rate > 100


# ---- a program's def line and docstring --------------------------------------------------------------------------------------

QUESTIONS = [
    "How many?", 'Is it her "full face?"', 'Is it """3"""?', '""""', '"', '""', '"""""', 'a""b"', '\\"""', 'Is it \\"', "\\", "'''",
    r"What is \underline{3} + 5?", r"Find \xi.", r"How many in \N are below 5?", "What is 3\\", "What is 3\\\\",
    r"Find $\frac{1}{2}$.",
    "One.\n\nTwo?", "A tab\tand a null \0, 0\x000.", "A\rB\r\nC", "", "{question} {0} %s", "é \u2028 \U0001f34e \x0c \x85", " 'a' "]


@pytest.mark.parametrize("question", QUESTIONS)
def test_header_is_a_docstring_of_the_question(question):
    program = programs.program_header(question) + "    return 18"
    assert ast.literal_eval(ast.parse(program).body[0].body[0].value) == question
    assert run_programs([program, programs.program_header(question) + "    x = (\n    return 18"]) == [18.0, None]


def test_header_of_a_plain_question_is_the_papers():
    for question in "How many?", "Ann's 3 pens cost $5, Bob's \"blue\" one 10%.\n{x} a ) 3", "Bob’s car":
        assert programs.program_header(question) == f'def solution():\n    """{question}"""\n'


def test_header_of_a_lone_surrogate():
    assert run_programs([programs.program_header("a \ud800 b") + "    return 18"]) == [18.0]


@pytest.mark.parametrize("program", [
    'def solution():\n    """How many?"""\n    a = 9\n\n    return a * 2',
    'def solution():\n    """Reworded.\n\n    Over \\""" lines."""\n    a = 9\n    return a * 2',
    "def solution():\n    '''How \"\"\" many?'''\n    return 18", "def solution() -> int:\n\n    '''How many?'''\n\n    return 18",
    "def solution():\n    return 18", "def solution():\n    'How many?'\n    return 18", "def solution():\r\n    return 18",
    'import math\nimport re\n\ndef double(x):\n    return 2 * x\n\ndef solution():\n    """Q"""\n    return double(9)',
    "def solution():\n    text = '''a'''\n    return 17 + len(text)"])
def test_body_follows_any_header(program):
    body = programs.program_body(program)
    assert '"""' not in body and run_programs([program, programs.program_header('What "now"') + body]) == [18.0, 18.0]


def test_header_and_body_are_the_demonstration():
    program = 'def solution():\n    """How many?"""\n    a = 9\n    return a * 2'
    assert programs.program_header("How many?") + programs.program_body(program) == program
    assert programs.program_body("def answer():\n    return 18") is None and programs.program_body("x") is None


# ---- score.py --task code ----------------------------------------------------------------------------------------------------

PLUS = "def plus(x):\n    return x + 1"
RECORD = {"text": "Add 1.", "code": PLUS, "test_list": ["assert plus(1) == 2", "assert plus(-1) == 0"]}
HUMANEVAL = {"task_id": "HumanEval/0", "entry_point": "double", "canonical_solution": "    return List and half(4 * x)\n",
             "prompt": "from typing import List\n\ndef half(x):\n    return x / 2\n\ndef double(x: int):\n"
                       "    \"\"\" >>> double(2)\n    4\n    \"\"\"\n",
             "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
                     "    assert half(candidate(5)) == 5"}


def problem_of(raw=RECORD, **changed):
    return score.parse_code(raw | changed, "here")


def outcomes(responses, problem):
    return score.passes([score.read_program(text, problem) for text in responses], [problem] * len(responses)).tolist()


def test_right_programs_pass_and_wrong_and_empty_ones_fail():
    problem, half = problem_of(), "def plus(x):\n    return x + 1 if x > 0 else x"
    assert score.passes([PLUS, half, "def plus(x):\n    pass", "", None, "def minus(x): return x", PLUS], [problem] * 7).tolist() \
        == [1, 0, 0, 0, 0, 0, 1]


FENCED = {
    "no fence": PLUS, "closed": f"```python\n{PLUS}\n```", "no language": f"```\n{PLUS}\n```",
    "python3": f"```python3\n{PLUS}\n```",
    "upper case": f"```Python\n{PLUS}\n```", "blank before the language": f"``` py\n{PLUS}\n```",
    "braces": f"```{{python}}\n{PLUS}\n```",
    "attributes": f"```{{.python .numberLines startFrom=\"1\"}}\n{PLUS}\n```", "title": f"```python title=\"a\"\n{PLUS}\n```",
    "tildes": f"~~~python\n{PLUS}\n~~~", "more ticks": f"`````\n{PLUS}\n`````", "unclosed": f"Sure:\n```python\n{PLUS}",
    "longer end": f"```\n{PLUS}\n`````\nDone.", "blanks around": f"```python  \n{PLUS}\n ```  \nDone.",
    "Windows line ends": f"```python\n{PLUS}\n```\nDone.".replace("\n", "\r\n"), "old Mac": f"```\n{PLUS}\n```".replace("\n", "\r"),
    "list item": "1. Code:\n\n  ```python\n  def plus(x):\n      return x + 1\n  ```\n2. Done.",
    "tabs": "\t```\n\tplus = lambda x: x + 1\n\t```",
    "fence behind prose": f"Code: ```python\n{PLUS}\n```", "end behind code": f"```python\n{PLUS}```\nDone.",
    "tags": f"[PYTHON]\n{PLUS}\n[/PYTHON]", "tags of MBPP's prompts": f"[BEGIN]\n{PLUS}\n[DONE]",
    "prose before": f"Here is the program:\n\n{PLUS}", "prose around": f"Sure! It's:\n\n{PLUS}\n\nIt adds one. It's simple.",
    "indented, no fence": "Code:\n\n    def plus(x):\n        return x + 1\n\nDone.",
    "ticks in prose": f"Use ```plus``` here:\n```\n{PLUS}\n```",
    "fence in a docstring": '```python\ndef plus(x):\n    """Adds.\n\n    ```\n    plus(1)\n    ```\n    """\n'
                            '    return x + 1\n```\nDone.',
    "shell block before": f"```bash\npip install x\n```\n```python\n{PLUS}\n```",
    "output after": f"```python\n{PLUS}\n```\n```\n2\n```",
    "use after": f"```python\n{PLUS}\n```\n```python\nassert plus(1) == 2\nx = plus(2)\nprint(x)\n```",
    "other program after": f"```python\n{PLUS}\n```\n```python\ndef main():\n    print(plus(2))\n```",
    "wrong one before": f"```python\ndef plus(x):\n    return x\n```\nBetter:\n```python\n{PLUS}\n```",
    "a class": "```python\nclass plus(int):\n    pass\n```\nor\n```python\nplus = lambda x: x + 1\n```",
    "annotated": "```\nplus: object = lambda x: x + 1\n```",
    "main": f"{PLUS}\n\nif __name__ == \"__main__\":\n    raise SystemExit(plus(1))",
}


def test_programs_in_fences():
    found = dict(zip(FENCED, outcomes(FENCED.values(), problem_of())))
    assert found == dict.fromkeys(FENCED, 1.0)


def test_the_last_of_two_programs_counts():
    wrong = PLUS.replace("1", "2")
    assert outcomes([f"```\n{PLUS}\n```\n```\n{wrong}\n```", f"```\n{wrong}\n```\n```\n{PLUS}\n```"], problem_of()) == [0, 1]


def test_read_program():
    assert score.read_program("Sure:\n```python\na = 1\n```\nor\n```\nb = 2\n```\nDone.") == "b = 2"
    assert score.read_program("def f():\n    pass\n") == "def f():\n    pass"
    assert score.read_program("```python\na = 1") == "a = 1"
    assert score.read_program("```\ndef f(): pass\n```\n```\n2\n```") == "def f(): pass"
    assert score.read_program("\n") is None and score.read_program("") is None and score.read_program("```\n```") is None


@pytest.mark.parametrize("text", ["~" * 10**5 + "`", "`" * 10**5 + "x`", " " * 10**5 + "x", "a," * 10**5, "```\n" * 10**4])
def test_read_program_takes_no_time(text):
    start = time.process_time()
    score.read_program(text, problem_of())
    assert time.process_time() - start < 2


def test_top_level_statements_are_kept():
    texts = ["table = {}\nfor i in range(-1, 9):\n    table[i] = i + 1\ndef plus(x):\n    return table[x]",
             "n = 0\nwhile n < 1:\n    n += 1\ndef plus(x):\n    return x + n",
             "ones = []\nones.append(1)\ndef plus(x):\n    return x + ones[0]",
             "import sys\nif sys.version_info >= (3,):\n    one = 1\ndef plus(x):\n    return x + one",
             "try:\n    from numpy import one\nexcept ImportError:\n    one = 1\ndef plus(x):\n    return x + one",
             "import sys\nsys.setrecursionlimit(9000)\n"
             "def down(n):\n    return n and 1 + down(n - 1)\ndef plus(x):\n    return x + down(4000) - 3999",
             "from sys import setrecursionlimit\nsetrecursionlimit(10**6)\n" + PLUS,
             PLUS + "\nprint(plus(1))\nprint(plus('a'))\nx = input()",
             "from __future__ import annotations\n" + PLUS, "import string\ndef plus(x):\n    return x + len(string.digits) - 9"]
    assert outcomes(texts, problem_of()) == [1] * len(texts)


def test_tests_keep_their_text():
    """Strings of several lines, tests of several lines, Windows line ends, imports and setup that use the program."""
    bar = "def bar(s):\n    return s.replace('\\n', '|')"
    problem = problem_of(code=bar, test_list=['assert bar("""a\n  b""") == "a|  b"', "for s in 'ab':\n    assert bar(s) == s"])
    assert outcomes([bar, "def bar(s):\n    return s"], problem) == [1, 0]
    raw = {"text": "t", "code": "class Node:\n    left = None", "test_list": ["assert root.left.left is None"],
           "test_setup_code": "root = Node()\r\nroot.left = Node()"}
    assert "Node()" not in problem_of(raw)["question"] and outcomes([raw["code"], "class Node: pass"], problem_of(raw)) == [1, 0]


def test_sanitized_form():
    raw = {"prompt": "Write a root.", "code": "import cmath\ndef root(x):\n    return x ** 0.5", "test_imports": ["import math"],
           "test_list": ["assert math.isclose(root(2), math.sqrt(2))"], "source_file": "x", "task_id": 7}
    problem = problem_of(raw)
    assert problem["question"].startswith("Write a root.\nYour code") and problem["names"] == ["root"] and problem["task_id"] == 7
    assert outcomes(["def root(x):\n    return x ** 0.5", "def root(x):\n    return x"], problem) == [1, 0]


def test_humaneval_form():
    problem = problem_of(HUMANEVAL)
    texts = [problem["cot"], "def double(x):\n    return 2 * half(2 * x)",
             "from __future__ import annotations\ndef double(x):\n    return 2 * x",
             "def double(x):\n    return x", "def half(x):\n    return 5\ndef double(x):\n    return 4 if x == 2 else 7"]
    assert outcomes(texts, problem) == [1, 1, 1, 0, 0]
    assert score.passes([None], [problem]).tolist() == [0]


TRICKS = {
    "a solution of its own, before what does not parse": "def solution():\n    return 1.0\n((",
    "an open string": "def solution():\n    return 1.0\n\"\"\"",
    "an open decorator": "def plus(x): return 0\n@(lambda f: lambda: 1.0)",
    "an open block": "def plus(x): return 0\nif False:", "exit when tested": "def plus(x):\n    raise SystemExit(0)",
    "exit before tests": "def plus(x): return 0\nraise SystemExit(0)", "ends when tested": "def plus(x):\n    while True: pass",
    "equals everything": "class A:\n    def __eq__(self, o): return True\ndef plus(x): return A()",
    "differs from nothing": "class plus:\n    def __init__(self, x): pass\n    def __ne__(self, o): return False",
    "equal by assignment": "class A: pass\nA.__eq__ = lambda s, o: True\ndef plus(x): return A()",
    "no assertions": "AssertionError = None\ndef plus(x): return 0",
    "writes globals": "plus = lambda x: exec('tests = scope = \"\"')",
    "names of the harness": "tests = setup = program = ''\nnames = lines = []\nscope = space = {}\n"
                            "exec = lambda *a: 0\ndef plus(x): return 0",
    "reads the stack": "def plus(x):\n    import sys\n    sys._getframe(1).f_globals.clear()",
    "returns from nowhere": "return 1.0", "a class of that name": "class plus: pass",
    "equal by a name put together": "class A: pass\nsetattr(A, '_' + '_eq_' + '_', lambda s, o: True)\ndef plus(x): return A()",
    "equal by exec": "exec('class A:\\n  def _' + '_eq_' + '_(s, o): return True')\ndef plus(x): return A()",
    "equal by another underscore": "class A:\n    def _\uff3feq__(s, o): return True\ndef plus(x): return A()",
    "a class that equals everything": "class plus:\n    def __init__(s, x): pass\n    def __eq__(s, o): return True",
    "names of the harness, by eval from a frame of the harness":
        "from functools import partial, reduce\nclass A:\n    def __eq__(s, o): return True\nmake = lambda v: A()\n"
        "plus = partial(reduce, isinstance, iter(partial(eval, \"exec('global guarded, PLAIN\\\\nguarded = space[\\\"make\\\"]\\\\n"
        "PLAIN = ()') or 0\"), 0))",
    "equal inside": "class A:\n    def __eq__(s, o): return True\ndef plus(x): return [{1: (A(),)}]",
}


def test_programs_that_would_rather_not_be_tested():
    found = score.passes(list(TRICKS.values()), [problem_of()] * len(TRICKS)).tolist()
    assert dict(zip(TRICKS, found)) == dict.fromkeys(TRICKS, 0.0)


def test_objects_that_compare_as_they_like_do_not_pass_where_tests_would_meet_them():
    """As a part of what is returned, in the arguments, in a class that the tests ask for; for its own use a program may have
    any."""
    loose = "class A:\n    def __eq__(s, o): return True\n"
    inside = problem_of(code="def plus(x):\n    return [{1: x + 1}]", test_list=["assert plus(1) == [{1: 2}]"])
    assert outcomes([inside["cot"], loose + "def plus(x): return [{1: A()}]"], inside) == [1, 0]
    left = problem_of(code="def up(xs):\n    xs[0] += 1", test_list=["xs = [1]\nup(xs)\nassert xs == [2]"])
    assert outcomes([left["cot"], loose + "def up(xs): xs[0] = A()"], left) == [1, 0]
    item = problem_of(code="def plus(x):\n    return [x + 1]", test_list=["assert plus(1)[0] == 2"])
    made = "from collections import defaultdict\n" + loose + "def plus(x): return defaultdict(A)"
    assert outcomes([item["cot"], made], item) == [1, 0]
    twice = problem_of(code=item["cot"], test_list=["a = plus(1)\nb = plus(2)\nassert a == [2]"])
    later = loose + "K = []\ndef plus(x):\n    for k in K: k[0] = A()\n    K.append([0])\n    return K[-1]"
    assert outcomes([twice["cot"], later], twice) == [1, 0]
    asked = problem_of(code="class P:\n    def __init__(self, x): self.x = x", test_list=["assert P(2).x == 2"])
    assert outcomes([asked["cot"], loose + "class P:\n    def __init__(s, x): s.x = A()"], asked) == [1, 0]
    sly = loose + asked["cot"].replace("self.x = x", "setattr(A, '_' + '_eq__', 0); self.x = x")
    assert asked["classes"] == ["P"] and outcomes([sly], asked) == [0]
    assert outcomes([loose + "def plus(x): return x + (A() == 7)"], problem_of()) == [1]


def test_what_right_programs_return_reaches_the_tests():
    imports = "import datetime, re\nfrom collections import Counter, defaultdict, deque\n"
    old = "class P(object):\n    def __init__(self, x): self.x = x\n"
    for value, test in {
            "{x: 2}.keys()": "set(plus(1)) == {1}", "{x: 2}.items()": "list(plus(1)) == [(1, 2)]",
            "lambda y: x + y": "plus(1)(1) == 2", "Counter([x])": "plus(1) == {1: 1} and plus(1)[3] == 0",
            "datetime.date(2020, 1, x)": "plus(1).year == 2020",
            "(deque([x]), {x}, None, int)": "plus(1) == (deque([1]), {1}, None, int)",
            "re.match('1', str(x))": "plus(1)[0] == '1'",
            "[[x] * 3] * 2": "plus(1) == [[1] * 3] * 2", "sorted([x, 0], key=lambda y: y)": "plus(1) == [0, 1]",
            "x.append(2)": "(lambda d: plus(d) or d)(deque([1])) == deque([1, 2])", "P(x).x": "plus(1) == 1",
            "x(1)": "plus(lambda y: y + 1) == 2", "defaultdict(int, {x: 2})": "plus(1) == {1: 2}"}.items():
        problem = problem_of(code=f"{imports}{old}def plus(x):\n    return {value}", test_list=[f"{imports}assert {test}"])
        assert outcomes([problem["cot"]], problem) == [1], value


def test_a_program_replaces_no_name_of_the_tests():
    """Not the built-in functions that tests call, nor HumanEval's check; but it may use such names for its own."""
    problem = problem_of(test_list=["assert set([plus(1)]) == set([2]) and abs(plus(1) - 2) < 1e-6 and sum([plus(1)]) == 2"])
    fake = "set = abs = sum = lambda *a: 0\ndef plus(x): return 0"
    own = "def sum(a, b):\n    return a + b\nabs = 1\ndef plus(x):\n    return sum(x, abs)"
    assert outcomes([fake, own], problem) == [0, 1]
    fake = "def check(candidate): pass\nMETADATA = {}\ndef double(x): return 0"
    assert outcomes([fake], problem_of(HUMANEVAL)) == [0]


def test_a_program_may_be_called_like_anything():
    for name in "solution", "sum", "program", "tests", "space", "scope", "names", "exec", "value":
        problem = problem_of(code=f"def {name}(x):\n    return x + 1", test_list=[f"assert {name}(1) == 2"])
        assert outcomes([problem["cot"], f"def {name}(x):\n    return x"], problem) == [1, 0], name


def test_problems_that_cannot_be_judged_are_named_once(capsys):
    raws = [RECORD | {"task_id": 1}, RECORD | {"code": "import heapq\n" + PLUS, "task_id": 2},
            RECORD | {"test_list": ["import unittest\nassert plus(1) == 2"], "task_id": 3},
            RECORD | {"code": "print 'Python 2'", "task_id": 4},
            HUMANEVAL, RECORD | {"code": "def plus(x):\n    yield x", "task_id": None}]
    args = score.Args(task="code", train_data="a", eval_data="b")
    kept = score.judged([score.parse_code(raw, f"x:{i}") for i, raw in enumerate(raws, 1)], "data.jsonl", args)
    assert [problem["task_id"] for problem in kept] == [1, "HumanEval/0"]
    line = capsys.readouterr().out
    assert line.startswith("warning: data.jsonl: 4 problems are left out") and line.count("\n") == 1
    assert line.strip().endswith(f"[2, 3, 4, {kept[0]['question'][:40]!r}]")
    assert score.judged(kept, "data.jsonl", args) == kept and not capsys.readouterr().out


def test_a_program_of_the_data_that_does_not_run_leaves_its_problem_out(capsys):
    """--cot program: what Monty cannot run, and what does not give the record's own answer, would teach nothing right."""
    args = programs.Args(cot="program")
    records = [{"question": f"{i}?", "answer_value": "18", "answer_cot": f"def solution():\n    {body}"} for i, body in
               enumerate(["return 18", "return 17", "import heapq\n    return 18", "yield 18"])]
    records.append({"question": "4?", "answer_value": "18"})
    kept = programs.judged([programs.parse_record(record, args) for record in records], "x.json", args)
    assert [problem["question"] for problem in kept] == ["0?", "4?"]
    assert capsys.readouterr().out == ("warning: x.json: 3 problems are left out, whose own program does not give the answer here: "
                                       "['1?', '2?', '3?']\n")


def test_processes_agree_on_which_problems_there_are(monkeypatch):
    """What the first one finds counts: a limit of time may be reached in one of them only."""
    args, record = programs.Args(cot="program"), {"answer_value": "18", "answer_cot": "def solution():\n    return 18"}
    problems = [programs.parse_record(record | {"question": f"{i}?"}, args) for i in range(3)]
    monkeypatch.setattr(programs, "gathered", lambda fails: [[False, True, False], fails])
    assert [problem["question"] for problem in programs.judged(problems, "x.json", args)] == ["0?", "2?"]


def test_a_file_of_which_no_problem_is_left_is_refused(tmp_path):
    record = {"question": "1?", "answer_value": "18", "answer_cot": "def solution():\n    import numpy\n    return 18"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match="data.jsonl: no problem is left"):
        programs.read_problems(str(tmp_path / "data.jsonl"), programs.Args(cot="program"))


@pytest.mark.parametrize("raw", [
    7, {}, [], None, {"text": "a", "code": "b"}, {"text": "a", "code": "b", "test_list": []},
    {"text": "a", "code": "b", "test_list": [7]},
    {"text": "a", "code": 7, "test_list": ["c"]}, {"prompt": 7, "code": "b", "test_list": ["c"]}, {"code": "b", "test_list": ["c"]},
    {"prompt": "a", "code": "b", "test_list": ["c"], "test_imports": "import math"}, {"text": "a", "code": "b", "test_list": "c"},
    {"text": "a", "code": "b", "test_list": ["c"], "test_setup_code": 7},
    {"prompt": "a", "canonical_solution": "b", "test": "c", "entry_point": "d"}])
def test_records_of_another_form_are_refused(raw):
    with pytest.raises(InputError, match="here: neither MBPP"):
        score.parse_code(raw, "here")
