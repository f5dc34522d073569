"""The backends: each a module with the same functions, listed here in order of preference.

A backend module provides, without autograd, the functions that `library.py` calls: `token_values`,
`token_values_backward`, `linear_token_values`, `linear_token_values_backward`, `td_targets`, `td_targets_backward`,
`bellman_loss`, `bellman_loss_backward`, `linear_reval_loss`. It also says `DEVICES`, the device types it serves by
default (None: every one), and `missing()`, why it cannot run on this machine (None when it can). A module may import
functions from a sibling for what it does not do better itself. `portable.py` is the complete example.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from ..checks import unknown

PREFERENCE = ("triton", "cpu", "portable")


class BackendInfo(NamedTuple):
    """One backend, as this machine sees it."""

    available: bool
    default_for: tuple[str, ...]
    """Device types it serves when no backend is named; "*" stands for all that no other backend claims."""
    reason: str | None
    """Why it is missing; None when it is available."""


def backends() -> dict[str, BackendInfo]:
    """Which backends exist here, which is the default for which device, and why one is missing."""
    found, claimed = {}, set()
    for name in PREFERENCE:
        module = _module(name)
        reason = module.missing()
        default_for = () if reason else tuple(d for d in module.DEVICES or ("*",) if d not in claimed)
        claimed.update(default_for)
        found[name] = BackendInfo(reason is None, default_for, reason)
    return found


def backend_for(name: str | None, device_type: str) -> ModuleType:
    """The module that computes for tensors of this device type.

    Raises ValueError for a name that is unknown or cannot run here.
    """
    if name is None:
        return next(
            module
            for module in map(_module, PREFERENCE)
            if (module.DEVICES is None or device_type in module.DEVICES) and module.missing() is None
        )
    if name not in PREFERENCE:
        raise ValueError(unknown("backend", name, PREFERENCE))
    if reason := _module(name).missing():
        raise ValueError(f"backend {name!r} cannot run here: {reason}")
    return _module(name)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)
