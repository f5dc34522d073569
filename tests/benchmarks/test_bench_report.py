"""The Markdown page, the JSON data and the bars, from rows written by hand."""

import json

import pytest
import torch

from benchmarks import report
from benchmarks.bars import bars
from benchmarks.suite import LIMIT, Row

ROWS = {"trajectories": 8, "length": 64, "vocabulary": 151_936, "width": 0}
HEAD = {"trajectories": 8, "length": 128, "vocabulary": 49_152, "width": 576}


def row(op, provider, seconds, shape, memory=None):
    return Row(op, "float32", shape, "", provider, "x", "timed", seconds=seconds, memory=memory, bytes=10, flops=10)


@pytest.fixture
def rows():
    forward, loss = "token_values forward", "linear_reval_loss forward+backward"
    return [
        row(forward, LIMIT, [1.0, 1.0, 9.0], ROWS),
        row(forward, "cpu", [1.4, 1.4, 9.0], ROWS),
        row(forward, "torch eager", [9.0], ROWS),
        row(loss, LIMIT, [10.0], HEAD),
        row(loss, "cpu", [13.0], HEAD, memory=3),
        row(loss, "torch eager", [20.0], HEAD, memory=200),
        row(loss, "F.linear_cross_entropy", [12.5], HEAD),
        row(loss, "TRL fused head", [1.0], HEAD),  # the bar does not name this provider
    ]


def test_bars_compare_medians_and_say_what_was_not_measured(rows):
    held = {(b.case, b.against.split(" (")[0]): (b.measured, b.verdict) for b in bars(rows)}
    forward = "token_values forward, float32, V = 151,936"
    loss = "linear_reval_loss forward+backward, float32, V = 49,152"
    assert held[forward, "limit"] == ("1.40x", "met")
    assert held[forward, "torch eager"] == ("6.4x", "missed")
    assert held[forward, "torch.compile"] == ("", "not measured")
    assert held[loss, "limit"] == ("1.30x", "missed")
    assert held[loss, "the fastest of 2: F.linear_cross_entropy"] == ("1.04x", "met")
    assert held[loss, "torch eager, memory beyond inputs and outputs"][1] == "missed"  # 3 of 200: 1.5%
    assert len(held) == 24


def test_a_run_is_written_as_data_page_and_plots(rows, tmp_path):
    where = report.stamp(torch.device("cpu"))
    paths = report.write(tmp_path, where, rows, interrupted=True)
    assert [p.suffix for p in paths] == [".json", ".md", ".png"] and all(p.stat().st_size for p in paths)
    data = json.loads(paths[0].read_text())
    assert data["stamp"] == [where] and data["interrupted"] == [True]
    assert data["rows"][1]["median"] == 1.4 and data["rows"][1]["seconds"] == [1.4, 1.4, 9.0]
    page = paths[1].read_text()
    assert page.isascii()  # the tables are printed too, and a terminal may have no other characters
    assert "Interrupted" in page and "| cpu | 1400 | 1400 to 5200 | 3 | 71% |" in page
    assert where["commit"] in page and torch.__version__ in page
    assert f"]({paths[2].name})" in page


def test_a_curve_gets_its_picture_and_its_table(rows, tmp_path):
    for r in rows[-4:]:
        r.curve = "N"
    paths = report.write(tmp_path, report.stamp(torch.device("cpu")), rows, interrupted=False)
    assert paths[-1].name.endswith("-curves.png")
    assert "| N | N = 1,024, D = 576, V = 49,152 | cpu | 1.3e+04 | 0.0 |" in paths[1].read_text()


def test_files_are_named_after_the_device():
    cpu = {"device": "cpu", "processor": "AMD EPYC (TM)", "instructions": "AVX2", "threads": 2}
    assert report.file_name(cpu) == "amd-epyc-tm-avx2-2-threads"
    assert report.file_name({"device": "NVIDIA H100 80GB"}) == "nvidia-h100-80gb"
