"""tools/hf_kernel.py writes a repository that Hugging Face's `kernels` loads; the copy works beside the package."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import sys
from pathlib import Path
import torch
import reval_kernels
{load}
x, actions = torch.randn(4, 130, requires_grad=True), torch.randint(130, (4,))
mine = copy.token_values(x, actions, with_entropy=True, backend="portable")
ours = reval_kernels.token_values(x, actions, with_entropy=True, backend="portable")
assert all(torch.equal(a, b) for a, b in zip(mine, ours, strict=True))
assert torch.equal(*(torch.autograd.grad(v.log_prob.sum(), x)[0] for v in (mine, ours)))
assert copy is not reval_kernels and copy.TokenValues is not reval_kernels.TokenValues
assert "no compiled code" in copy.backends()["cpu"].reason
# each copy has its own ops, which a mode or a compiler sees
ops = [getattr(torch.ops, n).token_values.default for n in ("reval_kernels", copy.__name__)]
assert ops[0] is not ops[1]
from torch.utils._python_dispatch import TorchDispatchMode
class Seen(TorchDispatchMode):
    names = set()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.partition("::")[0])
        return function(*args, **(kwargs or {{}}))
for package, name in ((copy, copy.__name__), (reval_kernels, "reval_kernels")):
    Seen.names = set()
    with Seen():
        package.token_values(x, actions)
    assert {{n for n in Seen.names if "reval" in n}} == {{name}}, Seen.names
print(copy.__name__)
"""
BY_KERNELS = """
from kernels import get_local_kernel
from kernels._rust import Digest, DigestAlgorithm, Metadata
variant = Path(sys.argv[1], "build", "torch-cpu")
Metadata.read_from_file(variant / "metadata.json").digest.validate(
    Digest.hash_variant(DigestAlgorithm.SHA256, variant)
)
copy = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""
BY_IMPORTLIB = """
import importlib.util, json
variant = Path(sys.argv[1], "build", "torch-cpu")
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
copy = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copy)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "kernel"
    command = [sys.executable, str(ROOT / "tools" / "hf_kernel.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "torch-cpu, torch-cuda" in done.stdout, done.stderr
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode and "is not empty" in again.stderr
    return folder


def test_the_copy_works_beside_the_package(repository):
    """Where `kernels` is not installed, importlib loads the copy in the way of `kernels` 0.17."""
    load = BY_KERNELS if importlib.util.find_spec("kernels") else BY_IMPORTLIB
    command = [sys.executable, "-c", USE.format(load=load), str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_reval_kernels_cpu_")


def test_kernels_is_installed():
    """A skip here says that the test above did without `kernels`."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels 0.17 is not installed: pip install kernels")
