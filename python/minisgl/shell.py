"""`python -m minisgl.shell` is `minisgl chat`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "chat")
    runpy.run_module("minisgl", run_name="__main__", alter_sys=True)
