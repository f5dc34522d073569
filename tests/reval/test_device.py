"""The device's rates, with a clock that says what each call takes, and what a made-up nvidia-smi answers."""

import os

import pytest
import torch

from reval import device
from reval.cli import main
from reval.device import Rate, nvidia_smi, rates, time_calls


class Clock:
    """The calls take the given seconds, one after another."""

    def __init__(self, *seconds):
        self.left = list(seconds)

    def seconds(self, call):
        return self.left.pop(0), call()


def test_a_rate_is_work_over_the_median_and_its_quartiles_are_in_order():
    rate = Rate("copy", "GB/s", 2.0, [1.0, 2.0, 4.0])
    assert rate.median == 1.0 and rate.quartiles == (2 / 3, 2 / 1.5)
    assert str(rate) == "1 GB/s (3 runs, quartiles 0.667 to 1.33)"
    assert str(Rate("copy", "GB/s", 4200.0, [1.0, 1.0])) == "4,200 GB/s (2 runs, quartiles 4,200 to 4,200)"


@pytest.mark.parametrize(("one", "runs"), [(0.1, 11), (0.5, 3)])
def test_calls_that_warm_up_are_not_counted_and_slow_calls_are_few(one, runs):
    clock = Clock(9.0, one, *[one] * 11)
    assert time_calls("x", "GB/s", 1.0, lambda: None, clock).seconds == [one] * runs


def test_the_rates_of_a_cpu_count_bytes_and_flops(monkeypatch):
    monkeypatch.setattr(device, "clock_for", lambda where: Clock(*[0.5] * 40))
    copy, read, matmul = rates(torch.device("cpu"), gib=2**-10, size=100)
    assert (copy.name, copy.unit, copy.median) == ("copy (read + write)", "GB/s", pytest.approx(2 * 2 * 2**20 / 1e9))
    assert (read.name, read.unit, read.median) == ("read", "GB/s", pytest.approx(2 * 2**20 / 1e9))
    assert (matmul.name, matmul.unit) == ("matmul 100^3 fp32", "TFLOP/s")
    assert matmul.median == pytest.approx(2 * 2 * 100**3 / 1e12)


def test_nvidia_smi_answers_by_field_and_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi("driver_version") == {}
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "580.65.06, 1980 MHz"\n')
    fake.chmod(0o755)
    assert nvidia_smi("driver_version", "clocks.sm") == {"driver_version": "580.65.06", "clocks.sm": "1980 MHz"}
    fake.write_text("#!/bin/sh\nexit 9\n")
    assert os.access(fake, os.X_OK) and nvidia_smi("driver_version") == {}


def test_env_measures_rates_on_request_only(monkeypatch, capsys):
    monkeypatch.setattr(device, "rates", lambda where: iter([Rate("read", "GB/s", 3.0, [1.0, 1.0])]))
    assert main(["env"]) == 0
    assert "GB/s" not in capsys.readouterr().out
    assert main(["env", "--rates"]) == 0
    assert capsys.readouterr().out.endswith("\n  read                 3 GB/s (2 runs, quartiles 3 to 3)\n")
