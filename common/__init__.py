"""Small helpers that know no algorithm.

A script imports this package first: from then on Ctrl-C is one line, not a traceback, though the
other imports take seconds.
"""

import sys


def interrupted(kind, error, trace) -> None:
    """Print what Python would, but for Ctrl-C one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = interrupted
