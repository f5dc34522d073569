"""The list of providers: names, families, and reasons why a provider cannot run."""

from benchmarks.peers import needs
from benchmarks.providers import COMPUTES, FAMILIES, backend_missing, providers


def test_every_family_has_ours_plain_pytorch_and_peers():
    for family in FAMILIES:
        names = [p.name for p in providers(family)]
        assert names[:6] == ["triton", "cpu", "portable", "reference", "torch eager", "torch.compile"]
        assert len(set(names)) == len(names)
        assert all(p.computes in COMPUTES and p.family == family for p in providers(family))
    assert {p.name for p in providers("linear_reval_loss")} > {
        "F.linear_cross_entropy",
        "F.linear_cross_entropy options",
        "cut-cross-entropy",
        "cut-cross-entropy torch_compile",
        "Liger",
        "TRL fused head",
    }


def test_a_peer_that_is_not_installed_or_lacks_the_name_says_so():
    assert "no_such_peer does not import: ModuleNotFoundError" in needs("no_such_peer")("cpu")
    assert needs("math", "sqrt", "no_such_function")("cpu") == "math has no no_such_function in this version"
    assert needs("math", device="cuda")("cpu") == "its kernels need a GPU, this is the cpu"
    assert needs("math", "sqrt")("cpu") is None


def test_our_backends_say_where_they_run():
    assert "interpreter" in backend_missing("triton", "cpu")
    assert backend_missing("cpu", "cuda") == "for tensors on the CPU"
    assert backend_missing("portable", "cpu") is None
