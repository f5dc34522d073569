"""How a case runs: which providers are timed, which are refused, and which are listed with a reason."""

import pytest
import torch

from benchmarks import memory
from benchmarks.ops import OPS, Shape
from benchmarks.providers import FAMILIES, Provider, eager_token_values, providers
from benchmarks.report import case_table
from benchmarks.suite import LIMIT, Case, Settings, Suite

CASE = Case("token_values forward+backward", Shape(2, 2, 50), torch.float32)


@pytest.fixture
def suite():
    return Suite(Settings(torch.device("cpu"), budget=0.01, most=4), say=lambda line: None)


def provider(name, function, **options):
    return Provider(name, "token_values", "token values", lambda: function, **options)


def off(by):
    def function(logits, actions):
        out = eager_token_values(logits, actions)
        return out | {"log_prob": out["log_prob"] * (1 + by)}

    return function


def run(suite, *chosen, case=CASE):
    return {row.provider: row for row in suite.run(case, chosen)}


@pytest.mark.parametrize("by", [1e-4, float("nan")])
def test_a_wrong_provider_is_not_timed(suite, by):
    rows = run(suite, provider("right", off(0.0)), provider("wrong", off(by)))
    assert rows["right"].status == "timed" and len(rows["right"].seconds) >= 3
    assert rows["wrong"].status == "wrong" and not rows["wrong"].seconds
    assert "- wrong: wrong: off by" in "\n".join(case_table(list(rows.values())))


def test_a_wrong_gradient_is_noticed(suite):
    def detached(logits, actions):
        out = eager_token_values(logits, actions)
        return out | {"v": out["v"].detach() + 0 * logits.sum(-1)}

    assert run(suite, provider("wrong", detached))["wrong"].status == "wrong"


def test_a_gradient_without_its_softmax_is_noticed(suite):
    """The ratio of sums in `ops.error` must find it.

    The largest entry of the gradient is the action's. In bf16 and at a large vocabulary, the softmax part of the
    gradient is far below the error that is allowed for this entry.
    """

    def of_the_action_alone(logits, actions):
        z = logits.clone()
        z.register_hook(lambda g: torch.zeros_like(g).scatter_(-1, actions[:, None], g.gather(-1, actions[:, None])))
        return eager_token_values(z, actions)

    case = Case(CASE.op, Shape(8, 4, 50_000), torch.bfloat16)
    row = run(suite, provider("wrong", of_the_action_alone), case=case)["wrong"]
    assert row.status == "wrong"


def test_a_missing_peer_is_listed_with_its_reason_and_a_failing_one_stops_nobody(suite):
    def fails(logits, actions):
        raise NotImplementedError("no such kernel")

    peers = provider("absent", None, missing=lambda device: f"not for the {device}"), provider("broken", fails)
    rows = run(suite, *peers, provider("right", eager_token_values))
    assert (rows["absent"].status, rows["absent"].reason) == ("missing", "not for the cpu")
    assert (rows["broken"].status, rows["broken"].reason) == ("failed", "NotImplementedError: no such kernel")
    page = "\n".join(case_table(list(rows.values())))
    assert "- absent: missing: not for the cpu" in page and "| right |" in page and f"| {LIMIT} |" in page


def test_a_provider_that_fails_late_stops_nobody(suite):
    calls = []

    def fails(logits, actions):
        calls.append(None)
        if len(calls) == 4:  # checked, warmed up, timed once
            raise RuntimeError("out of memory")
        return eager_token_values(logits, actions)

    rows = run(suite, provider("broken", fails), provider("right", eager_token_values))
    assert len(calls) == 4 and rows["broken"].status == "failed" and not rows["broken"].seconds
    assert rows["broken"].reason == "after 1 timed calls: RuntimeError: out of memory"
    assert rows["right"].status == "timed" and rows[LIMIT].status == "timed"


def test_a_case_that_cannot_be_run_is_listed_and_the_next_one_goes_on(suite, monkeypatch):
    def no_memory(*_):
        raise MemoryError("32 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(type(OPS[CASE.op]), "truth", no_memory)
        rows = run(suite, provider("right", eager_token_values))
    assert {(row.status, row.reason) for row in rows.values()} == {("failed", "MemoryError: 32 GiB")}
    assert run(suite, provider("right", eager_token_values))["right"].status == "timed"


def test_an_overwritten_input_is_restored_before_each_call(suite):
    seen = []

    def destroys(logits, actions):
        seen.append(logits.detach().clone())
        out = eager_token_values(logits.clone(), actions)
        logits.data.zero_()
        return out

    rows = run(suite, provider("destroys", destroys, overwrites="logits"), provider("after", eager_token_values))
    assert rows["destroys"].status == "timed" and rows["after"].status == "timed"
    assert len(seen) >= 4 and all(torch.equal(logits, seen[0]) for logits in seen) and seen[0].any()


def test_ctrl_c_keeps_what_was_measured(suite):
    calls = []

    def interrupted(logits, actions):
        calls.append(None)
        if len(calls) == 5:  # checked, warmed up, timed twice
            raise KeyboardInterrupt
        return eager_token_values(logits, actions)

    with pytest.raises(KeyboardInterrupt):
        run(suite, provider("right", eager_token_values), provider("interrupted", interrupted))
    row = next(row for row in suite.rows if row.provider == "interrupted")
    assert row.status == "timed" and len(row.seconds) == 2


def test_a_call_that_would_take_too_long_is_not_made(suite):
    case = Case(CASE.op, Shape(2, 2, 100), torch.float32)
    for name in ("slow", "ours"):
        suite.took[CASE.op, "float32", name] = (20.0, CASE)  # half the size
    peer = Provider("slow", "token_values", "log_prob", lambda: eager_token_values)
    rows = run(suite, peer, provider("ours", eager_token_values), case=case)
    assert rows["ours"].status == "timed"  # our providers are always timed
    assert rows["slow"].status == "too slow" and "20.0 s at N = 4, V = 50, so about 40 s" in rows["slow"].reason


def test_curves_show_providers_that_their_table_timed(suite):
    run(suite, provider("right", eager_token_values), provider("wrong", off(0.1)))
    point = Case(CASE.op, Shape(2, 4, 50), torch.float32, curve="N", only=("right", "wrong"))
    rows = run(suite, provider("right", eager_token_values), provider("wrong", off(0.1)), case=point)
    assert rows["right"].status == "timed" and rows["wrong"].status == "not timed"


def test_who_is_left_out_of_a_larger_case_is_listed(suite):
    case = Case(CASE.op, CASE.shape, torch.float32, only=("one",))
    rows = run(suite, provider("one", eager_token_values), provider("other", eager_token_values), case=case)
    assert rows["one"].status == "timed"
    assert (rows["other"].status, rows["other"].reason) == ("not timed", "left out of this larger case to save time")


def test_memory_is_measured_of_whom_the_case_names_and_of_others_who_are_fast(suite, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "beyond_inputs_and_outputs", lambda op, name, *_: asked.append(name) or 5)
    rows = run(suite, provider("one", eager_token_values), provider("slow", eager_token_values))
    rows["slow"].seconds[:] = [60.0]
    suite.measure_memory(CASE, list(rows.values()))
    assert asked == [memory.CONTROL, "one"] and rows["one"].memory == 5
    assert rows["slow"].memory_reason == "not measured: a call takes 60 s"

    for others, who in ((True, ["one", "slow"]), (False, ["slow"])):
        asked.clear()
        case = Case(CASE.op, CASE.shape, torch.float32, memory=("slow",), others=others)
        suite.measure_memory(case, list(rows.values()))
        assert asked == [memory.CONTROL, *who]
    assert rows["one"].memory_reason == "left out"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_that_can_run_here_is_right(suite, op, dtype):
    """Compiled providers are left out: compilation takes too long for a test."""
    chosen = [p for p in providers(OPS[op].family) if not p.compiled]
    rows = run(suite, *chosen, case=Case(op, Shape(4, 2, 512, 32), dtype))
    assert set(FAMILIES) >= {p.family for p in chosen}
    assert not {n: r.reason for n, r in rows.items() if r.status not in ("timed", "missing")}
    assert rows["torch eager"].status == "timed"
