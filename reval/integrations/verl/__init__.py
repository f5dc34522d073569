"""A plugin for verl 0.9: the objective, an engine that returns V, and a trainer with replay. See docs/verl.md.

verl loads this module by the entry point group `verl.plugins` at the end of its own import. It changes nothing there
unless the environment variable VERL_ENGINE_VENDOR is "reval", the value that also selects the engine in verl. The check
comes before all other imports: importing verl's engines fixes its platform, which another plugin may still add.
"""

import logging
import os

try:
    import verl
except ImportError as error:
    raise ImportError(
        "reval.integrations.verl needs verl 0.9: pip install verl==0.9.1 'TransferQueue>=0.1.10'"
    ) from error

VENDOR = "reval"
VERSIONS = ("0.9.0", "0.9.1")
"""All tests pass with 0.9.1. With 0.9.0 those of the trainer's run and of two ranks were not run."""


def register() -> None:
    """Add policy loss `reval`, advantage estimator `reval`, trainer `reval` and the engines to verl's registries.

    Raises:
        ImportError: a version of verl that is not one of VERSIONS, or a package that verl's trainer needs is missing.
    """
    found = str(vars(verl).get("__version__"))
    if found not in VERSIONS:
        raise ImportError(f"reval.integrations.verl knows verl {' and '.join(VERSIONS)}, got {found}")
    from . import engine, loss, trainer  # noqa: F401  # each registers itself


if os.environ.get("VERL_ENGINE_VENDOR") == VENDOR:
    try:
        register()
    except Exception as error:  # verl logs the exception of a plugin at level DEBUG and goes on without the plugin
        logging.getLogger(__name__).error("VERL_ENGINE_VENDOR=%s, but ReVal's plugin failed: %s", VENDOR, error)
        raise
