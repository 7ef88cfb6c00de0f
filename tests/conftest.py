"""Puts the repository's root on the path; without a GPU the Triton kernels run in Triton's interpreter."""
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"      # before kernels are imported
torch.set_num_threads(1)                      # tests fork runs of the scripts: no thread pool may exist by then
sys.path.insert(0, str(Path(__file__).parent.parent))

torch.optim.AdamW([torch.zeros(1)])           # loads what an optimiser loads late, once for all forks
