"""``python -m pcq`` and the ``pcq`` script."""

import atexit
import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line; the exit code says how it went (see ``pcq.cli``).

    A process that ``torchrun`` started ends without Python's shutdown, in which a thread of gloo that lets go of its
    last tensor would abort it (https://github.com/pytorch/pytorch/issues/190489).
    """
    try:
        from pcq.cli import run
        from pcq.cli.frame import alone
    except KeyboardInterrupt:  # not even the command line is imported
        sys.stderr.write("pcq: interrupted; no output file was changed.\n")
        sys.exit(130)
    code = run()
    if alone():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
