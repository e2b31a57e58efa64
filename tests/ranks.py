"""What torchrun does, by forking: N processes of a script that know their rank.

    python tests/ranks.py N SCRIPT ARGS...       exit status: the first that is not 0

Through `Runner` no process spends seconds on importing torch. As under torchrun, when one process
fails the others get SIGTERM.
"""

import os
import runpy
import signal
import socket
import sys


def main() -> None:
    world, sys.argv = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            runpy.run_path(sys.argv[0], run_name="__main__")
            return
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in pids])
    code = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in pids:
                os.kill(other, signal.SIGTERM)
    sys.exit(code)


if __name__ == "__main__":
    main()
