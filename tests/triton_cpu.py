"""Where tests of Triton kernels run: on a GPU, or on the CPU in Triton's interpreter with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRET and not torch.cuda.is_available(), reason="needs a GPU, or triton and TRITON_INTERPRET=1"
    ),
    # In masked lanes NumPy computes with NaN and -inf, which is what is tested.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
needs_gpu = pytest.mark.skipif(INTERPRET or not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def mend_interpreter() -> None:
    """Triton 3.6 asks int() of an array of one element for the bounds of a loop, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if INTERPRET:
    mend_interpreter()
