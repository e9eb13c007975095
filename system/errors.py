"""The errors that a user can fix, and how a script reports them."""

import os
import sys
from pathlib import Path

from system.safe_text import one_line
from system.terminal import print_whatever_comes
from system.threads import sleep_while_waiting


class UserError(Exception):
    """An error that the user can fix.

    The message is one line that names the flag or file and the remedy. `exit_code` is 2 if the
    command line is at fault and 1 for everything else (files, data, numbers).
    """

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """A flag, or a combination of flags, that cannot work."""

    def __init__(self, message):
        super().__init__(message, exit_code=2)


def warn(message):
    """Print one warning line on stderr; of several processes only the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"warning: {one_line(str(message))}", file=sys.stderr, flush=True)


def run_script(main):
    """Call `main()` and exit with its code; a `UserError` becomes one line on stderr.

    All scripts start here, before PyTorch is imported.
    """
    sleep_while_waiting()
    print_whatever_comes()
    try:
        sys.exit(main())
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        # of several processes each may fail in its own way
        who = "" if rank == "0" else f"rank {rank}: "
        print(f"{who}error: {one_line(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        here = Path(__file__).resolve().parent.parent
        if not package or (here / package).is_dir() or (here / f"{package}.py").exists():
            raise
        print(
            f"error: {sys.executable} has no package {package}: run `source .venv/bin/activate` "
            "first; `bash setup_venv.sh` makes that environment",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except BrokenPipeError:
        # the reader of our output ended, as `| head` does: nobody would see a message
        sys.stderr.close()
        sys.exit(141)
    except (MemoryError, RuntimeError) as error:
        # PyTorch reports missing memory in several ways, on the CPU without a type of its own
        if "allocate" not in str(error) and "out of memory" not in str(error):
            raise
        print(
            "error: not enough memory: use smaller sizes, or a smaller --batch-size",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except OSError as error:
        # for example a full disk, at a place that knows no better message
        print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
        sys.exit(1)
