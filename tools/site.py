"""Writes the pages of the documentation site into build/pages: docs/ and what the site has in addition.

- The README is the first page, and the settings have a page made from reval/config.py.
- docs/reference.md and docs/python.md name functions and types in tables; below them come the docstrings.
- A link to a file of the repository outside docs/ leads to a page with that file.

`make docs` runs this and then zensical (mkdocs.yml). It imports neither torch nor what the trainer needs.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
sys.path.insert(0, str(ROOT))

from reval import config_io  # noqa: E402  # needs the line before
from reval.config import Config  # noqa: E402

CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
LARGEST_PAGE = 100_000
"""Bytes of a file that is shown on a page. A larger file can be downloaded."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".jsonl": "json", ".cpp": "cpp", ".h": "cpp"}


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    waiting = ["README.md", *(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*") if p.is_file())]
    waiting.remove("docs/README.md")  # the README has the same links
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            write(page_of(path), content_of(path))
            waiting += linked(path)
    write("settings.md", settings_page())


def write(page: str, content: str | bytes) -> None:
    file = PAGES / page
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def page_of(path: str) -> str:
    """Where the site keeps a file of the repository."""
    if path in ("README.md", "docs/README.md"):
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    file = ROOT / path
    as_it_is = path.endswith((".md", ".png", ".svg")) or (file.is_file() and file.stat().st_size > LARGEST_PAGE)
    return f"source/{path}" if as_it_is else f"source/{path}.md"


def content_of(path: str) -> str | bytes:
    """The page that shows a file or a folder, or the bytes of a file that has none."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if not p.name.startswith(("_", ".")))
        return f"# {path}\n\n" + "\n".join(f"- `{name}`" for name in names)
    if not page_of(path).endswith(".md"):
        return file.read_bytes()
    text = file.read_text(encoding="utf-8")
    if not path.endswith(".md"):
        fence = "`" * 6  # longer than any fence in the file
        return f"# {path}\n\n{fence} {LANGUAGES.get(file.suffix, 'text')}\n{text}\n{fence}\n"
    pieces = CODE_BLOCK.split(text)
    pieces[::2] = [LINK.sub(lambda match: link(match, path), piece) for piece in pieces[::2]]
    page = "".join(pieces).replace("```mermaid\n", "```\n")  # a browser would load mermaid from another host
    if names := names_in(text):
        page += "\n\n## Docstrings\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
    return page


def names_in(text: str) -> list[str]:
    """The names of our code that stand in the first column of the page's tables, with modules: `reval.loop.train`."""
    return re.findall(r"^\| `((?:reval|reval_kernels)\.\w[\w.]*)` \|", text, re.MULTILINE)


def linked(path: str) -> list[str]:
    """The files and folders of the repository outside docs/ that a page links to."""
    if not path.endswith(".md"):
        return []
    prose = "".join(CODE_BLOCK.split((ROOT / path).read_text(encoding="utf-8"))[::2])
    found = [target_of(match[1], path) for match in LINK.finditer(prose)]
    return [target for target in found if target is not None and not target.startswith("docs/")]


def target_of(link: str, path: str) -> str | None:
    """The path in the repository that a link of the page `path` names. None if it leads elsewhere."""
    if re.match(r"[a-z]+:", link):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if (ROOT / target).exists() else None


def link(match: re.Match[str], path: str) -> str:
    """The link in the site's own terms: relative between the two pages."""
    target = target_of(match[1], path)
    if target is None:
        return match[0]
    return posixpath.relpath(page_of(target), posixpath.dirname(page_of(path)) or ".") + (match[2] or "")


def settings_page() -> str:
    """Every setting with its default, type and meaning, from reval/config.py."""
    lines = [
        "# Settings",
        "",
        "`section.setting=value` on the command line, or YAML. `reval train --help` prints this.",
    ]
    for section, kind in get_type_hints(Config).items():
        docs = config_io.field_docs(kind)
        lines += ["", f"## {section}", "", f"{kind.__doc__}"]
        for field in fields(kind):
            default = config_io.default_of(field)
            shown = default if isinstance(default, str) else config_io.show(default)
            text = re.sub(r"([*<>\[\]])", r"\\\1", docs[field.name])
            text = re.sub(r"\bdocs/(\w+\.md)", r"[docs/\1](\1)", text)
            lines += ["", f"### {section}.{field.name}", ""]
            lines += [f"Default `{shown}`; {config_io.describe(field.type)}.", "", text]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
