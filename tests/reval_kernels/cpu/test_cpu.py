"""Properties that only the C++ backend has. The shared tests check the results of every backend.

Tested here: every instruction set that this processor has, the accuracy of exp, results that do not depend on the
number of threads, memory, and the messages if the library could not be built. Each instruction set needs a new process,
because the library chooses the instruction set once.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits, head, logits_and_actions

import reval_kernels
from reval_kernels import linear_reval_loss, linear_token_values, token_values
from reval_kernels.backends import cpu

ROOT = Path(cpu.__file__).parents[3]
built = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ backend: {cpu.missing()}")

ALL = ["plain", "avx2", "avx512", "avx512bf16"]  # instruction sets, the lowest first

# A script that prints the instruction set, the largest errors of exp and tanh in units in the last place, and the
# largest errors of token values and gradients against float64, relative to the largest entry.
REPORT = """
import json, torch
from reval_kernels import backends, linear_token_values, reference, token_values
assert backends()["cpu"].available
ops, report = torch.ops.reval_kernels_cpu, {}
torch.manual_seed(0)

def ulps(function, x):
    truth = getattr(torch, function)(x.double())
    place = truth.abs().float()
    place = torch.nextafter(place, torch.tensor(torch.inf)).double() - place.double()
    return ((getattr(ops, function)(x).double() - truth).abs() / place).max().item()

def error(x, truth):
    return ((x.double() - truth).abs().max() / truth.abs().max()).nan_to_num(torch.inf).item()

report["isa"] = ops.isa()
report["exp"] = ulps("exp", torch.cat([torch.linspace(-87.33, 0, 1_000_001), torch.linspace(0, 88, 300_001),
                                       -torch.rand(300_000) * 1e-3]))
report["tanh"] = ulps("tanh", torch.cat([torch.linspace(-20, 20, 1_000_001), torch.randn(300_000) * 1e-3]))
report["exp of -inf"] = ops.exp(torch.tensor([-88.0296936])).item()  # the kernels raise lower numbers to it
report["exp of nan"] = ops.exp(torch.tensor([torch.nan])).isnan().item()

def gradients(function, leaves, actions, **options):
    out = [x for x in function(*leaves, actions, **options) if x is not None]
    torch.manual_seed(1)
    upstream = [torch.randn(x.shape).to(x.dtype) for x in out]
    return *out, *torch.autograd.grad(out, leaves, upstream)

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    worst = 0.0
    for vocabulary in (1, 3, 16, 37, 130, 1000):
        logits, actions = (torch.randn(5, vocabulary + 1) * 4).to(dtype)[:, 1:], torch.randint(vocabulary, (5,))
        hidden, weight = torch.randn(5, 6).to(dtype), torch.randn(vocabulary, 6).to(dtype)
        for function, wide, leaves in (
            (token_values, reference.token_values, (logits,)),
            (linear_token_values, reference.linear_token_values, (hidden, weight)),
        ):
            for options in ({}, {"with_entropy": True, "softcap": 20.0}):
                mine = [x.detach().requires_grad_() for x in leaves]
                ours = gradients(function, mine, actions, backend="cpu", **options)
                truth = gradients(wide, [x.double().requires_grad_() for x in leaves], actions, **options)
                worst = max([worst, *(error(x, y) for x, y in zip(ours, truth, strict=True) if y.abs().max() > 1e-2)])
    report[str(dtype)] = worst
print(json.dumps(report))
"""


@built
@pytest.mark.parametrize("isa", ALL)
def test_every_instruction_set(isa):
    env = {**os.environ, "REVAL_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", REPORT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["isa"] in ALL[: ALL.index(isa) + 1]  # a processor without this set uses the next lower one
    if isa == ALL[-1] and "AVX" in torch.backends.cpu.get_cpu_capability():
        assert report["isa"].startswith(torch.backends.cpu.get_cpu_capability().lower())
    assert report["exp"] <= 2 and report["tanh"] <= 4
    assert report["exp of -inf"] == 0 and report["exp of nan"]
    assert report["torch.float32"] < 1e-5 and report["torch.float16"] < 2e-3 and report["torch.bfloat16"] < 2e-2


@built
@pytest.mark.parametrize("isa", ALL[:-1])
def test_rows_by_lesser_instruction_sets(isa):
    """The row kernels have other loops where vectors are short. So the tests of rows run again, in a new process."""
    names = "infinity or not_finite or past_the_cache or values_and_gradients or inplace or offset or without_any"
    tests = [str(Path(__file__).parent / name) for name in ("test_cpu.py", "../test_values.py")]
    env = {**os.environ, "REVAL_CPU_ISA": isa, "REVAL_TEST_BACKENDS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def with_threads(number, function):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@built
@pytest.mark.parametrize("shape", [(1, 200_003), (3, 70_001), (129, 515)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_number_of_threads(shape, dtype):
    """Long rows are divided into segments. The division is the same for any number of threads."""
    logits, actions = logits_and_actions(*shape, dtype=dtype)

    def run():
        leaf = logits.detach().requires_grad_()
        out = token_values(leaf, actions, with_entropy=True, backend="cpu")
        return tuple(out), torch.autograd.grad(sum(x.sum() for x in out), leaf)

    expected = with_threads(1, run)
    for threads in (2, 3):
        assert_same_bits(with_threads(threads, run), expected)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gradient_past_the_cache(dtype, softcap):
    """From 8 MiB on, the stores of the gradient bypass the cache. Rows start anywhere in a cache line. The gradient in
    place never bypasses the cache, so it is the result to compare with."""
    logits, actions = logits_and_actions(600_000 // dtype.itemsize // 1000, 15_013, dtype=dtype)

    def gradient(inplace):
        leaf = logits.clone().requires_grad_()
        out = token_values(leaf.view_as(leaf), actions, softcap=softcap, backend="cpu", inplace_grad=inplace)
        return torch.autograd.grad((2 * out.v - out.log_prob).sum(), leaf)[0]

    assert logits.nbytes > 8 << 20
    assert_same_bits(gradient(False), gradient(True))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_finite(dtype):
    """In a row with an infinite logit, a gradient is 0 or NaN, and never the exponential of another large logit.

    A NaN makes its whole row NaN, even if all other entries of its segment (32,768 entries) are -inf.
    """
    logits, actions = logits_and_actions(6, 32_768 + 131, dtype=dtype, scale=30.0)
    logits[0, 5], logits[1, 77], logits[2] = torch.inf, torch.nan, -torch.inf
    logits[3, ::2] = -torch.inf
    logits[4, 32_768:], logits[4, 32_770], logits[5] = -torch.inf, torch.nan, torch.nan

    def values_and_gradient(backend):
        leaf = logits.clone().requires_grad_()
        v = token_values(leaf, actions, backend=backend).v
        return v.detach(), torch.autograd.grad(v.sum(), leaf)[0]

    ours, theirs = values_and_gradient("cpu"), values_and_gradient("portable")
    assert ours[0].isnan().tolist() == [False, True, False, False, True, True]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(3, 359, 517, 34), (7, 130, 197, 2048)])
def test_linear_does_not_depend_on_the_number_of_threads(shape, dtype, frozen):
    """There are more tokens than a block has, and more words than a tile has; neither number is a multiple of these
    sizes. The block is smaller for the larger width."""
    hidden, weight, actions = head(*shape, dtype=dtype)
    returns, rewards = torch.randn(shape[0]), torch.randn(shape[0])

    def run():
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
        loss, residual = linear_reval_loss(*leaves, actions, returns, rewards, beta=0.5, backend="cpu")
        return loss.detach(), residual, torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])

    expected = with_threads(1, run)
    for threads in (2, 3):
        assert_same_bits(with_threads(threads, run), expected)


MEMORY = """
import sys, torch
from reval_kernels.backends import cpu
from reval_kernels.contract import BellmanOptions, HeadInputs, Layout, Level, Needs, Reference, Transform
assert cpu.missing() is None
dtype, frozen = getattr(torch, sys.argv[1]), sys.argv[2] == "True"
tokens, vocabulary, width = 1024, 40_000, 64
hidden, weight = torch.randn(4, tokens // 4, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
actions, returns, rewards = torch.randint(vocabulary, (4, tokens // 4)), torch.randn(4), torch.randn(4)

def now(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

def run(words):
    head, options = HeadInputs(hidden, weight[:words], None), BellmanOptions(0.5, Level.TRAJECTORY, False, None)
    rest = (Transform(), Reference.of(returns), rewards, options, Needs(True, not frozen, False))
    return cpu.linear_reval_loss(head, actions % words, Layout(None, None), *rest)

run(600)  # first creates the threads and the matmul kernels, so that they do not count
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak, because the imports may have used more memory
before = now("VmRSS")
out = run(vocabulary)
print(now("VmHWM") - before - sum(x.nbytes for x in out) / 2**20)
"""


@built
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the peak in /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_beyond_outputs(dtype, frozen):
    """The pass takes less than 6 MiB of scratch memory. The logits alone would take 156 MiB in fp32."""
    command = [sys.executable, "-c", MEMORY, dtype, str(frozen)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 6


HEAD = """
import torch
from reval_kernels import linear_token_values, reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    hidden, weight, actions = torch.randn(40, 64).to(dtype), torch.randn(300, 64).to(dtype), torch.randint(300, (40,))
    v = linear_token_values(hidden, weight, actions, backend="cpu").v
    assert (v - reference.linear_token_values(hidden.double(), weight.double(), actions).v).abs().max() < 1e-5
"""


@built
@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16"])
def test_whatever_onednn_is_held_to(isa):
    """ONEDNN_MAX_CPU_ISA limits oneDNN to an instruction set. If oneDNN then has no bf16 matmul, it raises an exception
    of its own type, and the head is converted to fp32."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", HEAD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@built
def test_mkldnn_may_be_turned_off_and_on():
    hidden, weight, actions = head(40, 300, 64, dtype=torch.bfloat16)
    once = linear_token_values(hidden, weight, actions, backend="cpu")
    with torch.backends.mkldnn.flags(enabled=False):
        without = linear_token_values(hidden, weight, actions, backend="cpu")
    assert (without.v - once.v).abs().max() < 1e-5
    assert_same_bits(once, linear_token_values(hidden, weight, actions, backend="cpu"))


@built
def test_mixed_dtypes_and_strides_of_the_head():
    """Mixed dtypes are converted to fp32, one tile at a time. The entries of a row need not be contiguous."""
    hidden, weight, actions = head(7, 300, 20)
    expected = linear_token_values(hidden.half(), weight.bfloat16(), actions, backend="portable")
    apart = torch.randn(20, 600)[:, ::2].copy_(weight.T).T.bfloat16().T.contiguous().T
    ours = linear_token_values(hidden.half().T.contiguous().T, apart, actions, backend="cpu")
    for x, y in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_what_is_said_when_it_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "library.so")
    cpu.missing.cache_clear()
    try:
        assert cpu.missing().startswith("its C++ library has not been built; build it with: python -m")
        cpu.missing.cache_clear()
        (tmp_path / "not_built.txt").write_text("cmake was not found\n")
        assert reval_kernels.backends()["cpu"].reason.startswith("cmake was not found; build it with: python -m")
        cpu.missing.cache_clear()
        (tmp_path / "not_built.txt").unlink()
        (tmp_path / "libreval_kernels_cpu-torch2.7.so").write_text("for another torch")
        (tmp_path / "libreval_kernels_cpu-torch2.12.so").write_text("for another torch")
        assert cpu.missing().startswith(
            f"its C++ library was built for torch 2.12, 2.7, and this is torch {torch.__version__}"
        )
        cpu.missing.cache_clear()
        (tmp_path / "library.so").write_text("no library")
        assert "does not load with torch" in cpu.missing()
        logits, actions = logits_and_actions(2, 7)
        assert token_values(logits, actions).q.shape == torch.Size([2])  # by the portable backend
    finally:
        cpu.missing.cache_clear()


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")
@pytest.mark.parametrize("missing", ["cmake", "compiler"])
def test_the_package_installs_without_a_compiler(missing, tmp_path):
    """setup.py does not fail. It writes a note with the reason instead of a library."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "reval_kernels/backends/cpu",
        tmp_path / "reval_kernels/backends/cpu",
        ignore=shutil.ignore_patterns("*.so", "not_built.txt"),
    )
    (tmp_path / "reval").mkdir()
    for package in ("reval", "reval_kernels"):
        (tmp_path / package / "__init__.py").write_text('__version__ = "0"\n')
    (tmp_path / "README.md").write_text("")
    tools = tmp_path / "tools"
    tools.mkdir()
    if missing == "compiler":
        if not shutil.which("cmake"):
            pytest.skip("no cmake")
        (tools / "cmake").symlink_to(shutil.which("cmake"))
    code = (
        "import runpy, sys; sys.executable = '/none/python'; sys.argv[:] = ['setup.py', 'build_ext', '--inplace']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )  # a Python without cmake beside it
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PATH": str(tools), "CXX": "", "CC": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    note = (tmp_path / "reval_kernels/backends/cpu/not_built.txt").read_text()
    assert ("cmake was not found" if missing == "cmake" else "failed:") in note
