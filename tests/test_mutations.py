"""tools/mutate.py can still break what it says: its lines exist, and it tests the backend that it breaks."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
mutate = importlib.util.module_from_spec(spec)
sys.modules["mutate"] = mutate  # dataclasses look their module up
spec.loader.exec_module(mutate)


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_names_one_line_and_tests_its_backend(mutation):
    source = ROOT / "reval_kernels" / "backends" / mutation.file
    assert source.read_text(encoding="utf-8").count(mutation.old) == 1
    folder = mutation.file.split("/")[0]
    assert mutate.backend_of(mutation) == {"gpu": "triton", "cpu": "cpu"}.get(folder, "portable")
    assert all((ROOT / word).exists() for word in mutation.tests.split(" -k ")[0].split())
