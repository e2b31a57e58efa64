"""What is the same in the scripts, so that a diff of two of them is the paper's list of changes.

    python -m tests.sameness          how it stands: the table SAME, and the size of the diffs

test_structure.py holds the scripts to it.
"""

import ast
import itertools
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("dreamer_v*.py"))
NEIGHBOURS = list(itertools.pairwise(SCRIPTS))
HUNKS, LINES = 60, 700  # of `git diff --no-index -U0`: at most so many, and changed lines each side

# Versions -> what is byte-identical in them. Of a class that differs: its methods that do not.
SAME = {}

# Functions of one name whose parameters differ, with the reason.
OTHER_PARAMETERS = {}


@cache
def source_of(name: str) -> str:
    return (ROOT / name).read_text()


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(source_of(name))


def text_of(script: str, node: ast.AST) -> str:
    """A definition with its decorators."""
    first = min([node, *node.decorator_list], key=lambda n: n.lineno).lineno
    return "\n".join(source_of(f"{script}.py").split("\n")[first - 1:node.end_lineno])


@cache
def definitions(script: str) -> dict[str, ast.AST]:
    """Functions, classes and methods ("Class.method") by name, in order."""
    found = {}
    for node in tree_of(f"{script}.py").body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body
                      if isinstance(part, ast.FunctionDef)}
    return found


def same_now() -> dict[str, list[str]]:
    """The table SAME as the scripts have it."""
    found, versions = {}, {}
    for name in dict.fromkeys(itertools.chain.from_iterable(map(definitions, SCRIPTS))):
        texts = {script: text_of(script, definitions(script)[name])
                 for script in SCRIPTS if name in definitions(script)}
        groups = [group for group in (tuple(SCRIPTS), *NEIGHBOURS)
                  if len({texts.get(script, script) for script in group}) == 1]
        if groups:
            versions[name] = "".join(script[-1] for script in groups[0])
            if versions.get(name.partition(".")[0] if "." in name else None) != versions[name]:
                found.setdefault(versions[name], []).append(name)
    return found


def parameters(script: str, name: str) -> str:
    """Names and defaults of a function's parameters, without their types."""
    arguments = ast.parse(ast.unparse(definitions(script)[name])).body[0].args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def banners(script: str) -> list[str]:
    return re.findall(r"^# -+ \d+ .*$", source_of(f"{script}.py"), re.M)


def diff_size(one: str, other: str) -> tuple[int, int, int]:
    """Hunks, lines of the one and lines of the other that differ."""
    command = ["git", "diff", "--no-index", "--no-ext-diff", "-U0", f"{one}.py", f"{other}.py"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    lines = text.partition("\n@@")[2].split("\n")
    return (text.count("\n@@ -"), sum(line.startswith("-") for line in lines),
            sum(line.startswith("+") for line in lines))


def main() -> None:
    for one, other in NEIGHBOURS:
        hunks, less, more = diff_size(one, other)
        print(f"{one} -> {other}: {hunks} hunks (limit {HUNKS}), {less} and {more} lines "
              f"(limit {LINES})")
        differ = [name for name in definitions(one) if name in definitions(other) and hasattr(
            definitions(one)[name], "args") and parameters(one, name) != parameters(other, name)]
        print(f"    other parameters: {' '.join(differ)}")
    print("SAME = {")
    for versions, names in same_now().items():
        print(f'    "{versions}": """')
        line = "       "
        for name in names:
            if len(line) + len(name) > 95:
                print(line)
                line = "       "
            line += f" {name}"
        print(f'{line}""".split(),')
    print("}")


if __name__ == "__main__":
    main()
