"""What the scripts of this folder share: each runs one command of `prefvec`."""

import sys
from typing import NoReturn


def run(*command: str) -> NoReturn:
    """Run `prefvec COMMAND` with this process's arguments."""
    try:
        from prefvec_ray.cli import main
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the Python at {sys.executable} has no module {error.name!r}: submit the job with the interpreter"
            " of the project's environment, such as `ray job submit -- .venv/bin/python jobs/…`"
        )
    main([*command, *sys.argv[1:]])
    sys.exit()
