"""Size and shape of the package: ``python tests/shape.py [FOLDER]``; `test_project.py` holds the limits."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

NOT_CORE = ("testbed", "zeroshot", "benchmarks", "bench", "distributed", "explorer")
SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
BRANCHES = (
    ast.If,
    ast.For,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.comprehension,
    ast.Assert,
    ast.match_case,
)


def docstring_lines(tree: ast.AST) -> set[int]:
    """Lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef)
        ) and ast.get_docstring(node, clean=False):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measure(path: Path) -> dict[str, int]:
    """Lines, code lines, tokens of code (no comments, no docstrings) and comments of one file."""
    text = path.read_text()
    documentation = docstring_lines(ast.parse(text))
    code, tokens, comments = set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comments += token.type == tokenize.COMMENT
        if token.type in SKIPPED or token.start[0] in documentation:
            continue
        tokens += 1
        code.update(range(token.start[0], token.end[0] + 1))
    return {
        "lines": text.count("\n"),
        "code": len(code),
        "tokens": tokens,
        "comments": comments,
    }


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity: one more than the branches, those of inner functions included."""
    branches = sum(isinstance(node, BRANCHES) for node in ast.walk(function))
    return (
        1
        + branches
        + sum(len(n.values) - 1 for n in ast.walk(function) if isinstance(n, ast.BoolOp))
    )


def functions(path: Path) -> list[tuple[str, int, int]]:
    """(name, code lines, complexity) of every function, those inside others left out."""
    text = path.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    documentation, found = docstring_lines(tree), []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                span = range(child.lineno, child.end_lineno + 1)
                code = [
                    i
                    for i in span
                    if i not in documentation and lines[i - 1].split("#")[0].strip()
                ]
                found.append(
                    (f"{path.stem}.{prefix}{child.name}", len(code), complexity(child))
                )

    visit(tree, "")
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """What every module of the package imports of it at module level."""
    modules = {
        ".".join(p.relative_to(package).with_suffix("").parts): p
        for p in package.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        here = (
            name.split(".")
            if path.name == "__init__.py" and name != "__init__"
            else name.split(".")[:-1]
        )
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                base = here[: len(here) - node.level + 1] if node.level else []
                base = base + (node.module.split(".") if node.module else [])
                found = [
                    (".".join([*base, alias.name]), ".".join(base)) for alias in node.names
                ]
            elif isinstance(node, ast.Import):
                found = [(alias.name,) for alias in node.names]
            else:
                continue
            for candidates in found:  # the longer name goes first: what is imported may be a module or stand in one
                candidates = [
                    target.removeprefix(f"{package.name}.") for target in candidates
                ]
                graph[name] |= set(
                    [target for target in candidates if target in names and target != name][
                        :1
                    ]
                )
    graph.pop("__init__", None)
    return graph


def levels(graph: dict[str, set[str]]) -> tuple[dict[str, int], list[str]]:
    """Import level of every module, and the modules that stand in a circle."""
    level: dict[str, int] = {}
    left = {name: {m for m in found if m in graph} for name, found in graph.items()}
    while left:
        ready = [name for name, needs in left.items() if needs <= level.keys()]
        if not ready:
            break
        for name in ready:
            level[name] = 1 + max((level[m] for m in left[name]), default=0)
        left = {name: needs for name, needs in left.items() if name not in ready}
    return level, sorted(left)


def is_core(path: Path, package: Path) -> bool:
    return path.relative_to(package).parts[0].removesuffix(".py") not in NOT_CORE


def report(package: Path) -> dict[str, dict[str, float]]:
    """Sums over the core and over all."""
    out = {}
    for name, keep in (("core", lambda p: is_core(p, package)), ("all", lambda p: True)):
        files = [p for p in sorted(package.rglob("*.py")) if keep(p)]
        counts = [measure(p) for p in files]
        total = {
            k: sum(count[k] for count in counts)
            for k in ("lines", "code", "tokens", "comments")
        }
        every = [f for p in files for f in functions(p)]
        longest, hardest = max(every, key=lambda f: f[1]), max(every, key=lambda f: f[2])
        out[name] = total | {
            "tokens a code line": round(total["tokens"] / total["code"], 1),
            "comments in 100 code lines": round(100 * total["comments"] / total["code"], 1),
            "longest function": f"{longest[1]} ({longest[0]})",
            "highest complexity": f"{hardest[2]} ({hardest[0]})",
        }
    level, circles = levels(imports(package))
    out["all"] |= {
        "import levels": max(level.values()),
        "modules in circles": ", ".join(circles) or "none",
    }
    return out


if __name__ == "__main__":
    folder = Path(
        sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "corehead"
    )
    for name, values in report(folder).items():
        print(f"{name}: " + "; ".join(f"{k} {v}" for k, v in values.items()))
    if "-v" in sys.argv:
        for path in sorted(folder.rglob("*.py")):
            print(path.relative_to(folder), measure(path))
