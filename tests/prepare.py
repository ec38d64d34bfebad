"""Makes what tests would otherwise make when they first need it, and wait for: the CPU kernels that they try, and the
real model. `python -m tests.prepare`
"""

from __future__ import annotations

from minisgl.kernel.jit import compile_cpu_kernels, cpu_level
from tests.integration.test_cpu_kernels import narrower
from tests.real_model import real_model

if __name__ == "__main__":
    for target in (cpu_level(), *narrower()):
        print(compile_cpu_kernels(target))
    print(real_model())
