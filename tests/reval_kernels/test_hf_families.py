"""tools/hf_families.py on a dozen kinds of models, and its table in docs/huggingface.md."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers
from cases import DEVICE

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("hf_families", ROOT / "tools" / "hf_families.py")
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)

PAGE = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
ROWS = {row.split(" | ")[0]: row for row in re.findall(r"^\| (\w.* \| \w+ \| .*\|)$", PAGE, re.MULTILINE)}
FEW = (
    "llama qwen2 qwen3 gemma2 gemma3_text cohere granite hyperclovax minicpm3 gpt2 opt phi olmo2 mamba "
    "mixtral bert prophetnet recurrent_gemma"
).split()


@pytest.mark.skipif(DEVICE != "cpu", reason="the models are on the CPU")
@pytest.mark.parametrize("kind", FEW)
def test_a_family_is_what_the_page_says(kind):
    torch.use_deterministic_algorithms(False)
    found = families.check(kind)
    assert found.state == ("refused" if kind == "prophetnet" else "supported"), found.why
    named = re.search(r"transformers ([\d.]+): ", PAGE)[1]
    if transformers.__version__ == named:
        row = families.table([found]).split("\n")[4]
        assert row.strip("| ") == ROWS[kind].strip("| ")


def test_the_table_lists_every_family():
    missing = re.search(r"^Not built: (.*)\.$", PAGE, re.MULTILINE)[1].split(", ")
    if f"transformers {transformers.__version__}: " in PAGE:
        assert {*ROWS, *missing} >= set(families.ARCHITECTURES)
    assert not any("WRONG" in row for row in ROWS.values()) and len(ROWS) > 150
