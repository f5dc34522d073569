"""What a person who installs the package meets: its name, versions, extras and links."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import reval
import reval_kernels

ROOT = Path(__file__).parents[1]
STRANGER = re.compile(
    r"""pip\ install(?:\ [-\w.=<>,\[\]]+)*\ ['"]?reval(?![\w-])  # also after options and other packages
    |\breval\[(?:train|vllm|data|trackers|trl|bench|docs|dev|lora)""",
    re.VERBOSE,
)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked(*patterns: str) -> list[Path]:
    out = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in out.splitlines()]


def test_no_page_installs_the_other_project_named_reval():
    """On PyPI, `reval` is a stranger's project. Ours is reval-kernels."""
    assert STRANGER.search("run pip install 'reval[data]'") and STRANGER.search("pip install -U reval\n")
    assert STRANGER.search("or reval[trackers] for all") and not STRANGER.search("pip install 'reval-kernels[data]'")
    for path in tracked("*.py", "*.md", "*.toml", "*.yaml", "*.txt", "Makefile"):
        lines = path.read_text().splitlines() if path != Path(__file__) else []
        wrong = [line for line in lines if STRANGER.search(line) and "No page and no message" not in line]
        assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"


def test_the_extras_are_those_of_the_pages():
    extras = set(project()["optional-dependencies"])
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page.split("## ")[0], re.MULTILINE)) == extras
    assert "_TABLE" not in page
    for path in tracked("*.py", "*.md"):
        for given in re.findall(r"reval-kernels\[([\w,]+)\]", path.read_text()):
            assert set(given.split(",")) <= extras, f"{path.relative_to(ROOT)}: {given}"


def test_the_long_description_has_no_relative_link():
    """pip's build runs setup.py, which makes it from README.md."""
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **given: print(given['long_description']); "
        "runpy.run_path('setup.py')"
    )
    text = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "](https://arxiv.org/abs/2603.23355)" in text and "docs/images/demo.png" not in text
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", text)


def test_both_packages_have_one_version():
    assert reval.__version__ == reval_kernels.__version__
