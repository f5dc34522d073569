"""`ReValConfig` and `ReValTrainer`: ReVal in place of GRPO in a script for TRL's GRPOTrainer (docs/trl.md).

Importing this package raises ImportError if TRL is missing, or if its version is none of `VERSIONS`.
"""

import re
from importlib.metadata import PackageNotFoundError, version

VERSIONS = ("1.16",)
"""The versions of TRL with which the tests pass. The trainer overrides methods that TRL may change in any version."""


def check_version() -> None:
    """Raise ImportError, with what to install, if TRL is missing or has another version than `VERSIONS`."""
    what = f"reval.integrations.trl needs TRL {' or '.join(VERSIONS)}"
    install = "pip install 'reval-kernels[trl]'"
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError(f"{what}, which is not installed: {install}") from error
    release = re.fullmatch(r"(\d+\.\d+)(\.\d+)*", found)  # no rc1, no dev0
    if release is None or release[1] not in VERSIONS:
        raise ImportError(f"{what}; installed is TRL {found}, with which it was not tested: {install}")


check_version()

from .config import ReValConfig  # noqa: E402  # TRL's version is checked before anything of TRL is imported
from .trainer import ReValTrainer  # noqa: E402

__all__ = ["VERSIONS", "ReValConfig", "ReValTrainer", "check_version"]
