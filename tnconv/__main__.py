"""``python -m tnconv``."""

import os
import sys
from collections.abc import Sequence

from tnconv import interruption


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code; an interruption is one line, also while the command line is imported."""
    try:
        from tnconv.cli import main

        code = main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        interruption.say_so()
        code = interruption.CODE
    return code


if __name__ == "__main__":
    sys.exit(run())
