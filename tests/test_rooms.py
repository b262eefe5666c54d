"""The packages of lrtrain are rooms: each imports only from rooms below it, and modules import in no circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import lrtrain

PACKAGE = Path(lrtrain.__file__).parent
ROOMS = """
errors core linalg distributed config data plotting tracking layers model optim checkpoint engine planning init_from
measure analysis run simulation sweeps command
""".split()
"""From the lowest to the highest."""

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """The modules of lrtrain that a file imports, wherever it does, types aside."""
    tree = ast.parse(path.read_text())
    typing = {id(n) for block in ast.walk(tree) if is_for_types(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                if node.module.split(".")[0] == "lrtrain":
                    yield full if full in MODULES else node.module


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_but_the_package_itself_is_in_a_room():
    assert {room(module) for module in MODULES if module != "lrtrain"} == set(ROOMS)
    assert [*PACKAGE.glob("*.py")] == [PACKAGE / "__init__.py"]


def test_rooms_import_only_from_rooms_below():
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if module != "lrtrain"
        for other in imported(path)
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {other for other in imported(path) if other != module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_room_says_in_a_sentence_what_it_is_for():
    for name in ROOMS:
        said = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
        assert said and said.splitlines()[0].endswith("."), name
