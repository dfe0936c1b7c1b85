"""The house's rules: floors, no circles, references that lead somewhere, small folders, one home for a name.

All of them are read from the text of the tree, without importing it.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up; a module belongs to the longest name that its own begins with, and programs are above all.
FLOORS = (
    ("utils", "files", "precision", "signals", "system", "terminal"),
    ("config", "model_sizes", "runs"),
    ("dataset", "optim", "scheduler"),
    ("models",),
    ("grounding",),
    ("grounding.web", "grounding.report", "grounding.pictures"),
    ("grounding.evaluate", "training"),
    ("",),
)
CORE = 4  # the floor of grounding
# (module, what it imports inside a function) -> why that import may run up, or in a circle.
LAZY: dict[tuple[str, str], str] = {}
# What evaluation without --report need not wait for.
HEAVY = {"matplotlib", "skimage", "jinja2", "gradio", "pandas"}
MOST_MODULES = 12  # of a folder, not counting __init__.py and the programs
# Names that several modules define -> why.
SHARED: dict[str, str] = {
    "Row": "a JSON object, whatever it holds",
}
# Files that programs write, or that examples have the reader write.
MADE = {"table.md", "mine.yaml", "FIGURE.png", "lines.py", "Grounding_lines.yaml"}
CODE = ("benchmarks", "dataset", "docs", "grounding", "models", "optim", "scheduler", "system", "training")
TEXTS = (".py", ".md", ".yaml", ".html", ".ipynb", ".toml", ".yml", ".txt")


@functools.cache
def modules() -> dict[str, Path]:
    """The modules of the code by dotted name; tests are none."""
    paths = [*ROOT.glob("*.py"), *(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))]
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in paths}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): path for path, names in sorted(parts.items())}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def import_statements(name: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The imports of a module, and whether each is inside a function; without those for type checking alone."""
    found: list[tuple[ast.Import | ast.ImportFrom, bool]] = []
    todo: list[tuple[ast.AST, bool]] = [(tree(modules()[name]), False)]
    while todo:
        node, lazy = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, lazy))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += [(each, lazy) for each in node.orelse]
        elif not isinstance(node, ast.expr):
            lazy |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            todo += [(each, lazy) for each in ast.iter_child_nodes(node)]
    return found


def imports(name: str, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """(module imported, line) of a module, ours and others'.

    Args:
        lazy: those inside functions as well.
    """
    for node, inside in import_statements(name):
        if inside and not lazy:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        else:
            package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in modules() else source, node.lineno


def ours(name: str, lazy: bool = True) -> list[tuple[str, int]]:
    return [(found, line) for found, line in imports(name, lazy) if found in modules() and found != name]


def floor(name: str) -> int:
    fits = [
        (len(own), level) for level, names in enumerate(FLOORS) for own in names if f"{name}.".startswith(f"{own}.")
    ]
    return max(fits)[1] if fits else len(FLOORS) - 1


# ---- imports


@pytest.mark.parametrize("name", modules())
def test_no_import_runs_up(name: str) -> None:
    up = [
        f"{modules()[name].relative_to(ROOT)}:{line} imports {found}, which is above it"
        for found, line in ours(name)
        if floor(found) > floor(name) and (name, found) not in LAZY
    ]
    assert not up, "\n".join(up)


def test_no_imports_run_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, "these import each other: " + " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for found, _ in ours(name):
                if (name, found) not in LAZY:
                    visit(found, (*above, name))
            done.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize(("name", "found"), LAZY)
def test_an_import_on_the_list_is_lazy(name: str, found: str) -> None:
    assert found in dict(ours(name))
    assert found not in dict(ours(name, lazy=False))


@pytest.mark.parametrize("name", [name for name in modules() if floor(name) <= CORE or name == "grounding.evaluate"])
def test_evaluation_loads_nothing_heavy(name: str) -> None:
    """Neither a wing nor its libraries, where `import grounding.evaluate` leads to; in a function, both may be."""
    heavy = {
        f"{modules()[name].relative_to(ROOT)}:{line} loads {found}; import it in the function that needs it"
        for found, line in imports(name, lazy=False)
        if found.partition(".")[0] in HEAVY or floor(found) == CORE + 1
    }
    assert not heavy, "\n".join(sorted(heavy))


# ---- references


@functools.cache
def texts() -> list[Path]:
    """What people read: the code, its tests, documents and configs."""
    inside = (path for folder in (*CODE, "configs", "tests") for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in (*ROOT.iterdir(), *inside) if path.suffix in TEXTS or path.name == "Makefile")


def told(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers; of a test, whose strings may name anything, docstrings and comments."""
    test, quoted = ROOT / "tests" in path.parents and path.suffix == ".py", ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        here = quoted or ("docstring" if line.lstrip().startswith('"""') else "")
        yield number, line if not test or here == "docstring" else "" if here else line.partition("# ")[2]
        if line.count('"""') % 2:
            quoted = "" if quoted else here or "data"


# A file of code or a document by its name or path; a path that begins with a folder of the tree; `a.dotted.name`.
FILE = re.compile(r"(?<![\w/.{}<>*-])[\w./-]*\w\.(?:py|md)\b(?![\w{<*])")
INSIDE = re.compile(
    rf"(?<![\w/.{{}}<>*$-])(?:\.\./)*(?:{'|'.join((*CODE, 'configs', 'tests'))})/[\w./-]*(?![\w./-]*[{{<*])"
)
DOTTED = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.\w+)+)(?:\(\))?`(?!`)")


def missing_references(path: Path) -> list[str]:
    """Lines "file:line names ..., which does not exist" of a text."""
    found = []
    for number, line in told(path):
        found += [(number, match[0]) for match in re.finditer(r"\bSPE[C]\b", line)]
        for match in (*FILE.finditer(line), *INSIDE.finditer(line)):
            name = re.sub(r"^[ab]/", "", match[0].rstrip("."))  # of a diff
            if name.rpartition("/")[2] not in MADE and not _exists(name, path):
                found.append((number, name))
        found += [(number, match[1]) for match in DOTTED.finditer(line) if not _is_defined(match[1])]
    where = path.relative_to(ROOT)
    return [f"{where}:{number} names {name}, which does not exist" for number, name in dict.fromkeys(found)]


def _exists(name: str, named_in: Path) -> bool:
    """Whether a path is there, from the root or from the text; a name alone or the end of a path, anywhere."""
    return (
        (ROOT / name).exists() or (named_in.parent / name).exists() or any(end.endswith(f"/{name}") for end in _paths())
    )


@functools.cache
def _paths() -> frozenset[str]:
    return frozenset(f"/{path.relative_to(ROOT).as_posix()}" for path in texts())


def _is_defined(dotted: str) -> bool:
    """Whether `module.name` is there, if it begins with a module of ours; what begins otherwise is not our concern."""
    parts = dotted.split(".")
    count = max((n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in modules()), default=0)
    if count in (0, len(parts)) or f".{parts[count]}" in (*TEXTS, ".json", ".pth"):  # a file of that name
        return True
    module = ".".join(parts[:count])
    imported = {alias.name for node, _ in import_statements(module) for alias in node.names}
    return parts[count] in defined(module) | imported


@pytest.mark.parametrize("path", texts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_references_lead_somewhere(path: Path) -> None:
    missing = missing_references(path)
    assert not missing, "\n".join(missing)


# ---- folders and names


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules().values()}), ids=lambda path: path.name)
def test_folders_are_small(folder: Path) -> None:
    found = [path.name for name, path in modules().items() if path.parent == folder and name not in programs()]
    names = [name for name in found if name != "__init__.py"]
    assert len(names) <= MOST_MODULES, f"{folder} has {len(names)} modules; make a folder of some: {', '.join(names)}"


@functools.cache
def programs() -> set[str]:
    """The modules that no other one imports."""
    return modules().keys() - {found for name in modules() for found, _ in ours(name)}


@functools.cache
def defined(name: str) -> set[str]:
    """The names that a module defines at its top."""
    names: set[str] = set()
    for node in tree(modules()[name]).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return names


@functools.cache
def homes() -> dict[str, list[str]]:
    """Public name -> the modules that define it, if they are several. Programs have their own names.

    A constant is public where another module imports it.
    """
    nodes = (node for module in modules() for node, _ in import_statements(module) if isinstance(node, ast.ImportFrom))
    taken = {(node.module, alias.name) for node in nodes for alias in node.names}
    found: dict[str, list[str]] = {}
    for module in modules():
        for name in defined(module) if floor(module) < len(FLOORS) - 1 else ():
            if not name.startswith("_") and (not name.isupper() or (module, name) in taken):
                found.setdefault(name, []).append(module)
    return {name: places for name, places in sorted(found.items()) if len(places) > 1}


@pytest.mark.parametrize("name", homes())
def test_a_name_has_one_home(name: str) -> None:
    assert name in SHARED, f"{name} is defined in {' and in '.join(homes()[name])}: give one of them another name"


def test_the_shared_names_are_shared() -> None:
    assert [name for name in SHARED if name not in homes()] == []
