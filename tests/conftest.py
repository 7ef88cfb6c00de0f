"""Puts the repository's root on the path; without a GPU the Triton kernels run in Triton's interpreter.

Tests marked `cuda` need a GPU and are skipped where there is none: `python -m pytest -m cuda` runs them alone. The whole suite runs
as many tests at a time as there are cores, at most four, if pytest-xdist is installed; `-n 0` or the name of a file: one by one.
"""
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"      # before kernels are imported
torch.set_num_threads(1)                      # tests that share the cores; and one thread gives the same sums everywhere
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")


def pytest_cmdline_main(config):
    whole, worker = not config.option.file_or_dir, hasattr(config, "workerinput")
    if whole and not worker and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = min(4, os.cpu_count()), "loadgroup"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
