"""The overhead benchmark: every provider computes the same numbers, and the command prints and writes its table."""

import json

import pytest
import torch

import reval_kernels
from benchmarks import overhead


@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_ours_and_eager_compute_the_same(backend):
    if not reval_kernels.backends()[backend].available:
        pytest.skip(f"no backend {backend}")
    x = overhead.inputs()
    ours, eager = overhead.ours(x, backend), overhead.eager(x)
    assert set(ours) == set(eager) == set(overhead.WRT)
    for name in ours:
        both = [overhead.with_gradients(x, name, each[name]) for each in (ours, eager)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_every_public_function_is_timed():
    others = {"__version__", "actions_and_mask", "backends", "reference", "until_end"}  # compute nothing with values
    public = {name for name in reval_kernels.__all__ if name.islower()} - others
    assert set(overhead.WRT) == public


def test_the_command_prints_and_writes(tmp_path, capsys):
    assert overhead.main(["--samples", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| bellman_loss | torch eager |" in printed
    (path,) = tmp_path.glob("*-overhead.json")
    written = json.loads(path.read_text())
    assert written["stamp"]["device"] == "cpu"
    assert {len(taken) for each in written["seconds"].values() for taken in each.values()} == {2}


def test_a_number_of_samples_that_is_not_positive_is_refused(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--samples", "0"])
    assert "--samples must be positive, got 0" in capsys.readouterr().err
