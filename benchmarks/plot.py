"""Learning curves as PNG, on top of the authors' published ones where the task is the same.

    pip install matplotlib
    python benchmarks/plot.py run RUN_DIR OUT_FOLDER --title Boxing --task boxing
    python benchmarks/plot.py results laptop benchmarks/results/laptop.png
    python benchmarks/plot.py results boxing OUT.png --also FOLDER/curve.json

`run` draws one run directory (and keeps its curve as JSON), `results` what learning.py has kept of a set of
tasks: mean over the seeds, and from the least to the greatest of them; or each episode of a single one.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from learning import COMMANDS, SETS
from speed import HERE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve = list[tuple[float, float]]  # of (frames, return of an episode)
# The authors' learning curves of DreamerV3 (2023), read from what danijar/dreamerv3 published.
PUBLISHED = HERE / "results/published/dreamerv3_2023.csv"
SAME_TASK = {  # in learning.py -> there
    "boxing": "boxing", "atari100k_boxing": "boxing", "atari100k_mspacman": "ms_pacman",
    "atari100k_pong": "pong", "control_walker": "walker_walk", "control_swingup": "cartpole_swingup",
}
PALE = "0.75"  # theirs
FEW = 10  # episodes of a run, of which each is drawn as a point
COLOURS = {"dreamer_v1": "tab:green", "dreamer_v2": "tab:orange", "dreamer_v3": "tab:blue"}


def published_curves(task: str | None) -> list[Curve]:
    """Frames and returns of every seed of a task."""
    seeds = defaultdict(list)
    with open(PUBLISHED) as file:
        for row in csv.DictReader(file):
            if row["task"] == task:
                seeds[row["seed"]].append((float(row["env_frames"]), float(row["episode_return"])))
    return list(seeds.values())


def draw_published(axes: plt.Axes, task: str | None) -> None:
    """Each seed as a grey line."""
    for number, curve in enumerate(published_curves(task)):
        axes.plot(*zip(*curve), color=PALE, linewidth=1,
                  label="published, each seed" * (number == 0) or None)


def kept_curve(path: Path) -> Curve:
    """Frames and returns of a run of learning.py."""
    with open(path) as file:
        return [(int(row["frames"]), float(row["return"])) for row in csv.DictReader(file)]


def mean_and_range(curves: list[Curve], points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Frames (points,) and returns (seeds, points): the mean of what fell between two points."""
    edges = np.linspace(0, min(curve[-1][0] for curve in curves), points + 1)
    returns = np.empty((len(curves), points))
    for row, curve in zip(returns, curves):
        frames, values = np.array(curve).T
        ends = np.searchsorted(frames, edges, side="right")
        last = values[0]
        for i, (low, high) in enumerate(zip(ends, ends[1:])):
            row[i] = last = values[low:high].mean() if high > low else last
    return edges[1:], returns


def results(name: str, out: Path, /, also: tuple[Path, ...] = ()) -> None:
    """Draw what learning.py has kept of a set of tasks, and in each of them what `run` has kept."""
    tasks = [task for task in SETS[name] if [*HERE.glob(f"results/learning_*_{task}_?.csv")]]
    figure, grid = plt.subplots(1, len(tasks), figsize=(max(5, 3 * len(tasks)), 2.6), squeeze=False)
    for axes, task in zip(grid[0], tasks):
        draw_published(axes, SAME_TASK.get(task))
        for script in COMMANDS:
            paths = sorted(HERE.glob(f"results/learning_{script}_{task}_?.csv"))
            curves = [kept_curve(path) for path in paths]
            if len(curves) == 1 or any(len(curve) < FEW for curve in curves):
                for path, curve, line in zip(paths, curves, ("o-", "s--", "^:") * len(paths)):
                    axes.plot(*zip(*curve), line, markersize=3, color=COLOURS[script],
                              label=f"{script}, seed {path.stem[-1]}")
            elif curves:
                frames, returns = mean_and_range(curves)
                axes.plot(frames, returns.mean(0), color=COLOURS[script],
                          label=f"{script}, {len(paths)} seeds")
                axes.fill_between(frames, returns.min(0), returns.max(0), color=COLOURS[script],
                                  alpha=0.2, linewidth=0)
        for path, colour in zip(also, ("tab:red", "tab:purple") * len(also)):
            kept = json.loads(path.read_text())
            axes.plot(*zip(*kept["frames_and_returns"]), "o-", markersize=3, color=colour,
                      label=f"seed {kept['args']['seed']}, in {path.parent.name}/", zorder=1)
        axes.set(title=task.replace("_", " "), xlabel="frames")
        axes.xaxis.set_major_locator(plt.MaxNLocator(5))
        own = [line.get_xdata()[-1] for line in axes.lines if line.get_color() != PALE]
        if task in SAME_TASK:
            axes.set_xlim(0, 2 * max(own))
        axes.legend(fontsize=6)
    grid[0][0].set_ylabel("return while training")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def run(run_dir: Path, out: Path, /, title: str = "", task: str | None = None) -> None:
    """Draw one run directory, on the published curves of `task`; write curve.json, curve.png."""
    settings = json.loads((run_dir / "args.json").read_text())["args"]
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    points = [(event.step * settings["action_repeat"], event.value)
              for event in events.Scalars("charts/episodic_return")]
    out.mkdir(parents=True, exist_ok=True)
    (out / "curve.json").write_text(json.dumps(
        {"frames_and_returns": points,
         "args": {name: value for name, value in settings.items() if name != "runs_dir"}},
        indent=1) + "\n")
    axes = plt.figure(figsize=(6, 3.5)).add_subplot()
    draw_published(axes, task)
    axes.plot(*zip(*points), "o-", color="tab:blue", markersize=3, label="this run")
    axes.set(title=title, xlabel="frames", ylabel="return of a training episode",
             xlim=(0, 3 * points[-1][0]))
    axes.legend()
    axes.figure.tight_layout()
    axes.figure.savefig(out / "curve.png", dpi=110)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "results": results}, description=__doc__)
