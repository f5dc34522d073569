"""`python -m reval` is the `reval` command."""

import sys


def main(argv: list[str] | None = None) -> int:
    """`reval.cli.main`, or a message if the packages of the trainer are not installed."""
    try:
        from reval.cli import main
    except ModuleNotFoundError as error:
        if error.name != "yaml":  # the first package of the trainer that cli.py imports
            raise
        print(
            "reval: the trainer is not installed, only the kernels: pip install 'reval-kernels[train]'", file=sys.stderr
        )
        return 1
    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
