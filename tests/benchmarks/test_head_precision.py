"""The noise of the precisions of the head: the emulated roundings are right, the errors have the size that theory says,
and the command sums them by response."""

import json

import pytest
import torch

from benchmarks import head_precision
from benchmarks.head_precision import MANTISSA, TRUNK, Head, rounded, split, summarize, values

D, V, T = 37, 501, 29


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(T, D), torch.randn(V, D), torch.randint(V, (T,))


def numbers():
    """float32 numbers of every size and sign, with 0, ties and the last number before a power of two."""
    torch.manual_seed(0)
    wide = torch.randn(10_000) * 2.0 ** torch.randint(-100, 100, (10_000,))
    return torch.cat([wide, torch.tensor([0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 2 - 2.0**-23])])


def test_bf16_is_rounded_as_torch_rounds_it():
    assert torch.equal(rounded(numbers(), MANTISSA["bf16"]), numbers().bfloat16().float())


@pytest.mark.parametrize("name, bound", [("bf16", 2.0**-8), ("tf32", 2.0**-11)])
def test_a_rounded_operand_is_off_by_half_a_unit_at_most(name, bound):
    x = numbers()[numbers() != 0].double()
    error = ((rounded(x.float(), MANTISSA[name]).double() - x) / x).abs().max()
    assert bound / 2 < error <= bound


def test_ties_go_to_the_even_neighbour():
    unit = 2.0**-10
    ties = 1 + unit * torch.tensor([0.5, 1.5, 2.5])
    assert torch.equal(rounded(ties, MANTISSA["tf32"]), 1 + unit * torch.tensor([0.0, 2.0, 2.0]))


@pytest.mark.parametrize("name, bound", [("bf16", 2.0**-16), ("tf32", 2.0**-22)])
def test_two_parts_hold_twice_the_bits(name, bound):
    """And each part has the bits of one operand."""
    x = numbers()
    high, low = (part.double() for part in split(x, MANTISSA[name]))
    assert ((high + low - x.double()).abs() <= bound * x.double().abs()).all()
    assert torch.equal(rounded(low.float(), MANTISSA[name]), low.float())


def test_products_have_the_errors_of_their_operands(case):
    """Relative to |hidden| @ |weight|, u is the rounding of an operand: 2 u + u^2 for one product. With two parts, each
    operand is off by u^2, low * low, which is left out, is u^2, and the sums of D + 2 numbers are in float32."""
    hidden, weight, _ = case
    size = hidden.abs().double() @ weight.abs().double().T
    truth = hidden.double() @ weight.double().T
    error = {name: ((z.double() - truth) / size).abs().max() for name, z in Head(weight).logits(hidden)}
    sums = (D + 2) * 2.0**-24
    assert error["exact"] < sums
    for name, u in (("bf16", 2.0**-8), ("tf32", 2.0**-11)):
        assert u / 16 < error[name] < 2 * u + u**2 + sums
        assert error[f"{name}x3"] < 3.1 * u**2 + 2 * sums
    assert error["bf16x3"] < error["tf32"] / 10
    assert error["bf16 logits"] > error["bf16"]


def test_errors_are_those_of_float64_values(case):
    hidden, weight, actions = case
    other = hidden + 0.01 * torch.randn_like(hidden)
    found = Head(weight).errors(hidden, actions, other)
    log_pi = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(T), actions]
    low = (hidden.bfloat16().double() @ weight.bfloat16().double().T).log_softmax(-1)[torch.arange(T), actions]
    torch.testing.assert_close(found["bf16"][1], low - log_pi, rtol=0, atol=1e-5)
    moved = values(other.double() @ weight.double().T, actions) - values(hidden.double() @ weight.double().T, actions)
    torch.testing.assert_close(found[TRUNK], moved, rtol=0, atol=1e-5)
    assert set(found) == {"exact", "bf16", "bf16 logits", "bf16x3", "tf32", "tf32x3", TRUNK}


def test_responses_are_chains_of_windows():
    """Windows of 4 tokens: 6 tokens take two, and the fifth window makes no response. V counts once a response."""
    windows = [{"bf16": torch.stack([torch.full((4,), 100.0 * i), torch.full((4,), float(i))])} for i in range(5)]
    [row] = summarize(windows, 6)
    first, second = 0 + 4 * 0 + 2 * 1, 200 + 4 * 2 + 2 * 3
    assert row["responses"] == 2 and row["return_max"] == second and row["log_prob_max"] == 3
    assert row["return_rms"] == pytest.approx(((first**2 + second**2) / 2) ** 0.5)
    assert [r["responses"] for r in summarize(windows, 3)] == [5]
    assert summarize(windows, 21) == []


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(head_precision, "WINDOW", 8)
    path = tmp_path / "new" / "noise.json"
    words = ["--model", "tiny", "--lengths", "3", "12", "--responses", "2", "--trunk", "1", "--output", str(path)]
    assert head_precision.main(words) == 0
    assert "| 12 | bf16x3 | 2 |" in capsys.readouterr().out
    written = json.loads(path.read_text())
    responses = {(row["length"], row["precision"]): row["responses"] for row in written["rows"]}
    assert responses[3, "exact"] == 4 and responses[3, TRUNK] == 2 and responses[12, TRUNK] == 1
    rms = {row["precision"]: row["log_prob_rms"] for row in written["rows"] if row["length"] == 3}
    assert rms["exact"] < 1e-6 and rms["bf16x3"] < 1e-5 < rms["tf32"] < rms["bf16"]


def test_ctrl_c_writes_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(head_precision, "WINDOW", 8)
    calls = iter(range(10))

    def interrupted(*_):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return {"bf16": torch.ones(2, 8)}

    monkeypatch.setattr(Head, "errors", interrupted)
    words = ["--model", "tiny", "--lengths", "8", "16", "--responses", "2", "--output", str(tmp_path / "noise.json")]
    assert head_precision.main(words) == 0
    written = json.loads((tmp_path / "noise.json").read_text())
    assert (written["windows"], written["of"]) == (1, 4)
    assert [row["length"] for row in written["rows"]] == [8]


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        head_precision.main(["--lengths", "0", "5"])
    assert "--lengths must be positive, got 0" in capsys.readouterr().err
