"""`python -m minisgl.kernel`: compile every kernel for this machine's GPU, check each, and time it."""

import sys

from minisgl.kernel.bench import main

sys.exit(main())
