"""A run's training curve as JSON and PNG, on top of published ones if a table of them is given.

    pip install matplotlib
    python benchmarks/plot.py RUN_DIR OUT_FOLDER --title Boxing --published curves.csv --task boxing

The table has the columns task, seed, env_frames, episode_return. `--suite` picks some of its rows
where one task stands in several suites.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def published_curves(path: Path, task: str, suite: str) -> list[list[tuple[float, float]]]:
    """Frames and returns of every seed of a task."""
    seeds = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["task"] == task and suite in ("", row.get("suite")):
                point = float(row["env_frames"]), float(row["episode_return"])
                seeds[row["seed"]].append(point)
    return list(seeds.values())


def main() -> None:
    """Read the events of the run, write OUT_FOLDER/curve.json and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--title", default="")
    parser.add_argument("--published", type=Path)
    parser.add_argument("--task", default="")
    parser.add_argument("--suite", default="")
    options = parser.parse_args()
    settings = json.loads((options.run_dir / "args.json").read_text())["args"]
    events = EventAccumulator(str(options.run_dir), size_guidance={"scalars": 0}).Reload()
    points = [(event.step * settings["action_repeat"], event.value)
              for event in events.Scalars("charts/episodic_return")]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "curve.json").write_text(json.dumps(
        {"frames_and_returns": points,
         "args": {name: value for name, value in settings.items() if name != "runs_dir"}},
        indent=1) + "\n")

    axes = plt.figure(figsize=(6, 3.5)).add_subplot()
    curves = []
    if options.published:
        curves = published_curves(options.published, options.task, options.suite)
    for number, curve in enumerate(curves):
        axes.plot(*zip(*curve), color="0.75", linewidth=1,
                  label="published, each seed" * (number == 0) or None)
    axes.plot(*zip(*points), "o-", color="tab:blue", markersize=3, label="this run")
    axes.set(title=options.title, xlabel="frames", ylabel="return of a training episode",
             xlim=(0, 3 * points[-1][0]))
    axes.legend()
    axes.figure.tight_layout()
    axes.figure.savefig(options.out / "curve.png", dpi=110)


if __name__ == "__main__":
    main()
