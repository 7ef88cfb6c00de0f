"""Puts the repository's root on the path; without a GPU the Triton kernels run in Triton's interpreter."""
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"      # before kernels are imported
sys.path.insert(0, str(Path(__file__).parent.parent))
