"""What is the same in the scripts, so that a diff of two of them is the paper's list of changes.

    python -m tests.sameness            how it stands: the size of the diffs, and the table SAME
    python -m tests.sameness --write    and put that table into this file

test_structure.py holds the scripts to it.
"""

import ast
import itertools
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("dreamer_v*.py"))
NEIGHBOURS = list(itertools.pairwise(SCRIPTS))
ROWS = sorted((SCRIPTS[i:j] for i in range(len(SCRIPTS)) for j in range(i + 2, len(SCRIPTS) + 1)),
              key=len, reverse=True)  # two or more in a row; the 2025 revision is number 5 here
# Of `git diff --no-index` to a script: lines of context, and at most so many hunks and changed lines
# of each of the two. The revision changes more than a version does, so its hunks are larger ones.
LIMITS = dict.fromkeys(SCRIPTS[:3], (3, 70, 400)) | {"dreamer_v3_2025": (3, 75, 500)}

# Versions -> what is byte-identical in them. Of a class that differs: its methods that do not.
SAME = {
    "12": """
        Args.env_config Normal OneHot.__init__ Bernoulli Dense SplitDense
        Encoder.forward PixelToGrid RSSM.initial_state RSSM.project_action RSSM.img_step
        WorldModel.reward WorldModel.discount Critic.forward Optimizer.state_dict
        Optimizer.load_state_dict decode updates_due""".split(),
    "123": """
        Batch ReplayBuffer init_output Linear Decoder.image RSSM.obs_step RSSM.observe
        Optimizer.grads Agent.act Agent.zero_state Agent.optimizers random_actions
        open_loop first_update""".split(),
    "1235": """
        Args.capacity to_batch previous_actions draw_classes draw_noise
        Gaussian.__init__ Gaussian.noise Gaussian.sample Gaussian.mode Gaussian.entropy
        OneHot.sample OneHot.mode Bernoulli.__init__ Bernoulli.mean Bernoulli.log_prob
        Dense.forward SplitDense.__init__ SplitDense.project SplitDense.forward MLP Head
        centre Decoder.vector State RSSM.prior lambda_return Agent.autocast main""".split(),
    "23": """
        Agent.train_step train Norm NormGRUCell.forward""".split(),
    "235": """
        Args.stoch_dim Gaussian Latent.kl Actor.forward OneHot.log_prob OneHot.entropy
        Latent.sample Latent.mode Latent.entropy Latent.detach""".split(),
    "35": """
        OneHot Latent RSSM.latent Actor.policy Critic TwoHot.normaliser
        TwoHot.__getitem__ ChannelNorm ReturnScale""".split(),
}

# Functions of one name whose parameters differ, with the reason.
OTHER_PARAMETERS = {
    "Latent.__init__": "[V2-1] groups, [V3-3] unimix",
    "OneHot.__init__": "[V3-3] unimix",
    "ReplayBuffer.__init__": "[R-15] sizes of the latents",
    "ReplayBuffer.add": "[R-15] the state",
    "Optimizer.__init__": "[R-14] its settings are those of all",
    "Optimizer.grads": "[R-13] one backward pass",
    "Agent.train_step": "[R-15] the batch has the carry",
    "Agent.learn": "[R-15] the batch has the carry",
    "Agent.act": "[R-17] no random actions",
    "actor_loss": "[V2-4] REINFORCE takes the policy, its actions and a baseline, [V3-5] a scale, "
                  "[R-9] has nothing else",
    "critic_loss": "[V3-6] the slow critic regularises",
}

# Classes that stand in another place, with the reason.
OTHER_PLACE = {"Latent": "[V2-1] it was a Gaussian and became a OneHot; it follows its base"}


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
        groups = [group for group in ROWS
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


def other_parameters(one: str, other: str) -> list[str]:
    """Functions of both that do not have the same parameters."""
    return [name for name, node in definitions(one).items() if isinstance(node, ast.FunctionDef)
            and name in definitions(other) and parameters(one, name) != parameters(other, name)]


def banners(script: str) -> list[str]:
    return re.findall(r"^# -+ \d+ .*$", source_of(f"{script}.py"), re.M)


def diff_size(one: str, other: str) -> tuple[int, int, int]:
    """Hunks, lines of the one and lines of the other that differ."""
    command = ["git", "diff", "--no-index", "--no-ext-diff", f"-U{LIMITS[other][0]}", f"{one}.py", f"{other}.py"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    lines = text.partition("\n@@")[2].split("\n")
    return (text.count("\n@@ -"), sum(line.startswith("-") for line in lines),
            sum(line.startswith("+") for line in lines))


def main() -> None:
    for one, other in NEIGHBOURS:
        hunks, less, more = diff_size(one, other)
        _, most, lines = LIMITS[other]
        print(f"{one} -> {other}: {hunks} hunks (limit {most}), {less} and {more} lines "
              f"(limit {lines})")
        print(f"    other parameters: {' '.join(other_parameters(one, other))}")
    lines = []
    for versions, names in sorted(same_now().items()):
        text = textwrap.fill(" ".join(names), 80, break_on_hyphens=False)
        lines.append(f'    "{versions}": """\n' + textwrap.indent(text, " " * 8) + '""".split(),\n')
    table = f"SAME = {{\n{''.join(lines)}}}\n"
    print(table)
    if "--write" in sys.argv:
        path = Path(__file__)
        path.write_text(re.sub(r"^SAME = {.*?}\n", table, path.read_text(), flags=re.M | re.S))


if __name__ == "__main__":
    main()
