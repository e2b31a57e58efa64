"""The benchmarks fit the scripts: their flags, their sizes, and the tables made of results."""

import importlib
import re
import sys

import pytest

from tests.conftest import ROOT, SCRIPTS

sys.path.append(str(ROOT / "benchmarks"))
import learning
import speed
import whole_run


def flags_of(script: str) -> set[str]:
    module = importlib.import_module(script)
    return {name.replace("_", "-") for name in module.Args.__dataclass_fields__}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_has_flags_of_its_script(script):
    commands = [*learning.COMMANDS[script].values(), whole_run.FLAGS + whole_run.OWN_FLAGS[script]]
    for command in commands:
        used = {flag.removeprefix("no-") for flag in re.findall(r"--(\S+)", command)}
        assert used <= flags_of(script)
    assert set(whole_run.OFF[script]) <= flags_of(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_sides_get_all_sizes_of_the_networks(script):
    paper, tiny = speed.Options(script=script), speed.Options(script=script, setting="tiny")
    assert paper.sizes.keys() == tiny.sizes.keys() <= set(importlib.import_module(script).Args.__dataclass_fields__)
    assert {"deter", "hidden", "units", "depth", "stoch"} <= paper.sizes.keys()
    assert tiny.sizes["deter"] == 64 < paper.sizes["deter"]


def test_a_row_of_the_table_has_the_share_of_the_peer_in_the_same_precision():
    sides = {f"{who} {precision}": {"update": [seconds] * 3, "peak_memory": 2e9, "first_update": 9.0}
             for who, precision, seconds in (("sheeprl", "float32", 4.0), ("ours", "float32", 2.0),
                                             ("sheeprl", "bf16", 2.0), ("ours", "bf16", 0.5))}
    options = vars(speed.Options(script="dreamer_v2", peer="sheeprl", threads=2))
    rows = speed.speed_rows({"sides": sides, "options": options})
    assert rows[1] == "| dreamer_v2 | paper | 2 | ours float32 | 2 | 0.50 | 2.0 GB |"
    assert rows[3] == "| dreamer_v2 | paper | 2 | ours bf16 | 0.5 | 0.25 | 2.0 GB |"
    assert rows[0].split("|")[6].strip() == ""


def test_a_row_of_learning_names_seeds_that_the_limit_stopped():
    found = {"1": {"mean": 500.0, "worst": 490.0, "minutes": 3.2, "commit": "a" * 40, "stopped_by_limit": False},
             "2": {"mean": 99.5, "worst": 9.0, "minutes": 8.9, "commit": "a" * 40, "stopped_by_limit": True}}
    assert learning.row("dreamer_v1", "cartpole", found) == (
        f"| dreamer_v1 | cartpole | 1: 500.0, 2: 99.5 (stopped early) | 450 | 9 | 3 to 9 | {'a' * 9} |")
