"""Runs of the scripts for the tests: a process each, in which torch is loaded already and no GPU is to be seen.

To start an interpreter for each of some eighty runs would take minutes, and a fork of the tests' own process is of no use once
CUDA or autograd have threads in it. So one clean process loads what the scripts need, and each run is a fork of that.
"""
import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path
from unittest import mock

gc.set_threshold(100_000, 50, 100)                     # as in conftest.py: torch is loaded the sooner

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SCRIPTS = [name for name in ("ppo_reft", "r3", "score", "prl") if (ROOT / f"{name}.py").exists()]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "processes", "torch.distributed.checkpoint", "torch.distributed.fsdp", *SCRIPTS])
torch.set_num_threads(1)                               # no pool of threads may exist when a run is forked
torch.optim.AdamW([torch.zeros(1)])                    # loads what an optimiser loads late, once for all forks


@functools.cache
def code_of(path):
    return compile(path.read_bytes(), path, "exec")


for name in SCRIPTS:                                   # once for all forks
    code_of(ROOT / f"{name}.py")


def no_pictures():
    """A context in which nothing is drawn and pictures are empty files: to draw takes longer than the rest of a small run."""
    axes = mock.MagicMock()
    axes.plot.return_value = [axes]
    return mock.patch.multiple(Figure, add_subplot=lambda *_, **__: axes,
                               savefig=lambda figure, path, **_: Path(path).write_bytes(b""))


def run_script(script, argv, folder, environment, files, pictures):
    """What a forked process does: as `python script.py argv` in that folder and environment, with stdout and stderr in files."""
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    gc.freeze()                                        # what was loaded before the fork is not looked through again
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment | NO_GPU)
    tqdm.set_lock(threading.RLock())                   # not the one of all forks, which a child killed at the wrong moment keeps
    sys.argv = [f"{script}.py", *argv]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = str(path := ROOT / f"{script}.py")
    with contextlib.nullcontext() if pictures else no_pictures():
        exec(code_of(path), vars(main))


def fork(target, *arguments):
    """A process that is to call target, as a fork of the clean one, which starts at the first and only then. daemon: no test leaves
    one behind."""
    with mock.patch.dict(os.environ, NO_GPU | {"PYTHONPATH": os.pathsep.join(sys.path)}):
        multiprocessing.forkserver.ensure_running()
    return FORKS.Process(target=target, args=arguments, daemon=True)


class Running:
    """A script started as `python script.py flags` would start it, with its output in files: .kill(number), .wait() -> result."""

    def __init__(self, script, argv, pictures=False):
        self.files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        self.process = fork(run_script, script, argv, os.getcwd(), dict(os.environ), [file.name for file in self.files], pictures)
        self.process.start()

    def kill(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def ended(self):
        return not self.process.is_alive()

    def wait(self, seconds=None):
        """Its result; one that is not there after so many seconds is killed."""
        self.process.join(seconds)
        if not self.ended():
            self.process.kill()
            self.process.join()
        return subprocess.CompletedProcess([], self.process.exitcode, *[file.read() for file in self.files])
