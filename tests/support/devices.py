"""Where engine tests run: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=needs_cuda)
DEVICES = ["cpu", CUDA]
