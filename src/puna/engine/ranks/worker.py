"""`python -m puna.engine.ranks.worker PATH DTYPE SIZE PORT RANK`: one of the processes that `Team.spawn` starts."""

from __future__ import annotations

import sys

from puna.base.console import PunaError, print_error
from puna.base.hardware import parse_dtype


def main(arguments: list[str]) -> int:
    """Join the team; 2 for an error that a person can mend."""
    from puna.engine.ranks.team import join

    path, dtype, size, port, rank = arguments
    try:
        join(path, parse_dtype(dtype), int(size), int(port), int(rank))
    except PunaError as error:
        print_error(error)
        return 2
    except (KeyboardInterrupt, RuntimeError) as error:  # rank 0 is gone: so is the reason to be here
        return 0 if isinstance(error, KeyboardInterrupt) or "onnection" in str(error) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
