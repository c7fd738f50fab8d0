"""What the groups of commands share: errors as one line, and options that several commands have."""

import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from prefvec_ray.common.errors import InputError, JobError


class Commands(click.Group):
    """One line and exit code 2 for an InputError, 1 for a JobError; lists commands in the order of this file.

    The same for errors of the operating system that are no bug, such as a full disk. All others keep their traceback.
    """

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (InputError, JobError) as error:
            _report(error)
        except OSError as error:
            from prefvec_ray.common.files import os_failure

            known = os_failure(error)
            if known is None:
                raise
            _report(known)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command continues from what is finished", err=True)
            sys.exit(130)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


def _report(error: InputError | JobError) -> NoReturn:
    bad_input = isinstance(error, InputError)
    message = getattr(error, "cause", error)  # where it was raised in another process, Ray's error is its traceback
    click.echo(f"{'error' if bad_input else 'failed'}: {message}", err=True)
    sys.exit(2 if bad_input else 1)


registry_option = click.option(
    "--registry",
    required=True,
    envvar="PREFVEC_REGISTRY",
    show_envvar=True,
    help="A folder or bucket, such as runs/demo/registry, or ray:NAME for a registry actor of the Ray cluster.",
)


def load(path: Path, module: str, model: str) -> Any:
    """The config of this type, from a YAML file."""
    import importlib

    from prefvec_ray.common.config import load_config

    return load_config(path, getattr(importlib.import_module(module), model))


def fail_for(damaged: list[str]) -> None:
    """JobError where something could not be listed: the list is not complete."""
    if damaged:
        more = f" (and {len(damaged) - 1} more, see `prefvec registry verify`)" if len(damaged) > 1 else ""
        raise JobError(f"the list is not complete: {damaged[0]}{more}")


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def print_notes(scorer: Any, console: Any) -> None:
    """Print the scorer's notes, of this process and of all that share its cache."""
    from rich.markup import escape

    from prefvec_ray.scorers import scorer_notes

    for line in scorer_notes(scorer):
        console.print(escape(line), soft_wrap=True)
