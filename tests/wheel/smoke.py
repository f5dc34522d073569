"""Calls every public function of an installed reval_kernels, and compares each with its definition.

test_wheel.py runs this file in an environment that has the wheel and torch alone. It prints the names of the
backends that computed.
"""

from types import SimpleNamespace

import torch

import reval_kernels
from reval_kernels import actions_and_mask, hf, reference, until_end
from reval_kernels.compat import liger, trl_kernels, trl_utils

B, T, D, V = 3, 5, 16, 33
torch.manual_seed(0)
hidden, head = torch.randn(B, T, D), torch.randn(V, D)
actions, rewards, returns = torch.randint(V, (B, T)), torch.rand(B), torch.randn(B)
mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
ref = reference.linear_token_values(hidden + 0.1, head, actions, mask=mask)
values = reference.linear_token_values(hidden, head, actions, mask=mask)
bellman = {"mask": mask, "beta": 0.5}

ARGUMENTS = {
    "token_values": ((hidden @ head.T, actions), {"mask": mask, "with_entropy": True}),
    "linear_token_values": ((hidden, head, actions), {"mask": mask, "softcap": 30.0}),
    "td_targets": ((values, ref, rewards), bellman),
    "bellman_loss": ((values, ref, rewards), bellman | {"level": "subtrajectory"}),
    "reval_loss": ((hidden @ head.T, actions, returns, rewards), bellman),
    "linear_reval_loss": ((hidden, head, actions, returns, rewards), bellman),
}
TYPES = ["BellmanLoss", "TDTargets", "TokenValues"]
HELPERS = ["actions_and_mask", "until_end"]
assert set(reval_kernels.__all__) == {*ARGUMENTS, *TYPES, *HELPERS, "__version__", "backends", "reference"}, (
    "a name without a call"
)


def double(x):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.double()
    return type(x)(*map(double, x)) if isinstance(x, reval_kernels.TokenValues) else x


def leaves(x):
    return {i: y for i, y in enumerate(x) if isinstance(y, torch.Tensor) and y.is_floating_point()}


def check(name):
    """The function in float32 against its definition in float64: results, and the gradient of its first tensor."""
    args, options = ARGUMENTS[name]
    results, differentiable = [], set()
    for function, cast in ((getattr(reval_kernels, name), lambda x: x), (getattr(reference, name), double)):
        args_of = [cast(x) for x in args]
        first = args_of[0][0] if isinstance(args_of[0], tuple) else args_of[0]
        first.requires_grad_()
        out = leaves(function(*args_of, **options))
        differentiable = differentiable or {i for i, y in out.items() if y.requires_grad}  # not each residual is
        loss = sum((out[i] * torch.linspace(1, 2, out[i].numel()).view_as(out[i])).sum() for i in differentiable)
        results.append([*out.values(), torch.autograd.grad(loss, first)[0]])
        first.requires_grad_(False)
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), definition, rtol=1e-4, atol=1e-5)


class Model(torch.nn.Module):
    """What reval_kernels.hf needs of a model of transformers, which is not installed here. It halves its logits."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(10, D), torch.nn.Linear(D, 10)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.words(input_ids)) / 2)


def check_helpers():
    """Actions and mask from tokens, and the calls of TRL and Liger on all rows."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 9, 2, 2]])
    _, response = actions_and_mask(ids, torch.tensor([2, 1]), attention_mask=until_end(ids, 2))
    assert response.tolist() == [[False, True, True], [True, True, False]]
    torch.testing.assert_close(ref.returns(mask)[:2], (ref.log_prob.sum(1) + ref.v[range(B), [0, 1, 0]])[:2])
    log_prob = reference.linear_token_values(hidden, head, actions).log_prob
    ours = [
        trl_utils.selective_log_softmax(hidden @ head.T, actions),
        trl_kernels.selective_log_softmax_and_entropy(hidden @ head.T, actions)[0],
        trl_kernels.chunked_log_probs(hidden, head, None, actions, 1.0).logprobs,
        -liger.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden.flatten(0, 1), head, actions.flatten()).view(
            B, T
        ),
    ]
    for x in ours:
        torch.testing.assert_close(x, log_prob, rtol=1e-4, atol=1e-5)
    model = Model()
    logits = model(ids).logits[:, :-1]
    of_model = hf.token_values_of(model, ids)
    torch.testing.assert_close(of_model.log_prob, reference.token_values(logits, ids[:, 1:]).log_prob)
    torch.testing.assert_close(hf.at_head(model, lambda hidden, head: hidden, input_ids=ids), model.words(ids))
    try:
        hf.token_values_of(torch.nn.Linear(2, 2), ids)
    except TypeError as error:
        assert "causal language model" in str(error)
    else:
        raise AssertionError("a layer was taken for a model")


for name in ARGUMENTS:
    check(name)
check_helpers()
print("checked", reval_kernels.__version__, *[k for k, info in reval_kernels.backends().items() if info.available])
