"""docs/architecture.md against the code: every module has one room, imports go down, stations and counts are real."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without the head of the table."""
    lines = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


ROOMS = {room: re.findall(r"`([\w.]+)`", modules) for room, _, modules in table("The rooms")}
ROOM_OF = {module: room for room, modules in ROOMS.items() for module in modules}


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package in ("reval", "reval_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def statements(tree: ast.AST) -> list[ast.stmt]:
    """All import statements, those inside functions too, but not those for type checkers alone."""
    found: list[ast.stmt] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        found += statements(node)
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Full names of everything that a module imports: modules of ours, and packages of others."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    out = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
            continue
        assert isinstance(node, ast.ImportFrom)
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        names = {f"{base}.{alias.name}" for alias in node.names}
        out |= (names & modules().keys()) or {base}
    return frozenset(out - {name})


def own(name: str) -> frozenset[str]:
    return imports(name) & modules().keys()


def test_every_module_has_one_room():
    listed = [module for room in ROOMS.values() for module in room]
    assert sorted(listed) == sorted(modules()), set(listed) ^ set(modules())


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name):
    order = list(ROOMS)
    for target in own(name):
        above = order.index(ROOM_OF[target]) < order.index(ROOM_OF[name])
        assert not above, f"{name} ({ROOM_OF[name]}) imports {target} of the higher room {ROOM_OF[target]}"


def test_a_package_of_two_rooms_imports_nothing():
    """Importing reval.evaluation.benchmarks of the room problems runs the package's __init__.py of a higher room."""
    assert ROOM_OF["reval.evaluation.benchmarks"] != ROOM_OF["reval.evaluation"]
    assert not imports("reval.evaluation")


def test_no_module_imports_itself_through_others():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(own(name)):
                visit(target, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_the_kernels_import_no_trainer_and_torch_alone():
    """Triton where the GPU kernels are, and numpy where they are interpreted."""
    for name in (n for n in modules() if n.startswith("reval_kernels")):
        packages = {target.partition(".")[0] for target in imports(name)} - set(sys.stdlib_module_names)
        allowed = {"reval_kernels", "torch", ""}
        if name.startswith("reval_kernels.backends.gpu") or name == "reval_kernels.aot":
            allowed |= {"triton", "numpy"} if name.endswith("interpreter") else {"triton"}
        assert packages <= allowed, f"{name} imports {packages - allowed}"


def test_every_arrow_of_the_picture_is_an_import():
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", PAGE, re.MULTILINE)
    assert len(arrows) > 10
    between = {(ROOM_OF[name], ROOM_OF[target]) for name in modules() for target in own(name)}
    assert set(arrows) <= between, set(arrows) - between


@pytest.mark.parametrize(
    ("file", "function"), [(f.strip("`"), g.strip("`")) for _, f, g in table("One iteration, station by station")]
)
def test_stations(file, function):
    *outer, name = function.split(".")
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in outer:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
    assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in body)


def test_an_option_of_the_loss_lives_in_six_files():
    """The command on docs/extending.md, which lists them."""
    found = [
        p.relative_to(ROOT).as_posix() for p in (ROOT / "reval_kernels").rglob("*") if p.suffix in (".py", ".cpp", ".h")
    ]
    with_option = {p for p in found if "semi_gradient" in (ROOT / p).read_text(encoding="utf-8")}
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("## Adding an option to a loss\n")[1]
    listed = set(re.findall(r"^\d\. `(reval_kernels/[\w/.]+)`", page.split("\n## ")[0], re.MULTILINE))
    assert with_option == listed and len(listed) <= 6, with_option ^ listed


def test_importing_the_kernels_loads_no_trainer():
    code = "import sys, reval_kernels; print(sorted(m for m in sys.modules if m == 'reval' or m.startswith('reval.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
