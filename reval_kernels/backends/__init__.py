"""The backends and their order: each is a module with the functions of `contract.Backend`.

cpu/ holds C++ kernels for CPUs, gpu/ Triton kernels for GPUs, portable.py chunked PyTorch for every device. To users
they are named "cpu", "triton" and "portable".
"""

from __future__ import annotations

from typing import NamedTuple

from ..checks import unknown
from ..contract import Backend
from . import cpu, gpu, portable

BACKENDS: dict[str, Backend] = {"triton": gpu, "cpu": cpu, "portable": portable}
"""In order of preference. `portable` serves every device, so a backend behind it would never be chosen."""


class BackendInfo(NamedTuple):
    """One backend, as this machine sees it."""

    available: bool
    default_for: tuple[str, ...]
    """Device types that the backend serves when the caller names no backend. "*" stands for all other device types."""
    reason: str | None
    """Why the backend is missing; None when it is available."""


def backends() -> dict[str, BackendInfo]:
    """All backends by name: whether each can run here, its default devices, and the reason if it cannot run.

    Returns:
        BackendInfo(available, default_for, reason) by name, in order of preference.

    Examples:
        >>> from reval_kernels import backends
        >>> list(backends())
        ['triton', 'cpu', 'portable']
        >>> backends()["portable"].available
        True
    """
    found: dict[str, BackendInfo] = {}
    claimed: set[str] = set()
    for name, backend in BACKENDS.items():
        reason = backend.missing()
        default_for = () if reason else tuple(d for d in backend.DEVICES or ("*",) if d not in claimed)
        claimed.update(default_for)
        found[name] = BackendInfo(reason is None, default_for, reason)
    return found


def backend_for(name: str | None, device_type: str) -> Backend:
    """The backend of this name; without a name, the first one that serves tensors of this device type.

    Raises ValueError for a name that is unknown or cannot run here.
    """
    if name is None:
        return next(
            backend
            for backend in BACKENDS.values()
            if (backend.DEVICES is None or device_type in backend.DEVICES) and backend.missing() is None
        )
    if name not in BACKENDS:
        raise ValueError(unknown("backend", name, list(BACKENDS)))
    if reason := BACKENDS[name].missing():
        raise ValueError(f"backend {name!r} cannot run here: {reason}")
    return BACKENDS[name]
