"""`puna` and `python -m puna`: errors become messages and exit codes here, and nowhere else."""

from __future__ import annotations

import sys

from puna.base.console import PunaError


def main() -> int:
    """Exit code 0 on success, 2 on a PunaError (message and hint, no traceback), 1 on a bug (with its traceback)."""
    from puna.cli import run

    try:
        run(sys.argv[1:])
    except PunaError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `puna info ... | head`
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
