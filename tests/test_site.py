"""`make docs`: the site builds without a warning, has every name and setting, and loads nothing from other hosts."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reval_kernels
from reval import config_io
from reval.config import Config

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "site"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="needs the extra docs")


@pytest.fixture(scope="module", autouse=True)
def site() -> None:
    """Built as the Makefile does. A broken link, anchor or name of the reference is an error of the build."""
    commands = re.search(r"^docs: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands
    for command in commands[1].splitlines():
        words = command.split()
        program = [sys.executable] if words[0].endswith("python") else [str(Path(sys.executable).parent / "zensical")]
        done = subprocess.run([*program, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr


def pages() -> list[Path]:
    return sorted(SITE.rglob("*.html"))


def test_every_page_is_in_the_navigation_and_in_the_list():
    """A page that is missing there is no error of the build."""
    navigation, listed = (
        (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1],
        (ROOT / "docs" / "README.md").read_text(),
    )
    for page in (ROOT / "docs").glob("[a-z]*.md"):
        assert f"- {page.name}\n" in navigation and f"]({page.name})" in listed, page.name


def test_it_loads_nothing_from_other_hosts():
    assert len(pages()) > 20
    for page in pages():
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(\S+)", text)
        loaded += [tag for tag in re.findall(r"<link[^>]+>", text) if "stylesheet" in tag or "preconnect" in tag]
        assert not [x for x in loaded if re.search(r"(?:https?:)?//", x)], page
    for sheet in SITE.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


def test_links_between_pages_lead_to_files():
    for page in pages():
        if page.name == "404.html":
            continue
        for target in re.findall(r"(?:href|src)=\"([^\"#?]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|/$", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_has_every_name_and_the_settings_every_setting():
    reference = (SITE / "reference.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="reval_kernels\.([\w.]+)"', reference))
    names = {identifier.rpartition(".")[2] for identifier in ids}
    assert set(reval_kernels.__all__) - {"__version__"} <= names
    assert "TokenValues.returns" in ids and "reference.bellman_loss" in ids
    assert "&gt;&gt;&gt; " in reference  # examples
    settings = (SITE / "settings.html").read_text(encoding="utf-8")
    missing = [name for name in config_io.settings(Config) if f">{name}<" not in settings]
    assert not missing


def test_the_docstrings_of_the_python_interface_are_shown():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    shown = (SITE / "python.html").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `(reval\.[\w.]+)` \|", page, re.MULTILINE):
        assert f'id="{name}"' in shown
