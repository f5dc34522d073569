"""Train a model: `python -m reval.train configs/demo.yaml optim.lr=1e-6` is `reval train ...`."""

import sys

from reval.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
