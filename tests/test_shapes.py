"""Every trailing shape comment of the scripts is true.

    embed = self.encoder(obs)  # (T, B, E)

The script itself stays as it is. Here it is parsed, a check is put behind each such line, and the
rewritten copy runs small passes in which every dimension has a size of its own. A comment that is
wrong, that no pass reaches, or that uses a letter which the dimension key of the module's docstring
lacks, fails. So does a shape of a parameter in a docstring: "`ret` (H, N)", "embed: (T, B, E)".

Some functions are called with several leading sizes (acting is a replay of T = 1). So a letter
stands for a set of sizes, which depends on what is running and is as small as can be, and within
one call of a function (or one tuple) it stands for one size.
"""

import ast
import io
import itertools
import re
import sys
import tokenize
import types
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS

from common.spaces import EnvSpec
from tests.tiny import has_flag, tiny_args, update

DIM = r"(?:\d+|\d*[A-Z][0-9]?(?: (?:\*|\+) [A-Z0-9]+| or \d*[A-Z])?)"
SHAPE = re.compile(rf"\(((?:\.\.\.|{DIM}),? ?(?:, (?:\.\.\.|{DIM}))*,?)\)")
LETTER = re.compile(r"[A-Z][0-9]?")
DTYPE = re.compile(r"\) (uint8|float32|bool)\b")


# ---- Finding the comments ------------------------------------------------------------------------

@dataclass(frozen=True)
class Note:
    """One shape that the source claims."""

    line: int
    name: str
    spec: str  # without the parentheses
    dtype: str = ""

    def __str__(self):
        return f"line {self.line}: {self.name} ({self.spec})"


def trailing_comments(source: str) -> dict[int, str]:
    """{line: comment} of the comments that share their line with code."""
    return {token.start[0]: token.string
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and token.line[:token.start[1]].strip()}


def notes_of(node: ast.stmt, comments: dict[int, str]) -> list[tuple[ast.expr, Note]]:
    """The assigned expressions of a statement with their notes; [] if it has no shape comment."""
    comment = comments.get(node.end_lineno, "")
    specs = SHAPE.findall(comment)
    if not re.match(r"# \(", comment) or not specs:
        return []
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    specs = specs if len(specs) == len(parts) else [specs[0]] * len(parts)
    dtype = DTYPE.search(comment)
    return [(part, Note(node.lineno, ast.unparse(part), spec, dtype[1] if dtype else ""))
            for part, spec in zip(parts, specs)]


def parameter_notes(node: ast.FunctionDef) -> list[Note]:
    """Shapes that the docstring gives of parameters: "name (T, B)", "name: (T, B)", "`one` and
    `other` (T, B)", "one, other: (T, B) and (B, T)".

    Not "(..., K)": what such a function is given may have other letters where it is called.
    """
    text = " ".join((ast.get_docstring(node) or "").split())
    names = {arg.arg for arg in node.args.args + node.args.kwonlyargs}
    text = text.partition("Returns:")[0] if "Args:" in text else (
        re.split(r"Returns? | -> |; give ", text)[0])
    found = [(match[1], match[2]) for match in re.finditer(rf"`?(\w+)`?:? {SHAPE.pattern}", text)]
    for match in re.finditer(rf"((?:`\w+`(?:, | and )?)+)(?: are|:)? {SHAPE.pattern}", text):
        found += [(name, match[2]) for name in re.findall(r"`(\w+)`", match[1])]
    for match in re.finditer(rf"(\w+), (\w+): {SHAPE.pattern} and {SHAPE.pattern}", text):
        found = [pair for pair in found if pair != (match[2], match[3])]
        found += [(match[1], match[3]), (match[2], match[4])]
    notes = [Note(node.lineno, name, spec) for name, spec in found if name in names]
    return list(dict.fromkeys(note for note in notes if not note.spec.startswith("...")))


class Instrument(ast.NodeTransformer):
    """Puts checks into the module; `notes` are those that it found, `lines` their lines."""

    def __init__(self, comments: dict[int, str]):
        self.comments, self.notes, self.lines = comments, [], set()

    def checks(self, found: list[tuple[ast.expr, Note]]) -> list[ast.stmt]:
        self.notes += [note for _, note in found]
        calls = [f"__check__(__dims__, {self.notes.index(note)}, {ast.unparse(part)})"
                 for part, note in found]
        return [ast.parse(call).body[0] for call in calls]

    def visit_assignment(self, node):
        self.generic_visit(node)
        found = notes_of(node, self.comments)
        self.lines |= {node.end_lineno} if found else set()
        return [node, *self.checks(found)]

    visit_Assign = visit_AugAssign = visit_AnnAssign = visit_assignment

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        start = 1 if ast.get_docstring(node) is not None else 0
        entry = [(ast.Name(note.name, ast.Load()), note) for note in parameter_notes(node)]
        node.body[start:start] = [ast.parse("__dims__ = {}").body[0], *self.checks(entry)]
        return node

    def visit_ClassDef(self, node):
        annotated = [s for s in node.body
                     if isinstance(s, ast.AnnAssign) and notes_of(s, self.comments)]
        self.lines |= {statement.end_lineno for statement in annotated}
        fields_ = {note.name: note for s in annotated for _, note in notes_of(s, self.comments)}
        self.notes += fields_.values()
        node.body = [self.visit(s) if isinstance(s, (ast.FunctionDef, ast.ClassDef)) else s
                     for s in node.body]
        numbers = {name: self.notes.index(note) for name, note in fields_.items()}
        after = [ast.parse(f"__check_fields__({node.name}, {numbers})").body[0]] if numbers else []
        return [node, *after]


# ---- Checking them -------------------------------------------------------------------------------

class Lie(AssertionError):
    """A shape comment is wrong."""


def size_of(expression: str, dims: dict[str, int]) -> int:
    """Value of "T", "2", "S * K" or "3D"."""
    return eval(re.sub(r"(\d)([A-Z])", r"\1 * \2", expression), {}, dims)  # noqa: S307


def possible(spec: str, shape: tuple[int, ...], allowed: dict[str, set[int]],
             bound: dict[str, int]):
    """The first way to give each letter a size so that `shape` is `spec`; None if there is none."""
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if "..." in parts:
        at, known = parts.index("..."), len(parts) - 1
        if len(shape) < known:
            return None
        shape = (*shape[:at], *shape[len(shape) - (known - at):])
        parts.remove("...")
    letters = sorted(set(LETTER.findall(spec)))
    choices = [{bound[x]} if x in bound else allowed.get(x, set()) for x in letters]
    for sizes in itertools.product(*choices):
        dims = dict(zip(letters, sizes))
        if len(shape) == len(parts) and all(
                any(size_of(option, dims) == size for option in part.split(" or "))
                for part, size in zip(parts, shape)):
            return dims
    return None


class Checker:
    """What the rewritten module calls."""

    def __init__(self, source: str, name: str):
        self.comments = trailing_comments(source)
        instrument = Instrument(self.comments)
        tree = ast.fix_missing_locations(instrument.visit(ast.parse(source)))
        self.notes, self.lines = instrument.notes, instrument.lines
        self.allowed, self.seen = {}, []  # seen: (note, shape, allowed)
        self.module = types.ModuleType(f"{name}_with_checks")
        self.module.__dict__.update(__file__=f"{name}.py", __dims__={}, __check__=self.check,
                                    __check_fields__=self.check_fields)
        sys.modules[self.module.__name__] = self.module  # dataclasses look their module up
        exec(compile(tree, f"<{name} with checks>", "exec"), self.module.__dict__)  # noqa: S102

    @contextmanager
    def sizes(self, **dims):
        """What the letters may stand for while something runs: one size, or several."""
        self.allowed = {letter: {size} if isinstance(size, int) else set(size)
                        for letter, size in dims.items()}
        yield
        self.allowed = {}

    def check(self, bound: dict[str, int], number: int, value) -> None:
        note = self.notes[number]
        if value is None or not self.allowed:
            return
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # "batch (T, B, ...)"
            for part in value:
                self.check(bound, number, part)
            return
        shape = tuple(value.shape) if hasattr(value, "shape") else None
        dims = None if shape is None else possible(note.spec, shape, self.allowed, bound)
        if dims is None:
            raise Lie(f"{note}, but it is {shape}; known here: {self.allowed}, {bound}")
        if note.dtype and note.dtype != str(value.dtype).removeprefix("torch."):
            raise Lie(f"{note} {note.dtype}, but it is {value.dtype}")
        bound.update(dims)
        self.seen.append((note, shape, self.allowed))

    def check_fields(self, cls, numbers: dict[str, int]) -> None:
        """Check the fields of a NamedTuple whenever one is made."""
        new, make = cls.__new__, cls._make.__func__

        def checked(row):
            bound = {}
            for name, number in numbers.items():
                self.check(bound, number, getattr(row, name))
            return row

        cls.__new__ = lambda *args, **kwargs: checked(new(*args, **kwargs))
        cls._make = classmethod(lambda klass, values: checked(make(klass, values)))


# ---- Small passes --------------------------------------------------------------------------------

SPECS = {  # (observation, action) of every kind, together; True: as small as the script allows
    "image, discrete": EnvSpec(True, 0, 9, True),
    "vector, continuous": EnvSpec(None, 15, 9, False),
    "image and vector, discrete": EnvSpec(True, 15, 9, True),
}
T, B, H, P, CONTEXT = 7, 6, 24, 8, 3
SIZES = dict(batch_length=T, batch_size=B, imag_horizon=H, num_envs=P, image_size=16, depth=2,
             deter=10, hidden=19, units=13, mlp_units=29, layers=1, mlp_layers=1, stoch=11,
             classes=12, bins=17, blocks=2)


def model_sizes(args, spec: EnvSpec, embed_dim: int) -> dict:
    """What the letters stand for, as far as the script has them; () where the spec has none."""
    stoch = args.stoch * getattr(args, "classes", 1)
    sizes = dict(H=H, H1=H + 1, G=H - 1, A=spec.action_dim, E=embed_dim, D=args.deter,
                 U=(args.units, getattr(args, "hidden", args.units)), Z=stoch, F=args.deter + stoch,
                 V=spec.vector_dim or (), L=getattr(args, "bins", ()), S=args.stoch,
                 K=getattr(args, "classes", ()))
    return sizes | (dict(I=spec.image_shape[0], C=spec.image_shape[2]) if spec.image_shape else {})


def observe_step(module, spec: EnvSpec, step: int):
    rng = np.random.default_rng(step)
    image = rng.integers(0, 256, (P, *spec.image_shape), np.uint8) if spec.image_shape else None
    vector = rng.normal(size=(P, spec.vector_dim)).astype(np.float32) if spec.vector_dim else None
    reward = rng.normal(size=P).astype(np.float32)
    first, terminal = np.full(P, step % 5 == 0), rng.random(P) < 0.2
    return module.EnvStep(image, vector, reward, first, terminal, terminal, np.zeros(P),
                          np.zeros(P, np.int64))


def exercise(checker: Checker, spec: EnvSpec, folder) -> None:
    """Replay, train, act and dream once."""
    module = checker.module
    if spec.image_shape:
        pixels = 16 if has_flag(module, "image_size") else 64
        spec = replace(spec, image_shape=(pixels, pixels, 3))
    sizes = {name: size for name, size in SIZES.items() if has_flag(module, name)}
    args, device = tiny_args(module, spec.discrete, **sizes), torch.device("cpu")
    torch.manual_seed(0)
    agent = module.Agent(args, spec, device)
    model = model_sizes(args, spec, agent.world_model.encoder.embed_dim)
    latents = {}
    if has_flag(module, "replay_context"):
        latents = dict(latents=(args.deter, args.stoch_dim))
    replay = module.ReplayBuffer(folder, spec, 50, P, 0, **latents)
    starts = T - (module.SCRIPT == "dreamer_v1" and args.pcont)  # which leaves the last ones out
    training = dict(T=T, B=B, N=starts * B, P=P, **model)
    carry = agent.zero_state(P)
    for step in range(12):
        obs = observe_step(module, spec, step)
        with checker.sizes(P=P, B=P, T=1, **model):  # acting is a replay of one step
            carry = agent.act(obs, carry, sample=step % 2 == 0)
        with checker.sizes(P=P, **model):
            replay.add(obs, carry.action.numpy(), *([carry] if latents else []))
    with checker.sizes(**training):
        batch = replay.sample(B, T, np.random.default_rng(0))
        for _ in range(2):
            update(module, agent, batch)
        if latents:
            replay.refresh(batch, *agent.train_step(batch)[1:])
    batch.is_first[:] = False  # the video is that of a whole sequence
    with checker.sizes(**training | dict(N=B)):
        module.open_loop(agent, batch, CONTEXT)


@pytest.fixture(scope="module", params=SCRIPTS)
def checked(request, tmp_path_factory) -> Checker:
    """A rewritten script after it ran in all configurations; a comment that lies fails here."""
    checker = Checker((ROOT / f"{request.param}.py").read_text(), request.param)
    for number, spec in enumerate(SPECS.values()):
        exercise(checker, spec, tmp_path_factory.mktemp("replay") / str(number))
    return checker


def dimension_key(module) -> set[str]:
    """The letters of its block in "Symbols": "T  replay time, 64     S, K  latents and classes"."""
    block = module.__doc__.partition("\n    Dimension key\n")[2].partition("\n\n")[0]
    entries = re.findall(r"(?:^|    )([A-Z]\d?(?:, [A-Z])*(?: = [A-Z] . [A-Z])?)  \w", block, re.M)
    return {letter for entry in entries for letter in LETTER.findall(entry)}


# ---- The tests -----------------------------------------------------------------------------------

def test_every_shape_comment_was_checked(checked):
    """They are true, or the fixture would have failed; here: none was left out."""
    assert len(checked.lines) >= 20
    missed = set(checked.notes) - {note for note, _, _ in checked.seen}
    assert not missed, "never executed:\n" + "\n".join(map(str, sorted(missed, key=str)))


def test_no_shape_comment_is_out_of_reach(checked):
    """A shape in a trailing comment stands first in it, on the last line of an assignment."""
    lost = {line: comment for line, comment in checked.comments.items()
            if SHAPE.search(comment) and line not in checked.lines
            and re.search(r"\([^)]*[A-Z]", comment)}
    assert not lost


def test_the_letters_are_those_of_the_dimension_key(checked):
    key = dimension_key(checked.module)
    used = {letter for note in checked.notes for letter in LETTER.findall(note.spec)}
    assert used <= key, f"not in the dimension key: {sorted(used - key)}"
    unknown = {}
    for node in ast.walk(ast.parse((ROOT / f"{checked.module.SCRIPT}.py").read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            specs = SHAPE.findall(ast.get_docstring(node) or "")
            letters = {letter for spec in specs for letter in LETTER.findall(spec)}
            unknown |= {f"{node.name}, line {node.lineno}": letters - key} if letters - key else {}
    assert not unknown, f"shapes in docstrings: {unknown}"


def test_every_letter_of_the_dimension_key_is_used(checked):
    """In a shape, or in the key itself: Z = S * K."""
    source = (ROOT / f"{checked.module.SCRIPT}.py").read_text().partition('"""\n\n')[2]
    used = {x for spec in SHAPE.findall(source) for x in LETTER.findall(spec)}
    used |= set("".join(re.findall(r"[A-Z] = ([A-Z] [*+] [A-Z])  ", checked.module.__doc__)))
    assert dimension_key(checked.module) <= used


def lies_about(note: Note, key: set[str]):
    """Wrong versions of a shape: an axis missing, one too many, two swapped, another letter.

    With the letters that were put in and taken out.
    """
    parts = note.spec.split(", ")
    if "..." in parts:
        return
    yield ", ".join(parts[:-1]) or "2, 2", "", ""
    yield ", ".join([*parts, parts[-1]]), "", ""
    for at in range(len(parts) - 1):
        if parts[at] != parts[at + 1]:
            yield ", ".join([*parts[:at], parts[at + 1], parts[at], *parts[at + 2:]]), "", ""
    for at, letter in itertools.product(range(len(parts)), key):
        if letter not in parts[at]:
            yield ", ".join([*parts[:at], letter, *parts[at + 1:]]), letter, parts[at]


def test_any_wrong_comment_would_have_been_caught(checked):
    """For every comment, against the shapes that were seen, without running it all again.

    Where two letters mean the same, either is right: the video has N = B.
    """
    key, believed = dimension_key(checked.module), []
    for note in checked.notes:
        seen = {(shape, repr(allowed)): (shape, allowed) for other, shape, allowed in checked.seen
                if other == note}.values()
        believed += [f"{note} would pass as ({lie})" for lie, new, old in lies_about(note, key)
                     if all(possible(lie, shape, allowed, {}) for shape, allowed in seen)
                     and not (new and all(a.get(new) == a.get(old) for _, a in seen))]
    assert not believed, "\n".join(believed)


def test_a_lying_comment_in_a_script_fails(script, tmp_path):
    source = (ROOT / f"{script}.py").read_text()
    lying, changed = re.subn(r"(    embed = .*)# \(T, B, E\)", r"\1# (B, T, E)", source)
    assert changed
    with pytest.raises(Lie, match="embed"):
        exercise(Checker(lying, script), SPECS["image, discrete"], tmp_path)
