"""Guarantee 9: every place that deletes, overwrites, renames or cuts a file is listed in docs/contributing.md, with its test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HEADING = "## Every place that deletes or overwrites"
ALWAYS = {
    *(
        "unlink",
        "rmtree",
        "rmdir",
        "truncate",
        "ftruncate",
        "write_text",
        "write_bytes",
        "copyfile",
        "copytree",
        "copy2",
    ),
    *("move", "mkstemp", "savefig", "savez", "savez_compressed", "save_file", "removedirs", "copyfileobj"),
}
"""Methods and functions that do so whatever they are called on."""
OF_OS = {"replace", "rename", "remove", "renames", "link", "symlink"}
"""Those that strings and lists have, too: only of `os` or `shutil`, or with the one argument that a path's method takes."""
SHELL = re.compile(r"(?:^|[;&|(]|\bthen|\bdo)\s*(rm|mv|cp|ln|tee|truncate|install|dd)\s", re.MULTILINE)


def places(root: Path) -> dict[str, set[str]]:
    """``file:function`` of every such place, and what it calls."""
    found: dict[str, set[str]] = {}
    for folder in ("multitrain", "launch", "slurm"):
        for path in sorted((root / folder).rglob("*.py")):
            name = str(path.relative_to(root))
            for where, call in _calls(ast.parse(path.read_text(encoding="utf-8")), ""):
                found.setdefault(f"{name}:{where or 'module'}", set()).add(call)
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix in ("", ".sh"):
                text = "\n".join(
                    line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")
                )
                for match in SHELL.finditer(text):
                    found.setdefault(f"{path.relative_to(root)}:module", set()).add(match[1])
    return found


def _calls(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _calls(child, f"{where}.{child.name}" if where else child.name)
            continue
        if isinstance(child, ast.Call) and (call := _overwrites(child)):
            yield where, call
        yield from _calls(child, where)


def _overwrites(call: ast.Call) -> str | None:
    """What a call is when it deletes or writes a file; None for any other."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if name in ALWAYS or (name == "save" and of in ("torch", "np", "numpy")):
        return name
    if name in OF_OS and (of in ("os", "shutil") or (name in ("replace", "rename") and len(call.args) == 1)):
        return name if not call.keywords or of in ("os", "shutil") else None
    if name in ("open", "fdopen"):
        modes = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
        texts = [a.value for a in modes if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if any(re.fullmatch(r"[rwaxbt+]{1,4}", t) and set(t) & set("wax+") for t in texts):
            return "open"
        if of == "os" and any(f in ast.dump(call) for f in ("O_WRONLY", "O_RDWR", "O_CREAT")):
            return "open"
    return None


def listed(root: Path) -> dict[str, tuple[set[str], str]]:
    """The rows of the table in the docs: by place, what is called, and the test."""
    text = (root / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([^`]+:[^`]+)` \| ([^|]+) \| [^|]+ \| `([^`]+)` \|$", text.partition(HEADING)[2], re.MULTILINE
    )
    return {place: ({c.strip() for c in calls.split(",")}, test) for place, calls, test in rows}


def test_every_place_is_in_the_list(root: Path) -> None:
    docs = {place: calls for place, (calls, _) in listed(root).items()}
    new = {p: sorted(c - docs.get(p, set())) for p, c in places(root).items() if not c <= docs.get(p, set())}
    assert not new, f"test these with a hostile layout, then list them in docs/contributing.md: {new}"


def test_every_test_of_the_list_is_there(root: Path) -> None:
    there = places(root)
    for place, (_, test) in listed(root).items():
        if place not in there:
            continue
        file, _, name = test.partition("::")
        assert (root / file).exists(), f"{place}: {file}"
        assert not name or f"def {name}(" in (root / file).read_text(encoding="utf-8"), f"{place}: {test}"
