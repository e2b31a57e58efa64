"""tests/changes.md: every tag and every deviation has a row, and all that a row names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = {  # script: its rows of six cells
    section.split(",")[0]: [line.strip("| ").split(" | ") for line in section.splitlines()
                            if re.match(r"\| (\[|D\d)", line)]
    for section in (ROOT / "tests" / "changes.md").read_text().split("\n## ")[1:]}


@cache
def definitions(path: Path) -> dict[str, str]:
    """Functions, classes, constants, and methods as `Class.method` -> their lines."""
    lines, found = path.read_text().splitlines(), {}

    def visit(nodes, prefix=""):
        for node in nodes:
            for part in [node, *getattr(node, "targets", [])]:
                found[prefix + getattr(part, "name", getattr(part, "id", ""))] = "\n".join(
                    lines[node.lineno - 1:node.end_lineno])
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(ast.parse("\n".join(lines)).body)
    return found


@pytest.mark.parametrize("script", sorted({path.name for path in ROOT.glob("dreamer_*.py")}))
def test_every_tag_and_deviation_has_a_row(script):
    docstring, code = (ROOT / script).read_text().split('"""\n\n', 1)
    rows, known = TABLES[script], {row[0] for table in TABLES.values() for row in table}
    assert not set(re.findall(r"\[(?:V\d|R)-\d+\]", docstring + code)) - known
    for tag, _, _, ours, _, _ in rows:  # something that the row names holds the tag
        lines = [definitions(ROOT / script).get(name, "") for name in re.findall("`(.+?)`", ours)]
        assert tag[0] == "D" or tag in docstring, tag
        assert tag not in code or any(tag in x for x in lines), f"{tag} is in none of {ours}"
    points = re.findall(r"^    \* ", docstring.partition("\nDeviation")[2], re.M)
    assert list(dict.fromkeys(row[0] for row in rows if row[0][0] == "D")) == [
        f"D{number + 1}" for number in range(len(points))]


@pytest.mark.parametrize("script", [name for name in TABLES if (ROOT / name).exists()])
def test_what_a_row_names_exists(script):
    for tag, _, _, ours, authors, proof in TABLES[script]:
        for name in re.findall("`(.+?)`", ours):
            file, _, item = name.rpartition(":")
            assert item in definitions(ROOT / (file or script)), f"{tag} names {name}"
        link = r"\[\S+ (\d+)\]\(https://github\.com/danijar/\w+/blob/[0-9a-f]{40}/\S+?#L\1\)"
        assert re.sub(link, "", authors).strip(", ") in ("", "none"), f"{tag}: {authors}"
        for name in re.findall("`(.+?)`", proof):
            file, _, test = name.partition("::")
            assert (ROOT / "tests" / file).exists(), f"{tag} names {name}"
            assert not test or f"def {test}(" in (ROOT / "tests" / file).read_text(), name
