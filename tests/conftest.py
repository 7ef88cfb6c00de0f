"""Puts the repository's root on the path; without a GPU the Triton kernels run in Triton's interpreter.

Tests marked `cuda` need a GPU and are skipped where there is none: `python -m pytest -m cuda` runs them alone. If pytest-xdist is
installed the whole suite runs three files at a time; `-n 0` or the name of a file: one by one.
"""
import functools
import gc
import inspect
import os
import sys
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"           # before torch is imported: files that run side by side do not fight for the cores

import pytest

gc.set_threshold(100_000, 50, 100)            # imports and tests make objects by the million, and few of them are garbage
sys.path.insert(0, str(Path(__file__).parent.parent))

# in this order, by time, so that no long file is left over at the end
ORDER = [f"test_{name}.py" for name in (
    "scripts", "model", "kernels", "ranks", "baselines", "score", "programs", "kernels_sample", "kernels_decode", "r3", "latex",
    "gpu", "evidence", "hub", "kernels_aot", "answers", "prl")]


@pytest.hookimpl(trylast=True)                # when pytest-xdist has decided
def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")
    if config.pluginmanager.hasplugin("dsession"):
        return                                # hands the files out and runs no test: its workers start the sooner without torch
    import torch
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
        with suppress(ImportError):
            # At each call of a function in a kernel the interpreter goes through all names of the language again, to put its own
            # functions in place of Triton's: a third of the time of these tests. So the names are found once, and nothing is
            # done where they are in place already, as in a call from within a kernel: of the names found all are, or none.
            from triton.language.core import is_builtin
            from triton.runtime import interpreter
            builtins = functools.cache(lambda package: [name for name, _ in inspect.getmembers(package, is_builtin)])

            def patch_builtin(package, *more):
                for name in builtins(package):
                    if not is_builtin(member := getattr(package, name)):
                        break
                    interpreter._patch_attr(package, name, member, *more)

            interpreter._patch_builtin = patch_builtin


@pytest.hookimpl(tryfirst=True)               # before pytest-xdist looks at its options
def pytest_cmdline_main(config):
    option, worker = config.option, hasattr(config, "workerinput")
    unsaid = getattr(option, "numprocesses", 0) is None              # pytest-xdist is there, and no -n
    if unsaid and not worker and not option.file_or_dir and not option.usepdb:
        # by file: a fixture of a file is made once, and the runs that tests of test_scripts.py compare with are run once
        option.numprocesses, option.dist, option.loadscopereorder = 3, "loadfile", False


def pytest_collection_modifyitems(items):
    import torch
    items.sort(key=lambda item: ORDER.index(item.path.name) if item.path.name in ORDER else len(ORDER))
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    gc.freeze()                               # a collection need not go through all modules and items again and again


def pytest_unconfigure():
    gc.unfreeze()                             # what looks for leaks at the end finds none
