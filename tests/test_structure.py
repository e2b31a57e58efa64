"""What the design promises about the text of the scripts: layout, length, flags, no dead code."""

import ast
import builtins
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, SCRIPTS

from common.cli import MODES

SECTIONS = ["imports", "Args", "replay buffer", "maths and distributions", "encoder, decoder, heads", "RSSM",
            "actor and critic", "losses", "agent", "evaluation and dreaming", "main loop"]

# Functions and classes that are byte-identical in every script that has them.
IDENTICAL = [
    "Feeder", "draw_noise", "Optimizer", "average_over_ranks", "gather_ranks", "load_agent", "play",
    "evaluation_envs", "evaluate", "dream", "use_bf16", "updates_due", "random_action", "train", "run_loop",
    "open_run", "open_replay", "greet", "save", "restore", "main", "State", "MLP", "ContinueHead",
]


@cache
def source_of(name: str) -> str:
    return (ROOT / name).read_text()


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(source_of(name))


def file_of(script: str) -> str:
    return f"{script}.py"


COMMON = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("common/*.py"))
SHIPPED = [*map(file_of, SCRIPTS), *COMMON]


def functions_of(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.FunctionDef)]


def args_class(script: str) -> ast.ClassDef:
    return next(n for n in tree_of(file_of(script)).body if isinstance(n, ast.ClassDef) and n.name == "Args")


def args_fields(script: str) -> list[str]:
    return [n.target.id for n in args_class(script).body if isinstance(n, ast.AnnAssign)]


def flag_texts(script: str) -> dict[str, str]:
    """What the comment on a field's line says of it; `--help` shows it."""
    lines = (ROOT / file_of(script)).read_text().splitlines()
    return {n.target.id: lines[n.end_lineno - 1][n.end_col_offset:].removeprefix("  # ")
            for n in args_class(script).body if isinstance(n, ast.AnnAssign)}


def flag_of(field: str) -> str:
    return "--" + field.strip("_").replace("_", "-")


# ---- Importing -----------------------------------------------------------------------------------

PROBE = """
import random, sys
import numpy, torch, gymnasium, cv2
before = random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()
settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
__import__(sys.argv[1])
assert before == (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
assert settings == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
others = {name for name in sys.modules if name.startswith("dreamer_v")}
assert others == {sys.argv[1]}, others
assert not torch.distributed.is_initialized()
"""


def test_importing_does_nothing_and_needs_only_common(script, tmp_path):
    shutil.copy(ROOT / file_of(script), tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(tmp_path.rglob("*"))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error::SyntaxWarning"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", PROBE, script], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_only_definitions_at_the_top_level(script):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    docstring, *body, last = tree_of(file_of(script)).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, allowed) for node in body)
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"


def test_no_script_imports_another(script):
    for node in ast.walk(tree_of(file_of(script))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) else [])
        assert not [name for name in names if name.startswith(("dreamer_v", "tests"))]


# ---- Layout --------------------------------------------------------------------------------------

def test_sections(script):
    banners = re.findall(r"^# -+ \d+ .*$", source_of(file_of(script)), re.M)
    titles = [re.fullmatch(r"# -+ (\d+) (.*)", banner).groups() for banner in banners]
    assert titles == [(str(number), title) for number, title in enumerate(SECTIONS, 1)]
    assert not [banner for banner in banners if len(banner) != 100]


@pytest.mark.parametrize("part", [r"arXiv \d{4}\.\d{5}v\d", "--resume", "--evaluate", "--dream", "Symbols",
                                  "Dimension key", "Time alignment", "Deviation"])
def test_docstring_has_its_parts(script, part):
    """Section 0."""
    assert re.search(part, ast.get_docstring(tree_of(file_of(script))))


def test_change_tags(script):
    """Every [V3-1] that the docstring announces stands in the code, and no other of this version."""
    docstring = ast.get_docstring(tree_of(file_of(script)))
    code, version = source_of(file_of(script)).partition('"""\n\n')[2], script[-1]
    tag = re.compile(rf"\[V{version}-\d+\]")
    announced = tag.findall(docstring.partition("Symbols")[0])
    assert announced == [f"[V{version}-{number}]" for number in range(1, len(announced) + 1)]
    assert set(announced) == set(tag.findall(code))


@pytest.mark.parametrize("name", SHIPPED)
def test_lines(name):
    lines = source_of(name).split("\n")
    long = {number: len(line) for number, line in enumerate(lines, 1) if len(line) > 100}
    untidy = [n for n, line in enumerate(lines, 1) if line != line.rstrip() or "\t" in line]
    assert not long and not untidy, f"over 100 columns {long}, white space at the end {untidy}"
    assert lines[-1] == "" and lines[-2] != "" and "\n\n\n\n" not in source_of(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_functions_are_short(name):
    lengths = {f"{f.name}, line {f.lineno}": f.end_lineno - f.lineno + 1 for f in functions_of(name)}
    if not lengths:
        return
    limit = {"main": 120, "run_loop": 120}
    assert not {n: x for n, x in lengths.items() if x > limit.get(n.partition(",")[0], 60)}
    assert statistics.median(lengths.values()) < 20


def nesting(node: ast.AST) -> int:
    """Depth of blocks below `node`; an elif is no deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        is_block = isinstance(child, (ast.For, ast.While, ast.If, ast.With, ast.Try)) and not is_elif
        deepest = max(deepest, is_block + nesting(child))
    return deepest


@pytest.mark.parametrize("name", SHIPPED)
def test_nesting(name):
    limit = 4 if name.startswith("common/") else 3
    assert not {f.name: nesting(f) for f in functions_of(name) if nesting(f) > limit}


@pytest.mark.parametrize("name", SHIPPED)
def test_documented(name):
    """Whatever has a public name in a script; in common/, each module."""
    tree = tree_of(name)
    assert ast.get_docstring(tree)
    nodes = [*tree.body, *itertools.chain(*(c.body for c in tree.body if isinstance(c, ast.ClassDef)))]
    bare = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node)
            and not any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)]
    assert not bare or name.startswith("common/"), bare


# ---- Flags ---------------------------------------------------------------------------------------

def test_every_flag_is_documented(script):
    assert not [name for name, text in flag_texts(script).items() if len(text.split()) < 2]
    fields = [n for n in args_class(script).body if isinstance(n, ast.AnnAssign)]
    assert all(n.value is not None for n in fields), "a flag has no default"


def test_every_flag_does_something(script):
    """Read as `args.x` outside of Args, or within a property of Args that is read there."""
    def read(root, owner):
        return {node.attr for node in ast.walk(root) if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load) and ast.unparse(node.value).split(".")[-1] == owner}

    own = args_class(script)
    rest = ast.Module([node for node in tree_of(file_of(script)).body if node is not own], [])
    used = read(rest, "args") | set(MODES)
    properties = {node.name: read(node, "self") for node in own.body if isinstance(node, ast.FunctionDef)
                  and any(ast.unparse(d) == "property" for d in node.decorator_list)}
    assert not properties.keys() - used, "a property of Args that nothing reads"
    for name, inner in properties.items():
        used |= inner
    if "size" in args_fields(script):  # it stands for the other fields
        used.add("size")
    assert not [field for field in args_fields(script) if field not in used], "flags that do nothing"


def test_help_lists_every_flag(script, cli, tmp_path):
    shown = cli(script, "--help", cwd=tmp_path)
    assert shown.code == 0 and shown.err == "", shown
    missing = [flag_of(field) for field in args_fields(script)
               if not re.search(rf"{flag_of(field)}\b(?!-)", shown.out)]
    assert not missing
    words = " ".join(shown.out.replace("\u2502", " ").split())  # the frame, and where lines break
    assert not [text for text in flag_texts(script).values() if text not in words]
    assert not list(tmp_path.iterdir())


def test_flags_of_the_design(script):
    promised = """exp_name seed torch_deterministic cuda track wandb_project_name capture_video env_id
        total_timesteps num_envs size train_ratio batch_size batch_length horizon compile amp resume
        evaluate dream""".split()
    assert not set(promised) - set(args_fields(script))


# ---- Habits --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SHIPPED)
def test_no_unused_imports_or_names(name):
    tree = tree_of(name)
    imported = {(alias.asname or alias.name).partition(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
              and not isinstance(node.ctx, ast.Store)}
    unused_imports = imported - loaded
    assert not unused_imports
    for function in functions_of(name):
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        unused = {x for x in stored - read if not x.startswith("_")}
        shared = {x for n in ast.walk(function) if isinstance(n, (ast.Nonlocal, ast.Global)) for x in n.names}
        assert not unused - shared, f"{function.name}, line {function.lineno}"


def test_nothing_in_a_script_is_dead(script):
    """Every function, class, method and constant is mentioned somewhere else in the script."""
    tree = tree_of(file_of(script))
    words = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    words += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    defined = {f.name for f in functions_of(file_of(script))}
    defined |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    defined |= {n.id for a in tree.body if isinstance(a, ast.Assign) for t in a.targets for n in ast.walk(t)
                if isinstance(n, ast.Name)}
    dead = {name for name in defined if name not in words and not re.fullmatch(r"__\w+__|forward", name)}
    assert not dead


@pytest.mark.parametrize("name", SHIPPED)
def test_no_globals(name):
    """Functions read module-level constants in capitals only, and change none."""
    tree = tree_of(name)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    variables = {n.id for a in tree.body if isinstance(a, (ast.Assign, ast.AnnAssign))
                 for n in ast.walk(a) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not [x for x in variables if not x.isupper() and x != "ale_py"]
    assert not [x for x in variables if x in dir(builtins)]


@pytest.mark.parametrize("name", map(file_of, SCRIPTS))
def test_no_dispatch_by_name(name):
    """No getattr, eval or registry where the algorithm is."""
    inside = [node for node in tree_of(name).body if isinstance(node, ast.ClassDef) and node.name != "Args"
              and any("nn." in ast.unparse(base) for base in node.bases)]
    networks = re.compile(r"\b(model|agent|actor|critic|world_model|rssm|encoder|decoder|nn|torch|F)\b")
    calls = [(node, ast.unparse(node.func), holder) for holder in [tree_of(name), *inside]
             for node in ast.walk(holder) if isinstance(node, ast.Call)]
    assert not [ast.unparse(node) for node, function, _ in calls if function in ("eval", "exec", "globals")]
    assert not [ast.unparse(node) for node, function, holder in calls if function in ("getattr", "setattr")
                and (holder is not tree_of(name) or networks.search(ast.unparse(node.args[0])))]


@pytest.mark.parametrize("name", COMMON)
def test_common_knows_no_algorithm(name):
    source = source_of(name)
    code = ast.unparse(tree_of(name))
    assert not re.search(r"\bnn\.|torch\.nn|torch\.optim|\bAdam|\.backward\(|autograd|distributions|ReplayBuffer",
                         re.sub(r'""".*?"""', "", code, flags=re.S))
    declared = source_of(file_of(SCRIPTS[-1])).partition("class Args")[2].partition("# Replay")[2]
    hyper = set(re.findall(r"^    (\w+): [\w| ]+ = ", declared.partition("def ")[0], re.M))
    hyper |= {"stoch", "deter", "bins", "units", "gamma", "beta_dyn", "kl_scale", "rssm"}
    assert len(hyper) > 20
    tree = ast.parse(source)
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    words |= {n.arg for n in ast.walk(tree) if isinstance(n, (ast.arg, ast.keyword))}
    words |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not words & hyper
    assert not re.search(r"^(from|import) (dreamer|tests)", source, re.M)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_machine_in_the_text(name):
    assert not re.search(r"/(work|home|root|opt|tmp|mnt|Users|data)/|[A-Z]:\\\\|localhost|10\.\d+\.\d+\.\d+",
                         source_of(name))
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|breakpoint\(|pdb", source_of(name))


def test_common_is_small():
    """About 400 lines of code in all: what grows beyond belongs elsewhere."""
    code = [line for name in COMMON for line in source_of(name).split("\n")
            if line.strip() and not line.strip().startswith("#")]
    assert len(code) < 1200


# ---- The three together --------------------------------------------------------------------------

@cache
def segments(script: str) -> dict[str, str]:
    lines = source_of(file_of(script)).split("\n")
    return {node.name: "\n".join(lines[min([node, *node.decorator_list], key=lambda n: n.lineno).lineno - 1:
                                       node.end_lineno])
            for node in tree_of(file_of(script)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name", IDENTICAL)
def test_identical_in_all_scripts(name):
    versions = {script: segments(script)[name] for script in SCRIPTS if name in segments(script)}
    assert versions, "no script has it; take it from the list"
    assert len(set(versions.values())) == 1, f"differs between {list(versions)}"


def test_same_order_in_all_scripts():
    """What two scripts share stands in the same order, so that a diff of them is short."""
    for one, other in itertools.combinations(SCRIPTS, 2):
        first, second = list(segments(one)), list(segments(other))
        assert [x for x in first if x in second] == [x for x in second if x in first]
