"""What the design promises about the text of the scripts. Style is ruff's business (.ci/run)."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

from tests import sameness
from tests.sameness import definitions, source_of, tree_of

SECTIONS = ["imports", "Args", "replay buffer", "maths and distributions",
            "encoder, decoder, heads", "RSSM", "actor and critic", "losses", "agent", "dreaming",
            "main loop"]
MODES = {"resume", "evaluate", "dream"}  # flags that name a run directory
COMMON = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("common/*.py"))
SHIPPED = [*(f"{script}.py" for script in SCRIPTS), *COMMON]


def functions_of(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.FunctionDef)]


def docstring_of(script: str) -> str:
    return ast.get_docstring(tree_of(f"{script}.py"))


RUN_ARGS = next(node for node in tree_of("common/cli.py").body
                if isinstance(node, ast.ClassDef) and node.name == "RunArgs")


def declared(name: str, node: ast.ClassDef) -> dict[str, str]:
    lines = source_of(name).splitlines()
    return {n.target.id: lines[n.end_lineno - 1][n.end_col_offset:].removeprefix("  # ")
            for n in node.body if isinstance(n, ast.AnnAssign)}


def settings_of(script: str) -> ast.ClassDef:
    """The class that declares the settings of the algorithm."""
    return definitions(script).get("Settings") or definitions(script)["Args"]


def fields_of(script: str) -> dict[str, str]:
    """The fields of `Args`, with what the comment on each one's line says of it."""
    return declared(f"{script}.py", settings_of(script)) | declared("common/cli.py", RUN_ARGS)


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


# ---- Importing -----------------------------------------------------------------------------------

PROBE = """
import os, random, sys
import numpy, torch, gymnasium, cv2

def states():
    return (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())

for script in sys.argv[1:]:
    if os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, script
        continue
    before = states()
    __import__(script)
    assert before == states()
    assert [name for name in sys.modules if name.startswith("dreamer_v")] == [script]
    assert not torch.distributed.is_initialized()
    break
"""


def test_importing_does_nothing_and_needs_only_common(tmp_path):
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=ignored)
    before = sorted(tmp_path.rglob("*"))
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1",
                                "PYTHONWARNINGS": "error::SyntaxWarning"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", PROBE, *SCRIPTS], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_only_definitions_at_the_top_level(script):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    docstring, *body, last = tree_of(f"{script}.py").body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, allowed) for node in body)
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_imports_a_script_or_a_test(name):
    for node in ast.walk(tree_of(name)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) else [])
        assert not [module for module in names if module.startswith(("dreamer_v", "tests"))]


# ---- Layout --------------------------------------------------------------------------------------

def test_sections(script):
    banners = sameness.banners(script)
    titles = [re.fullmatch(r"# -+ (\d+) (.*)", banner).groups() for banner in banners]
    assert titles == [(str(number), title) for number, title in enumerate(SECTIONS, 1)]
    assert {len(banner) for banner in banners} == {100}


def test_change_tags(script):
    """[V3-1] is announced in the docstring of V3 and stands in its code, and so for every number.

    Tags of an older version may stand in a newer file; they must be announced in the older one.
    """
    code, version = source_of(f"{script}.py").partition('"""\n\n')[2], int(script[-1])
    announced = re.findall(rf"^    \[V{version}-(\d+)\] ", docstring_of(script), re.M)
    assert sorted(map(int, announced)) == list(range(1, len(announced) + 1))
    assert set(announced) == set(re.findall(rf"\[V{version}-(\d+)\]", code))
    for older, number in set(re.findall(r"\[V(\d)-(\d+)\]", code)):
        assert int(older) <= version, f"[V{older}-{number}] has not happened yet"
        assert f"[V{older}-{number}]" in docstring_of(f"dreamer_v{older}")


@pytest.mark.parametrize("name", SHIPPED)
def test_functions_are_short(name):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions_of(name)}
    assert not {n: x for n, x in lengths.items() if x > {"train": 120}.get(n, 60)}
    assert statistics.median([0, *lengths.values()]) < 20


def test_nothing_in_a_script_is_dead(script):
    """Every function, class, method and constant is mentioned somewhere else in the script."""
    tree = tree_of(f"{script}.py")
    words = {n.id for n in ast.walk(tree) if isinstance(getattr(n, "ctx", None), ast.Load)
             and isinstance(n, ast.Name)}
    for name in (f"{script}.py", *COMMON):
        words |= {n.attr for n in ast.walk(tree_of(name)) if isinstance(n, ast.Attribute)}
    defined = {name.rpartition(".")[2] for name in definitions(script)}
    defined |= {n.id for a in tree.body if isinstance(a, ast.Assign) for n in a.targets}
    called_by_torch = {"forward", "reset_parameters"}
    assert not {name for name in defined - words - called_by_torch if not name.startswith("__")}


# ---- Flags ---------------------------------------------------------------------------------------

PROMISED = """exp_name seed torch_deterministic cuda track wandb_project_name wandb_entity
    capture_video env_id total_timesteps num_envs size train_ratio batch_size batch_length
    imag_horizon compile amp resume evaluate dream""".split()


def test_every_flag_is_documented(script):
    assert not set(PROMISED) - fields_of(script).keys()
    assert not [name for name, text in fields_of(script).items() if len(text.split()) < 2]
    fields = [n for node in (settings_of(script), RUN_ARGS) for n in node.body
              if isinstance(n, ast.AnnAssign)]
    assert all(n.value is not None for n in fields), "a flag has no default"


def reads(root: ast.AST, owner: str) -> set[str]:
    """x wherever `owner.x` or `something.owner.x` is read."""
    return {node.attr for node in ast.walk(root) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load) and ast.unparse(node.value).split(".")[-1] == owner}


def test_every_flag_does_something(script):
    """Read as `args.x` outside of Args, or within a property of Args that is read there."""
    own = definitions(script)["Args"]
    rest = ast.Module([node for node in tree_of(f"{script}.py").body if node is not own], [])
    used = reads(rest, "args").union(*(reads(tree_of(name), "args") for name in COMMON), MODES)
    properties = {node.name: reads(node, "self") for node in own.body
                  if "property" in map(ast.unparse, getattr(node, "decorator_list", []))}
    assert not properties.keys() - used, "a property of Args that nothing reads"
    used = used.union(*properties.values(), {"size"})  # which stands for the other fields
    assert not fields_of(script).keys() - used, "flags that do nothing"


def test_help_lists_every_flag(script, cli, tmp_path):
    shown = cli(script, "--help", cwd=tmp_path)
    assert shown.code == 0 and shown.err == "", shown
    fields = fields_of(script)
    assert not [name for name in fields if not re.search(rf"{flag_of(name)}\b(?!-)", shown.out)]
    words = " ".join(shown.out.replace("\u2502", " ").split())  # the frame, and where lines break
    assert not [text for text in fields.values() if text not in words]
    assert not list(tmp_path.iterdir())


# ---- What is whose business ----------------------------------------------------------------------

KNOWN_TO_COMMON = set("""env_id total_timesteps size num_envs action_repeat pixels image_size
    grayscale sticky buffer_size batch_size batch_length depth
    warmup""".split())  # `warmup` and `depth` of something else


@pytest.mark.parametrize("name", COMMON)
def test_common_knows_no_algorithm(name):
    """Neither its tools nor its hyper-parameters."""
    code = re.sub(r'""".*?"""', "", ast.unparse(tree_of(name)), flags=re.S)
    assert not re.search(r"\bnn\.|torch\.nn|torch\.optim|\bAdam|\.backward\(|autograd|distributions"
                         "|ReplayBuffer", code)
    hyper = {"rssm", "kl"}.union(*(declared(f"{script}.py", settings_of(script))
                                   for script in SCRIPTS)) - KNOWN_TO_COMMON
    assert len(hyper) > 50
    tree = tree_of(name)
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    words |= {n.arg for n in ast.walk(tree) if isinstance(n, (ast.arg, ast.keyword))}
    words |= {str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert not words & hyper


# ---- The three together --------------------------------------------------------------------------

@pytest.mark.parametrize("pair", sameness.NEIGHBOURS, ids=" ".join)
def test_a_diff_of_two_scripts_is_short(pair):
    hunks, less, more = sameness.diff_size(*pair)
    _, most, lines = sameness.LIMITS[pair[1]]
    assert hunks <= most and max(less, more) <= lines, (
        f"{hunks} hunks (limit {most}), {less} and {more} lines (limit {lines})")


def test_what_was_byte_identical_still_is():
    """If the change is right, or if more is the same now: `python -m tests.sameness --write`."""
    now, table = sameness.same_now(), sameness.SAME
    for versions in now.keys() | table.keys():
        lost, new = set(table.get(versions, [])), set(now.get(versions, []))
        assert lost == new, f"V{versions}: no longer the same: {lost - new}; new: {new - lost}"


@pytest.mark.parametrize("pair", sameness.NEIGHBOURS, ids=" ".join)
def test_same_banners_and_same_order(pair):
    assert sameness.banners(pair[0]) == sameness.banners(pair[1])
    first, second = ([name for name in definitions(script)
                      if name.partition(".")[0] not in sameness.OTHER_PLACE] for script in pair)
    assert [name for name in first if name in second] == [name for name in second if name in first]


@pytest.mark.parametrize("pair", sameness.NEIGHBOURS, ids=" ".join)
def test_same_name_same_parameters(pair):
    assert set(sameness.other_parameters(*pair)) <= sameness.OTHER_PARAMETERS.keys()


def test_the_exceptions_are_still_needed():
    differ = set().union(*(sameness.other_parameters(*pair) for pair in sameness.NEIGHBOURS))
    assert sameness.OTHER_PARAMETERS.keys() == differ
