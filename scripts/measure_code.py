"""Size of code: files, lines, functions, docstrings and tests of one or several source trees.

python scripts/measure_code.py lrtrain
python scripts/measure_code.py lrtrain=lrtrain:tests torchtitan=/path/to/torchtitan
"""

import argparse
import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("files", "lines", "longest file", "median function", "longest function", "docstrings", "tests : code")


@dataclass(frozen=True)
class Function:
    name: str
    lines: int
    public: bool
    documented: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", metavar="[NAME=]CODE[:TESTS]", help="folders of Python files")
    rows = {name: measure(code, tests) for name, code, tests in map(parsed, parser.parse_args().trees)}
    print("| | " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(row) + " |")


def parsed(tree: str) -> tuple[str, Path, Path | None]:
    """Name, folder of code and folder of tests of a command-line argument."""
    name, _, folders = tree.rpartition("=")
    code, _, tests = folders.partition(":")
    return name or code, Path(code), Path(tests) if tests else None


def measure(code: Path, tests: Path | None) -> list[str]:
    """One row of the table."""
    files = {path: path.read_text() for path in sorted(code.rglob("*.py"))}
    lengths = {path: len(text.splitlines()) for path, text in files.items()}
    functions = [function for text in files.values() for function in functions_of(ast.parse(text))]
    public = [function for function in functions if function.public]
    longest = max(functions, key=lambda function: function.lines)
    tested = sum(len(path.read_text().splitlines()) for path in tests.rglob("*.py")) if tests else None
    return [
        str(len(files)),
        f"{sum(lengths.values()):,}",
        str(max(lengths.values())),
        f"{statistics.median(function.lines for function in functions):g}",
        f"{longest.lines} (`{longest.name}`)",
        f"{sum(function.documented for function in public) / len(public):.0%} of public functions",
        "–" if tested is None else f"{tested / sum(lengths.values()):.2f}",
    ]


def functions_of(tree: ast.AST, hidden: bool = False) -> Iterator[Function]:
    """Every function below a node; nested ones and those with a leading underscore are not public."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            public = not hidden and not node.name.startswith("_")
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(node.name, lines, public, ast.get_docstring(node) is not None)
            yield from functions_of(node, hidden=True)
        else:
            below = hidden or (isinstance(node, ast.ClassDef) and node.name.startswith("_"))
            yield from functions_of(node, below)


if __name__ == "__main__":
    main()
