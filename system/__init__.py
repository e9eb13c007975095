"""Errors, files, terminals and the command line: no physics, no model."""

import sys

# every script imports this room first, and an older Python fails at its next import
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"error: Python {sys.version_info[0]}.{sys.version_info[1]} is too old, 3.11 to 3.14 are "
        "needed: run `source .venv/bin/activate`; `bash setup_venv.sh` makes that environment"
    )
