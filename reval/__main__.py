"""`python -m reval` is the `reval` command."""

import sys

PACKAGES = {"accelerate", "matplotlib", "numpy", "rich", "safetensors", "torch", "transformers", "yaml"}
"""Modules of the extra `train` that commands import without a message of their own."""


def main(argv: list[str] | None = None) -> int:
    """`reval.cli.main`, or a message if the packages of the trainer are not installed."""
    try:
        from reval.cli import main

        return main(argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        print(
            f"reval: the trainer needs the package {package}, of the extra `train`: "
            "pip install 'reval-kernels[train]' (docs/install.md)",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
