"""Two processes over gloo against one: the same losses, gradients, weights and reference, to rounding.

torchrun starts once, for all cases: starting takes most of the time. The trajectories have unequal lengths, so that
the processes get different numbers of micro-batches; with one trajectory one of them has a padding one only.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from two_processes import ADAM, CASES, batch_for, updates

from reval.config import load_config
from reval.distributed import World
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
    ours, config = load(results, case), load_config(["configs/tiny.yaml"], ADAM + CASES[case])
    one = updates(config, World(), case)
    for (loss, norm, residual), (loss1, norm1, residual1) in zip(ours["updates"], one["updates"], strict=True):
        torch.testing.assert_close(torch.tensor([loss, norm]), torch.tensor([loss1, norm1]), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(residual, residual1, rtol=1e-5, atol=1e-4)
    assert ours["gradients"].keys() == one["gradients"].keys() and ours["weights"].keys() == one["weights"].keys()
    whole = torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        assert (ours["gradients"][name] - gradient).norm() < 2e-5 * gradient.norm() + 1e-6 * whole, name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=0, atol=1e-6)  # of 3 steps of about 1e-3
    for a, b in zip(ours["reference"], one["reference"], strict=True):
        assert a["version"] == b["version"] and abs(a["log_prob"] - b["log_prob"]) < 1e-3 * abs(b["log_prob"])
    assert torch.allclose(torch.tensor(ours["log_probs"][0]), torch.tensor(one["log_probs"][0]), atol=1e-3)


def test_activations_are_checkpointed_in_shards_too(results):
    """Forward passes of a layer in one micro-batch: the second one recomputes the activations for the backward."""
    assert load(results, "plain")["passes"] == 1
    assert load(results, "checkpointed activations")["passes"] == 2


def test_mixed_precision_keeps_float32_masters_and_stays_near_float32(results):
    """The layers' rounding is all that differs: 8 bits, against which the whole gradient is bounded."""
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
    ReferencePolicy(model, config).annotate(trajectories)  # the reference was reset to the policy just then
    out = learner.update(trajectories)
    loss, norm, _ = load(results, case)["updates"][2]
    assert [out["loss"], out["grad_norm"]] == pytest.approx([loss, norm], rel=1e-5)
    expected = load(results, case)["weights"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6)


def test_what_processes_tell_each_other(results):
    told = torch.load(results / "world.pt", weights_only=False)
    assert told == {"everyone": [0, 1], "joined": [0, 10, 20, 30, 40], "told": "main"}


def test_a_process_alone_needs_nobody():
    world = World()
    assert world.main and world.share([1, 2]) == [1, 2] and world.join([1, 2]) == [1, 2]
    assert world.gather(3) == [3] and world.broadcast(4) == 4


def test_shares_that_do_not_fit_are_refused():
    class Two(World):
        def gather(self, item):
            return [item, [1, 2, 3]]

    with pytest.raises(ValueError, match="shares do not fit"):
        Two(0, 2).join([1])
