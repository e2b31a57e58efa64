"""One thread, no noise, and a quick way to run a script as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]
SCRIPTS = sorted(path.stem for path in ROOT.glob("dreamer_v*.py"))

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=DeprecationWarning)


def wait_until(condition, explain=str) -> None:
    """Wait for something that takes a moment; a hang is a failure, on a busy machine too."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


@dataclass
class Finished:
    """What a process left behind."""

    code: int  # exit status; negative: the signal that ended it
    out: str
    err: str

    def __str__(self):
        return f"exit status {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Runner:
    """Runs `python SCRIPT ARGS...` without the seconds that importing torch takes each time.

    One server process imports the heavy packages, then forks for every request. It computes
    nothing, so there are no threads that a fork could lose, and nothing in a fork is mocked.
    """

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        command = [sys.executable, str(ROOT / "tests" / "forkserver.py")]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True)

    def start(self, script: str, *argv, cwd: Path) -> "Running":
        self.number += 1
        out, err = (self.folder / f"{self.number}.{name}" for name in ("out", "err"))
        request = {"script": str(ROOT / f"{script}.py"), "argv": [str(a) for a in argv],
                   "cwd": str(cwd), "out": str(out), "err": str(err)}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Running(int(self.server.stdout.readline()), self.server, out, err)

    def __call__(self, script: str, *argv, cwd: Path) -> Finished:
        return self.start(script, *argv, cwd=cwd).wait()


@dataclass
class Running:
    pid: int
    server: subprocess.Popen
    out: Path
    err: Path

    def wait_for(self, condition) -> None:
        wait_until(condition, self.err.read_text)

    def kill(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 300.0) -> Finished:
        watchdog = threading.Timer(seconds, self.kill, [signal.SIGKILL])  # a hang is a failure
        watchdog.start()
        code = int(self.server.stdout.readline())
        watchdog.cancel()
        self.pid = 0
        return Finished(code, self.out.read_text(), self.err.read_text())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.pid:  # the test failed while it ran
            self.kill(signal.SIGKILL)
            self.wait()


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("processes"))
    yield runner
    runner.server.stdin.close()
    runner.server.wait(timeout=300)


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    """Name of each script that there is, without the .py."""
    return request.param
