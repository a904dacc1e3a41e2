"""``python -m pcq`` and the ``pcq`` script."""

import sys


def main() -> None:
    """Run the command line; the exit code says how it went (see ``pcq.cli``)."""
    try:
        from pcq.cli import run
    except KeyboardInterrupt:  # not even the command line is imported
        sys.stderr.write("pcq: interrupted; no output file was changed.\n")
        sys.exit(130)
    sys.exit(run())


if __name__ == "__main__":
    main()
