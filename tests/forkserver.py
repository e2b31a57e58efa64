"""Forks a process per line of stdin that runs a script; see `Runner` in conftest.py."""

import atexit
import json
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  the first optimiser imports it, for seconds
import torch.utils.tensorboard  # noqa: E402
import tyro  # noqa: E402, F401

import common.envs  # noqa: E402
import common.run  # noqa: E402, F401

torch.set_num_threads(1)


def become(request: dict) -> None:
    """Turn the forked process into `python SCRIPT ARGS...`."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY),
                                (1, request["out"], os.O_WRONLY | os.O_CREAT),
                                (2, request["err"], os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(path, flags, 0o600), number)
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    sys.argv = [request["script"], *request["argv"]]


def run() -> None:
    """Run the script and leave as Python does, but without the second that torch's end takes."""
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    # readline, not iteration: the child must not find lines that were read ahead.
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            become(json.loads(line))
            run()
        print(pid, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, flush=True)


main()
