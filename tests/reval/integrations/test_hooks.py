"""docs/hooks.md: every block works with arguments of the recorded signature, and the signature is that of the trainer.

The second part needs the trainers' sources in build/peers, where `make test-peers` puts them; elsewhere it skips. They
are parsed, never imported: most need a GPU.
"""

import ast
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from reval_kernels import reference

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
PEERS = ROOT / "build" / "peers"
BETA = 0.02


@dataclass
class Hook:
    folder: str
    """in build/peers"""
    file: str
    name: str
    """qualified name in the file"""
    signature: str


HOOKS = {
    "prime-rl": [
        Hook("prime-rl", "src/prime_rl/trainer/rl/loss.py", "ipo_loss_fn", "inputs, loss_config"),
        Hook(
            "prime-rl",
            "src/prime_rl/trainer/rl/loss.py",
            "LossInputs",
            "trainer_logprobs, inference_logprobs, ref_logprobs, advantages, loss_mask, "
            "loss_weights=field(default=None)",
        ),
        Hook("prime-rl", "src/prime_rl/trainer/rl/loss.py", "LossOutputs", "loss, metrics"),
        Hook("prime-rl", "src/prime_rl/trainer/rl/loss.py", "setup_rl_loss_fn", "loss_config"),
    ],
    "OpenRLHF": [
        Hook(
            "openrlhf",
            "openrlhf/models/loss.py",
            "PolicyLoss.forward",
            "self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1, "
            "batch_num_tokens=None, global_batch_size=None",
        )
    ],
    "SkyRL": [
        Hook(
            "skyrl",
            "skyrl/backends/skyrl_train/utils/ppo_utils.py",
            "ppo_policy_loss",
            "log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None",
        ),
        Hook("skyrl", "skyrl/backends/skyrl_train/utils/ppo_utils.py", "register_policy_loss", "name"),
    ],
    "slime": [
        Hook(
            "slime",
            "slime/backends/megatron_utils/loss.py",
            "policy_loss_function",
            "args, batch, logits, sum_of_sample_mean",
        ),
        Hook(
            "slime",
            "slime/backends/megatron_utils/loss.py",
            "loss_function",
            "args, batch, num_microbatches, step_global_batch_size, logits",
        ),
    ],
    "NeMo-RL": [
        Hook(
            "nemo-rl",
            "nemo_rl/algorithms/loss/interfaces.py",
            "LossFunction.__call__",
            "self, data, global_valid_seqs, global_valid_toks, **kwargs",
        ),
        Hook(
            "nemo-rl",
            "nemo_rl/algorithms/loss/interfaces.py",
            "LossInputType",
            "LOGIT='logit', LOGPROB='logprob', DISTILLATION='distillation', "
            "DISTILLATION_CROSS_TOKENIZER='distillation_cross_tokenizer', DRAFT='draft'",
        ),
    ],
    "torchtitan": [
        Hook(
            "torchtitan",
            "torchtitan/experiments/rl/losses/dapo.py",
            "DAPOLoss.__call__",
            "self, logits, labels, global_valid_tokens=None, *, generator_logprobs, advantages, loss_mask",
        ),
        Hook(
            "torchtitan",
            "torchtitan/components/loss.py",
            "BaseLoss.__init__",
            "self, config, *, compile_config=None",
        ),
    ],
}


# the signatures


def signature_of(node: ast.AST) -> str:
    """Arguments and defaults of a function, or fields of a dataclass or enum, without annotations."""
    if isinstance(node, ast.ClassDef):
        fields = []
        for item in node.body:
            if isinstance(item, ast.AnnAssign):
                fields.append(ast.unparse(item.target) + (f"={ast.unparse(item.value)}" if item.value else ""))
            elif isinstance(item, ast.Assign):
                fields.append(f"{ast.unparse(item.targets[0])}={ast.unparse(item.value)}")
        return ", ".join(fields)
    assert isinstance(node, ast.FunctionDef)
    for argument in [a for a in ast.walk(node.args) if isinstance(a, ast.arg)]:
        argument.annotation = None
    return ast.unparse(node.args)


def find(tree: ast.Module, name: str) -> ast.AST:
    body: list[Any] = tree.body
    for part in name.split("."):
        node = next((n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part), None)
        assert node is not None, f"{name} is gone"
        body = node.body
    return node


@pytest.mark.parametrize("hook", [h for hooks in HOOKS.values() for h in hooks], ids=lambda h: f"{h.folder}-{h.name}")
def test_recorded_signature_is_that_of_the_trainer(hook):
    path = PEERS / hook.folder / hook.file
    if not path.exists():
        pytest.skip(f"no source of {hook.folder} in build/peers: make test-peers")
    assert signature_of(find(ast.parse(path.read_text(encoding="utf-8")), hook.name)) == hook.signature


def test_signature_comparison_sees_a_change():
    tree = ast.parse("class A:\n  def f(self, x: int, *, y: float = 1.0, **kw): pass\n  z: int\n  w: int = 2")
    assert signature_of(find(tree, "A.f")) == "self, x, *, y=1.0, **kw"
    assert signature_of(find(tree, "A")) == "z, w=2"
    with pytest.raises(AssertionError, match="A.g is gone"):
        find(tree, "A.g")


@pytest.mark.parametrize("trainer", HOOKS)
def test_the_page_names_the_hook_and_a_version(trainer):
    section = PAGE.split(f"\n## {trainer}\n")[1].split("\n## ")[0]
    text = section.split("```python")[0]
    assert HOOKS[trainer][0].file.removeprefix("src/") in text
    assert re.search(r"Commit [0-9a-f]{40} of 2026-\d\d-\d\d|Version \d+\.\d+\.\d+ \(PyPI\)", text)


# the blocks


def accepts(function: Any, recorded: str) -> None:
    """The function can be called as its trainer does: with every argument of the recorded signature, by position and by
    name."""
    wanted = inspect.signature(eval(f"lambda {recorded}: None"))
    found = inspect.signature(function)
    assert [(p.name, p.kind) for p in found.parameters.values()] == [
        (p.name, p.kind) for p in wanted.parameters.values()
    ]
    for ours, theirs in zip(found.parameters.values(), wanted.parameters.values(), strict=True):
        assert (ours.default is inspect.Parameter.empty) == (theirs.default is inspect.Parameter.empty), ours.name


def module(monkeypatch, name: str, **contents: Any) -> None:
    """A stand-in for a module of a trainer, with its parents."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(contents)


def block(trainer: str) -> dict[str, Any]:
    section = PAGE.split(f"\n## {trainer}\n")[1].split("\n## ")[0]
    scope: dict[str, Any] = {"__name__": f"hook of {trainer}"}
    code = section.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    exec(compile(code, f"docs/hooks.md, {trainer}", "exec"), scope)
    return scope


T = torch.float64
WORDS = 11
PROMPTS, RESPONSES = [2, 3, 4], [3, 1, 4]
REWARDS = torch.tensor([0.5, -0.25, -0.25], dtype=T)


@dataclass
class Data:
    """Three trajectories. The last one has a token of a tool in its response."""

    rows: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    old: list[torch.Tensor] = field(default_factory=list)

    def values(self, with_v: bool) -> list[reference.TokenValues]:
        """Of the responses' tokens; V is 0 without `with_v`."""
        out = []
        for row, logits, n in zip(self.rows, self.logits, RESPONSES, strict=True):
            v = reference.token_values(logits[-n - 1 : -1], row[-n:])
            out.append(v if with_v else v._replace(v=torch.zeros_like(v.v)))
        return out

    def losses(self, with_v: bool) -> torch.Tensor:
        """(V(s_1) + D - r / beta)^2 of each trajectory by the definition."""
        out = []
        for values, mask, old, reward in zip(self.values(with_v), self.masks, self.old, REWARDS, strict=True):
            one = reference.bellman_loss(
                reference.TokenValues(*(x[None] for x in values[:3])),
                (old * mask).sum()[None],
                reward[None],
                mask=mask[None],
                beta=BETA,
            )
            out.append(one.loss)
        return torch.stack(out)


@pytest.fixture
def data() -> Data:
    g = torch.Generator().manual_seed(0)
    made = Data()
    for p, r in zip(PROMPTS, RESPONSES, strict=True):
        made.rows.append(torch.randint(0, WORDS, (p + r,), generator=g))
        made.logits.append(torch.randn(p + r, WORDS, generator=g, dtype=T, requires_grad=True))
        made.masks.append(torch.ones(r, dtype=torch.bool))
        made.old.append(-torch.rand(r, generator=g, dtype=T))
    made.masks[2][1] = False
    return made


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def same(loss: torch.Tensor, expected: torch.Tensor, data: Data) -> None:
    torch.testing.assert_close(loss.to(T), expected, rtol=1e-9, atol=0)
    found, wanted = (torch.autograd.grad(x, data.logits, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


def no_gradient(loss: torch.Tensor, data: Data) -> None:
    """A batch without actions: the loss is 0, and backward works. Trainers call it on such a batch too."""
    assert loss == 0
    found = torch.autograd.grad(loss, data.logits, allow_unused=True, retain_graph=True)
    assert all(x is None or not x.count_nonzero() for x in found)  # NaN counts as not zero


def test_prime_rl(monkeypatch, data):
    inputs, outputs = (HOOKS["prime-rl"][i].signature.replace("field(default=None)", "None") for i in (1, 2))
    made = {n: signature_class(n, s) for n, s in (("LossInputs", inputs), ("LossOutputs", outputs))}
    module(monkeypatch, "prime_rl.trainer.rl.loss", **made)
    function = block("prime-rl")["regression"]
    losses = []
    for values, mask, old, reward in zip(data.values(False), data.masks, data.old, REWARDS, strict=True):
        sample = made["LossInputs"](values.log_prob, torch.zeros_like(old), old, reward * mask, mask)
        out = function(sample, beta=BETA)
        losses.append(out.loss)
        assert out.metrics["residual"].shape == ()
    same(torch.stack(losses).sum(), data.losses(False).sum(), data)
    nothing = torch.zeros_like(data.masks[2])
    silent = made["LossInputs"](values.log_prob, torch.zeros_like(old), old, reward * nothing, nothing)
    no_gradient(function(silent, beta=BETA).loss, data)
    silent.ref_logprobs = None
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        function(silent, beta=BETA)


def signature_class(name: str, recorded: str) -> type:
    """A class whose instances have the recorded fields."""
    scope: dict[str, Any] = {}
    exec(f"def __init__(self, {recorded}):\n self.__dict__.update(locals())", scope)
    return type(name, (), {"__init__": scope["__init__"]})


def batch_of(data: Data) -> tuple[torch.Tensor, ...]:
    log_probs, old, mask = (padded(x) for x in ([v.log_prob for v in data.values(False)], data.old, data.masks))
    return log_probs, old, REWARDS[:, None] * mask, mask


def test_openrlhf(monkeypatch, data):
    loss = block("OpenRLHF")["Regression"](BETA)
    accepts(type(loss).forward, HOOKS["OpenRLHF"][0].signature)
    log_probs, old, advantages, mask = batch_of(data)
    out = loss(log_probs, old, advantages, action_mask=mask, rollout_log_probs=None, dp_size=2, global_batch_size=6)
    assert len(out) == 5 and out[3] is None and out[1].detach() == 0 and torch.isfinite(out[2])
    same(out[0], data.losses(False).sum() / 6 * 2, data)
    out = loss(log_probs, old, advantages * 0, action_mask=mask * 0, dp_size=2, global_batch_size=6)
    no_gradient(out[0], data)
    assert out[2] == 0


def test_skyrl(monkeypatch, data):
    registered = {}

    def register_policy_loss(name):
        return lambda function: registered.setdefault(name, function)

    module(monkeypatch, "skyrl.backends.skyrl_train.utils.ppo_utils", register_policy_loss=register_policy_loss)
    scope = block("SkyRL")
    accepts(registered["regression"], HOOKS["SkyRL"][0].signature)
    log_probs, old, advantages, mask = batch_of(data)
    config = SimpleNamespace(max_seq_len=64)
    scaled = advantages / (scope["BATCH"] * config.max_seq_len)  # apply_loss_reduction_to_advantages_minibatch
    loss, metrics = registered["regression"](
        log_probs, old, scaled, config=config, loss_mask=mask.to(T), rollout_logprobs=None
    )
    assert isinstance(metrics["residual"], float)
    same(loss, data.losses(False).sum() / scope["BATCH"], data)
    nothing = torch.zeros_like(log_probs)
    no_gradient(registered["regression"](log_probs, old, nothing, config=config, loss_mask=nothing)[0], data)


def test_slime(monkeypatch, data):
    function = block("slime")["tbrm"]
    accepts(function, HOOKS["slime"][0].signature)
    batch = {
        "unconcat_tokens": data.rows,
        "response_lengths": RESPONSES,
        "total_lengths": [len(r) for r in data.rows],
        "loss_masks": [m.int() for m in data.masks],
        "advantages": [r * m for r, m in zip(REWARDS, data.masks, strict=True)],
        "ref_log_probs": data.old,
    }
    args = SimpleNamespace(rollout_temperature=1.0)
    loss, log = function(args, batch, torch.cat(data.logits)[None], lambda x: x)
    assert all(isinstance(v, torch.Tensor) and v.shape == () for v in log.values())
    same(loss, data.losses(True).sum(), data)
    batch["loss_masks"][1] = torch.zeros_like(batch["loss_masks"][1])
    loss, _ = function(args, batch, torch.cat(data.logits)[None], lambda x: x)
    same(loss, data.losses(True)[[0, 2]].sum(), data)
    batch["loss_masks"] = [m * 0 for m in batch["loss_masks"]]
    no_gradient(function(args, batch, torch.cat(data.logits)[None], lambda x: x)[0], data)


def test_nemo_rl(monkeypatch, data):
    kinds = {n: SimpleNamespace(LOGIT="logit", SEQUENCE_LEVEL="sequence_level") for n in ("LossInputType", "LossType")}
    module(monkeypatch, "nemo_rl.algorithms.loss.interfaces", **kinds)
    loss = block("NeMo-RL")["TBRM"](BETA)
    accepts(type(loss).__call__, HOOKS["NeMo-RL"][0].signature.replace("**kwargs", "logits"))
    assert loss.input_type == "logit"

    def whole(parts):
        """Of prompt and response; NeMo-RL's fields have a value for every token of both."""
        rows = zip(PROMPTS, parts, strict=True)
        return padded([torch.cat([part.new_zeros(p), part]) for p, part in rows])

    batch = {
        "input_ids": padded(data.rows),
        "token_mask": whole(data.masks).to(T),
        "sample_mask": torch.ones(3, dtype=T),
        "advantages": whole([r * m for r, m in zip(REWARDS, data.masks, strict=True)]),
        "reference_policy_logprobs": whole(data.old),
    }
    logits = padded([x for x in data.logits])
    found, metrics = loss(batch, torch.tensor(3), torch.tensor(7), logits=logits)
    assert metrics["num_valid_samples"] == 3
    same(found, data.losses(True).sum() / 3, data)
    batch["sample_mask"][1] = 0
    found, _ = loss(batch, torch.tensor(2), torch.tensor(6), logits=logits)
    same(found, data.losses(True)[[0, 2]].sum() / 2, data)
    batch["sample_mask"] *= 0
    no_gradient(loss(batch, torch.tensor(2), torch.tensor(6), logits=logits)[0], data)


class BaseLoss:
    class Config:
        pass


def test_torchtitan(monkeypatch, data):
    from dataclasses import dataclass

    BaseLoss.Config = dataclass(kw_only=True, slots=True)(type("Config", (), {}))
    module(monkeypatch, "torchtitan.components.loss", BaseLoss=BaseLoss)
    made = block("torchtitan")["TBRMLoss"]
    accepts(made.__call__, HOOKS["torchtitan"][0].signature)
    accepts(made.__init__, HOOKS["torchtitan"][1].signature)
    loss = made(made.Config(beta=BETA))
    data.masks[2][1] = True  # one turn
    inputs = [torch.cat([torch.zeros(p - 1, dtype=m.dtype), m]) for p, m in zip(PROMPTS, data.masks, strict=True)]
    old = [torch.cat([torch.zeros(p - 1, dtype=T), o]) for p, o in zip(PROMPTS, data.old, strict=True)]
    advantages = [r * m for r, m in zip(REWARDS, inputs, strict=True)]

    def packed(parts, ends=(2, 3)):
        """Two rows, [2, L]: the first holds two samples."""
        return padded([torch.cat(parts[: ends[0]]), torch.cat(parts[ends[0] : ends[1]])])

    logits, labels = packed([x[:-1] for x in data.logits]), packed([row[1:] for row in data.rows])
    of_actions = {"generator_logprobs": packed(old), "advantages": packed(advantages), "loss_mask": packed(inputs)}
    found, metrics = loss(logits, labels, 8.0, **of_actions)
    assert metrics["loss/mean"] == found
    same(found, data.losses(True).sum() / 8, data)
    of_cut = {name: x[:, 1:] for name, x in of_actions.items()}
    assert of_cut["loss_mask"][0, 0]  # a row that begins with an action
    same(loss(logits[:, 1:], labels[:, 1:], 8.0, **of_cut)[0], data.losses(True).sum() / 8, data)
    nothing = {"loss_mask": torch.zeros_like(of_actions["loss_mask"])}
    no_gradient(loss(logits, labels, 8.0, **(of_actions | nothing))[0], data)
