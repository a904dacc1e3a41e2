"""``python -m pcq`` and the ``pcq`` script."""

import sys


def main() -> None:
    """Run the command line; the exit code says how it went (see ``pcq.cli``)."""
    from pcq.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
