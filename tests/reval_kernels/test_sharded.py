"""linear_token_values with the vocabulary split over 2 and 4 processes, against one process with the whole vocabulary.

The slices of the 130 words differ in size, and one slice is a single word, so that a confusion of rank and offset
fails. The processes start once for each number of processes and run every case. They communicate with gloo.
"""

import math
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import (
    BACKENDS,
    DEVICE,
    assert_no_worse_than_torch,
    assert_same_bits,
    evaluate,
    float64_truth,
    head,
    logit_error,
    natural_scales,
    torch_error,
    upstream,
)

from reval_kernels import linear_token_values, reference

TOKENS, V, D = (3, 4), 130, 31
SLICES = {2: [99, 31], 4: [40, 1, 60, 29]}
OUTPUTS = ("q", "v", "log_prob", "entropy")


def inputs_of(dtype=torch.float32) -> dict[str, torch.Tensor]:
    hidden, weight, actions = head(*TOKENS, V, D, dtype=dtype)
    return {"hidden": hidden, "weight": weight, "actions": actions, "bias": torch.randn(V).to(dtype)}


def shard(inputs: dict[str, torch.Tensor], world: int, rank: int) -> dict[str, torch.Tensor]:
    return inputs | {k: inputs[k].split(SLICES[world])[rank] for k in ("weight", "bias") if k in inputs}


def check(inputs, backend, by=None, truth=None, **options) -> None:
    """Outputs and d hidden must be those of the whole vocabulary, d weight and d bias those of the slice."""
    world, rank = dist.get_world_size(), dist.get_rank()
    by = upstream(TOKENS) if by is None else by
    options["with_entropy"] = "entropy" in by
    own = shard(inputs, world, rank)
    ours = evaluate(linear_token_values, own, by, process_group=dist.group.WORLD, backend=backend, **options)
    truth = float64_truth("linear_token_values", inputs, by, **options) if truth is None else truth
    plain = evaluate(reference.linear_token_values, inputs, by, **options)
    scales = natural_scales("linear_token_values", inputs, truth, by, **options)
    for name in truth:
        parts = [plain[name], truth[name], scales.get(name)]
        if name in ("d weight", "d bias"):
            parts = [x.split(SLICES[world])[rank] for x in parts]
        slack = {"scale": parts[2], "floor": logit_error(inputs), "what": name}
        assert_no_worse_than_torch(ours[name], *parts[:2], **slack)
    if options.get("mask") is not None:
        assert all((ours[k][~options["mask"]] == 0).all() for k in (*by, "d hidden"))


def cases(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(inputs_of(dtype), backend)
    no_bias = inputs_of()
    del no_bias["bias"]
    check(no_bias, backend, temperature=torch.rand(TOKENS) + 0.5, softcap=5.0)
    for output in OUTPUTS:
        check(inputs_of(), backend, upstream(TOKENS, output))
    masked(backend)
    minus_infinity(backend)
    tied(backend)
    common_offset(backend)
    confident(backend)
    wanted(backend)
    refused(backend)
    repeated(backend)
    check(
        {k: x[:0] if k in ("hidden", "actions") else x for k, x in inputs_of().items()},
        backend,
        upstream((0, *TOKENS[1:])),
    )


def masked(backend):
    inputs, mask = inputs_of(), torch.rand(TOKENS) < 0.6
    inputs["hidden"][~mask], inputs["actions"][~mask] = torch.nan, -100
    check(inputs, backend, mask=mask)


def minus_infinity(backend):
    """All logits of some slices are -inf: of the first, of the last, and all logits but one."""
    for finite in (slice(100, 130), slice(0, 40), slice(40, 41), slice(20, 110)):
        inputs = inputs_of()
        bias = torch.full((V,), -torch.inf)
        bias[finite] = inputs["bias"][finite]
        inputs["actions"] = inputs["actions"] % (finite.stop - finite.start) + finite.start
        check(inputs | {"bias": bias}, backend)


def tied(backend):
    """The first and the last word, in different slices, have exactly the same logit, the maximum."""
    inputs = inputs_of()
    inputs["weight"][[0, -1]], inputs["bias"][[0, -1]] = 0.0, 20.0
    check(inputs, backend)


def common_offset(backend):
    """1e4 added to every logit changes only q and v. The logits are on a grid that float32 holds exactly."""
    inputs = inputs_of()
    inputs |= {name: (inputs[name] * 8).round() / 8 for name in ("hidden", "weight", "bias")}
    by = upstream(TOKENS, "log_prob", "entropy")
    truth = float64_truth("linear_token_values", inputs, by, with_entropy=True)
    check(inputs | {"bias": inputs["bias"] + 1e4}, backend, by, truth)


def confident(backend):
    """p = 1 - 1e-6, with actions in every rank's slice. Each entry of the gradient keeps its digits: 1 - p of the
    action, and p of the other words."""
    inputs, rank, world = inputs_of(), dist.get_rank(), dist.get_world_size()
    actions = torch.arange(12) * 11
    inputs |= {"hidden": torch.eye(12, D).view(*TOKENS, D), "actions": actions.view(TOKENS)}
    logits = inputs["weight"].double().T[:12] + inputs["bias"].double()  # token t reads column t of the head
    logits[torch.arange(12), actions] = -torch.inf
    needed = logits.logsumexp(1) + math.log((1 - 1e-6) / 1e-6) - inputs["bias"].double()[actions]
    inputs["weight"][actions, torch.arange(12)] = needed.float()
    by = {"log_prob": torch.ones(TOKENS)}
    truth = float64_truth("linear_token_values", inputs, by)
    assert 0.5e-6 < -truth["log_prob"].mean() < 2e-6
    own = shard(inputs, world, rank)
    ours = evaluate(linear_token_values, own, by, process_group=dist.group.WORLD, backend=backend)
    assert torch_error(ours["log_prob"], truth["log_prob"], truth["log_prob"].abs()) < 1e-5
    d_weight = truth["d weight"].split(SLICES[world])[rank]
    assert torch_error(ours["d weight"], d_weight, d_weight.abs()) < 1e-5


def wanted(backend):
    """Some gradients only, and no gradient."""
    inputs, by = inputs_of(), upstream(TOKENS)
    own = shard(inputs, dist.get_world_size(), dist.get_rank())
    options = {"process_group": dist.group.WORLD, "with_entropy": True, "backend": backend}
    expected = evaluate(linear_token_values, own, by, **options)
    for names in (("hidden",), ("weight",), ("bias", "hidden")):
        leaves = {k: x.detach().requires_grad_(k in names) for k, x in own.items()}
        torch.autograd.backward(linear_token_values(**leaves, **options), list(by.values()))
        for name in ("hidden", "weight", "bias"):
            assert_same_bits(leaves[name].grad, expected[f"d {name}"] if name in names else None)
    with torch.no_grad():
        assert_same_bits(linear_token_values(**own, **options), tuple(expected[k] for k in OUTPUTS))
    assert linear_token_values(**own, **options | {"with_entropy": False}).entropy is None


def refused(backend):
    """Every rank refuses an action outside the whole vocabulary, so no rank waits for another one."""
    inputs = shard(inputs_of(), dist.get_world_size(), dist.get_rank())
    inputs["actions"][1, 1] = V
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 130\) where they are not masked out; got 130"):
        linear_token_values(**inputs, process_group=dist.group.WORLD, backend=backend)


def repeated(backend):
    """Two runs give the same bits, and all ranks have the same bits."""
    own = shard(inputs_of(), dist.get_world_size(), dist.get_rank())
    by = upstream(TOKENS)
    options = {"process_group": dist.group.WORLD, "with_entropy": True, "backend": backend}
    first, second = (evaluate(linear_token_values, own, by, **options) for _ in range(2))
    assert_same_bits(first, second)
    for name in (*OUTPUTS, "d hidden"):
        theirs = first[name].clone()
        dist.broadcast(theirs, src=0)
        assert_same_bits(first[name], theirs)


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN here too
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        for backend in BACKENDS:
            torch.manual_seed(0)
            cases(backend)
    except BaseException:
        (Path(folder) / f"rank{rank}").write_text(traceback.format_exc())
        os._exit(1)  # exit at once: the other ranks may wait for this one
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on one machine")
@pytest.mark.parametrize("world", SLICES)
def test_sharded_vocabulary(world, tmp_path):
    try:
        mp.spawn(rank_main, (world, str(tmp_path)), nprocs=world)
    except mp.ProcessExitedException:
        pytest.fail("\n".join(path.read_text() for path in sorted(tmp_path.glob("rank*"))))
