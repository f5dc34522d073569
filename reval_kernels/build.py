"""`python -m reval_kernels.build` builds the C++ kernels for the installed torch. It needs CMake and a C++ compiler."""

import sys

from .backends.cpu.build import main

if __name__ == "__main__":
    sys.exit(main())
