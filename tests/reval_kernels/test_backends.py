"""The list of backends, the choice of a backend for a device, and the errors for missing and unknown names."""

import pytest
import torch
from cases import logits_and_actions

import reval_kernels
from reval_kernels import token_values
from reval_kernels.backends import BACKENDS, backend_for, portable
from reval_kernels.contract import Backend

FUNCTIONS = [name for name, x in vars(Backend).items() if callable(x) and not name.startswith("_")]


def names() -> str:
    return ", ".join(map(repr, BACKENDS))


def test_every_backend_is_reported():
    """Each device type has one default. One backend, "*", serves all other types. A missing backend has a reason."""
    found = reval_kernels.backends()
    assert list(found) == list(BACKENDS)
    claimed = [device for info in found.values() for device in info.default_for]
    assert len(claimed) == len(set(claimed)) and claimed.count("*") == 1
    for info in found.values():
        assert info.available == (info.reason is None)
        assert info.available or info.default_for == ()


def test_portable_serves_every_other_device():
    assert reval_kernels.backends()["portable"] == (True, ("*",), None)
    assert backend_for(None, "some new device") is portable
    assert list(BACKENDS)[-1] == "portable", "it serves every device, so nothing after it would ever be chosen"


def test_the_reported_default_is_used():
    for device in ("cpu", "cuda", "mps"):
        serving = [name for name, info in reval_kernels.backends().items() if {device, "*"} & set(info.default_for)]
        assert backend_for(None, device) is backend_for(serving[0], device)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_backend_has_every_function(backend, function):
    assert len(FUNCTIONS) == 10
    assert callable(getattr(backend_for(backend, "cpu"), function))


def test_unknown_name():
    logits, actions = logits_and_actions(2, 7)
    with pytest.raises(ValueError) as caught:
        token_values(logits, actions, backend="portble")
    assert str(caught.value) == f"backend must be one of {names()}; got 'portble' (did you mean 'portable'?)"
    with pytest.raises(ValueError) as caught:
        token_values(logits, actions, backend="xyz")
    assert str(caught.value) == f"backend must be one of {names()}; got 'xyz'"


def test_a_missing_backend(monkeypatch):
    """It is not chosen as a default. A request for it raises an error with the reason."""
    first = next(iter(BACKENDS))
    monkeypatch.setattr(BACKENDS[first], "missing", lambda: "it rains")
    assert reval_kernels.backends()[first] == (False, (), "it rains")
    with pytest.raises(ValueError) as caught:
        token_values(*logits_and_actions(2, 7), backend=first)
    assert str(caught.value) == f"backend {first!r} cannot run here: it rains"
    if first != "portable":
        assert token_values(*logits_and_actions(2, 7)).q.shape == torch.Size([2])
