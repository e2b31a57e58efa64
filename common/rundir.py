"""A run directory: its name, its owner, args.json and checkpoint.pt."""

import json
import time
from contextlib import suppress
from pathlib import Path

import torch

from common.files import UserError, explain_write, replace_when_done

try:
    import fcntl
except ImportError:  # Windows: there, two processes may write to one run
    fcntl = None

FORMAT_VERSION = 2  # layout of args.json and checkpoint.pt
PARTS = {"step", "updates", "agent", "optimizers", "spec", "ranks", "episodes", "returns"}
MODES = ("resume", "evaluate", "dream")  # flags of `Args` that name a run directory


def create_run_dir(root: Path | str, env_id: str, exp_name: str, seed: int) -> Path:
    """Make <root>/<env-id>__<exp-name>__<seed>__<time>, never one that is already there."""
    label = f"{env_id}__{exp_name}__{seed}__".replace("/", "_").replace(":", "_")
    with explain_write(root):
        Path(root).mkdir(parents=True, exist_ok=True)
        while True:
            path = Path(root) / (label + time.strftime("%Y%m%d-%H%M%S"))
            with suppress(FileExistsError):
                path.mkdir()
                return path
            time.sleep(0.1)  # another run started in this second


def own_run_dir(run_dir: Path):
    """A file that is locked for as long as this process lives. UserError if another one has it."""
    with explain_write(run_dir / "lock"):
        file = open(run_dir / "lock", "a")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process trains in {run_dir}; stop it first.") from error
        except OSError:  # a file system without locks
            pass
    return file


def save_args(run_dir: Path | str, script: str, args: dict) -> None:
    """Write args.json, without what was asked of this process only."""
    content = {"format": FORMAT_VERSION, "script": script,
               "args": {name: "" if name in MODES else value for name, value in args.items()}}
    with replace_when_done(Path(run_dir) / "args.json") as file:
        file.write(json.dumps(content, indent=2).encode())


def load_args(run_dir: Path | str, script: str) -> dict:
    """The arguments that `script` saved. JSON has no tuples: they come back as lists."""
    path, found = read_json(run_dir)
    check_header(path, found, script, {"args"})
    if not isinstance(found["args"], dict):
        raise UserError(f"{path} is not a file that this project wrote; check the directory")
    return found["args"]


def script_of(run_dir: Path | str) -> str:
    """The script that made a run directory, such as dreamer_v3."""
    path, found = read_json(run_dir)
    script = found.get("script") if isinstance(found, dict) else None
    check_header(path, found, script, {"args"})
    if not (isinstance(script, str) and script.isidentifier()):
        raise UserError(f"{path} names the script {script!r}, which cannot be; restore the file")
    return script


def read_json(run_dir: Path | str) -> tuple[Path, object]:
    """args.json of a run directory: its path and what it holds."""
    path = Path(run_dir) / "args.json"
    try:
        return path, json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{run_dir} is not a run directory (args.json: {error.strerror}); "
                        "give one under runs/") from error
    except ValueError as error:
        raise UserError(f"{path} is empty or not JSON; restore it or start a new run") from error


def save_checkpoint(path: Path | str, state: dict, script: str) -> None:
    """Write tensors and plain data; a crash or a full disk leaves the previous checkpoint whole."""
    with replace_when_done(Path(path)) as file:
        torch.save({**state, "format": FORMAT_VERSION, "script": script}, file)
        file.flush()
        # Find out now, not on the day of the resume, that load_checkpoint would refuse something.
        if refused := torch.serialization.get_unsafe_globals_in_checkpoint(file.name):
            raise TypeError(f"a checkpoint takes tensors and plain data only, not {refused}")


def load_checkpoint(path: Path | str, script: str) -> dict:
    """Read a checkpoint of `script` to the CPU. weights_only: it cannot run code."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (torch.OutOfMemoryError, MemoryError):  # says nothing about the file
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}; was the run stopped before "
                        "its first checkpoint?") from error
    except Exception as error:  # pickle and zip raise nearly everything
        raise UserError(f"{path} is cut short, damaged or no checkpoint of this project; "
                        "restore a copy of it or start a new run") from error
    check_header(Path(path), found, script, PARTS)
    return found


def check_header(path: Path, found: object, script: str, parts: set[str]) -> None:
    """Raise UserError unless `script`, in this version, wrote what `path` holds."""
    layout = found.get("format") if isinstance(found, dict) else None
    if not isinstance(layout, int) or "script" not in found:
        raise UserError(f"{path} is not a file that this project wrote; check the directory")
    if layout != FORMAT_VERSION:
        age = "an older" if layout < FORMAT_VERSION else "a newer"
        raise UserError(f"{path} was written by {age} layout {layout}, this is {FORMAT_VERSION}; "
                        "use the version of the code that wrote it, or start a new run")
    if found["script"] != script:
        raise UserError(f"{path} was written by {found['script']}, this is {script}; "
                        f"use python {found['script']}.py")
    if missing := parts - found.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; restore it from a copy")
