"""`puna` and `python -m puna`: errors become messages and exit codes here, and nowhere else."""

from __future__ import annotations

import os
import sys

from puna.base.console import PunaError, print_error


def main() -> int:
    """Exit code 0 on success, 2 on a PunaError (message and hint, no traceback), 1 on a bug (with its traceback)."""
    if "WORLD_SIZE" in os.environ:  # else torch's C++ parts tell at length how each rank lost its neighbours
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from puna.cli.front import run

    try:
        run(sys.argv[1:])
    except PunaError as error:
        # Before ranks have met, each node says it once: a command line may be wrong on one node only.
        if not error.told and os.environ.get("LOCAL_RANK", "0") == "0":
            print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `puna info ... | head`
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
