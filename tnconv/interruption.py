"""An interruption of the command line is one line and exit code 130, whatever it interrupts.

Most of a command's first second is the import of torch, which begins with the package itself,
before any line of the command line runs: only a hook that is set first can answer there.
"""

import sys
from pathlib import Path
from types import TracebackType

CODE = 130
"""128 and the number of SIGINT, as shells report it."""


def is_command() -> bool:
    """Whether this process is ``python -m tnconv`` or the installed script.

    While a module that ``-m`` names is looked for, and its package imported, ``sys.argv[0]`` is
    ``-m``; later it is the module's file.
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # of another package, perhaps, which imports this one
        given = sys.orig_argv
        return "tnconv" in given[given.index("-m") + 1 :][:1] if "-m" in given else False
    return Path(program).stem == "tnconv"


def say_so() -> None:
    """The line."""
    print("python -m tnconv: interrupted", file=sys.stderr)


def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own answer to whatever nobody caught, but for interruptions."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    say_so()
    sys.exit(CODE)
