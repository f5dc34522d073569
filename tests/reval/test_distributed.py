"""Two processes over gloo compute the same losses, gradients, weights and reference values as one, up to rounding.

torchrun starts once for all cases, because the start takes most of the time. The trajectories have unequal lengths, so
the processes get different numbers of micro-batches. With one trajectory, one process has only a padding micro-batch.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from two_processes import ADAM, CASES, batch_for, updates

from reval.config import ConfigError, load_config
from reval.distributed import World, world
from reval.learner import Learner
from reval.model.loading import load_model
from reval.reference_policy import ReferencePolicy

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "tests/reval/two_processes.py",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def load(results, case):
    return torch.load(results / f"{case}.pt", weights_only=False)


@pytest.mark.parametrize("case", [case for case in CASES if case != "bf16 compute"])
def test_two_processes_compute_what_one_does(results, case):
    two, config = load(results, case), load_config(["configs/tiny.yaml"], ADAM + CASES[case])
    one = updates(config, World(), case)
    for (loss, norm, residual), (loss1, norm1, residual1) in zip(two["updates"], one["updates"], strict=True):
        torch.testing.assert_close(torch.tensor([loss, norm]), torch.tensor([loss1, norm1]), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(residual, residual1, rtol=1e-5, atol=1e-4)
    assert two["gradients"].keys() == one["gradients"].keys() and two["weights"].keys() == one["weights"].keys()
    whole = torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() < 2e-5 * gradient.norm() + 1e-6 * whole, name
    for name, weight in one["weights"].items():
        # each of the 3 steps is about 1e-3 long
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-6)
    for a, b in zip(two["reference"], one["reference"], strict=True):
        assert a["version"] == b["version"] and abs(a["log_prob"] - b["log_prob"]) < 1e-3 * abs(b["log_prob"])
    for a, b in zip(two["behavior"], one["behavior"], strict=True):
        known = a is not None
        assert known == (case in ("importance ratio", "tapered")) and (not known or np.allclose(a, b, atol=1e-5))
    assert torch.allclose(torch.tensor(two["log_probs"][0]), torch.tensor(one["log_probs"][0]), atol=1e-3)


def test_activation_checkpointing_works_on_a_sharded_model(results):
    """The number of forward passes of a layer in one micro-batch. The second pass recomputes the activations for the
    backward pass."""
    assert load(results, "plain")["passes"] == 1
    assert load(results, "checkpointed activations")["passes"] == 2


def test_mixed_precision_keeps_float32_masters_and_stays_near_float32(results):
    """Only the rounding of the layers differs: bf16 has 8 bits of precision. The bounds on the loss and on the norm of
    the gradient allow for this rounding."""
    mixed, exact = load(results, "bf16 compute"), load(results, "plain")
    assert mixed["dtypes"] == {torch.float32}
    one = updates(load_config(["configs/tiny.yaml"], ADAM + CASES["bf16 compute"]), World(), "bf16 compute")
    for other in (exact, one):
        assert mixed["updates"][0][0] == pytest.approx(other["updates"][0][0], rel=1e-3)
        assert mixed["updates"][0][1] == pytest.approx(other["updates"][0][1], rel=1e-2)
    assert mixed["updates"][0][1] != exact["updates"][0][1], "the layers did compute in bf16"


def test_one_process_goes_on_from_what_two_saved(results):
    config, case = load_config(["configs/tiny.yaml"], ADAM), "plain"
    model, _ = load_model(config.model, 0)
    learner = Learner(model, config)
    state = {"optimizer": learner.state(), "weights": model.state_dict()}
    dcp.load(state, checkpoint_id=results / f"{case}.dcp")
    model.load_state_dict(state["weights"])
    learner.load_state(state["optimizer"], updates=2)
    trajectories = batch_for(case)
    # the two processes reset the reference to the policy just before they saved
    ReferencePolicy(model, config).annotate(trajectories)
    out = learner.update(trajectories)
    loss, norm, _ = load(results, case)["updates"][2]
    assert [out["loss"], out["grad_norm"]] == pytest.approx([loss, norm], rel=1e-5)
    expected = load(results, case)["weights"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6)


def test_gather_join_and_broadcast_between_two_processes(results):
    told = torch.load(results / "world.pt", weights_only=False)
    assert told == {"everyone": [0, 1], "joined": [0, 10, 20, 30, 40], "told": "main"}


def test_a_single_process_communicates_with_itself():
    world = World()
    assert world.main and world.share([1, 2]) == [1, 2] and world.join([1, 2]) == [1, 2]
    assert world.gather(3) == [3] and world.broadcast(4) == 4


def test_shares_that_do_not_fit_are_refused():
    class Two(World):
        def gather(self, item):
            return [item, [1, 2, 3]]

    with pytest.raises(ValueError, match="shares do not fit"):
        Two(0, 2).join([1])


def test_what_a_launcher_left_in_the_environment_is_named(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set, but not MASTER_ADDR, MASTER_PORT: .* unset WORLD_SIZE"):
        with world("cpu", timeout=1):
            pass


def test_an_error_of_one_process_is_raised_on_every_process():
    class Two(World):
        """The other process has an error."""

        def gather(self, item):
            return [item, "no space left"]

    with pytest.raises(ConfigError, match="no space left"):
        Two(0, 2).together(lambda: 1)
    with pytest.raises(ConfigError, match="not here"):
        World().together(lambda: open("/not here"))
    assert World().together(lambda: 1) == 1


def test_only_the_main_process_makes_what_every_process_gets():
    class Other(World):
        """Rank 1 of 2: the main process made 7."""

        def gather(self, item):
            return [None, item]

        def broadcast(self, item):
            return 7

    assert Other(1, 2).from_main(lambda: 1 / 0) == 7
    assert World().from_main(lambda: 3) == 3
