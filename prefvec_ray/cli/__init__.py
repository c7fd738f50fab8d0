"""The `prefvec` command, one file a group of commands. Everything heavy is imported inside, so that --help is quick."""

import os
import warnings

import click

from prefvec_ray.cli.compare import compare
from prefvec_ray.cli.data import data
from prefvec_ray.cli.demo import demo
from prefvec_ray.cli.evaluate import evaluate
from prefvec_ray.cli.export import export
from prefvec_ray.cli.keys import keys
from prefvec_ray.cli.registry import registry_group, vectors
from prefvec_ray.cli.robustness import robustness
from prefvec_ray.cli.search import search
from prefvec_ray.cli.serve import roll_out, serve
from prefvec_ray.cli.shared import Commands
from prefvec_ray.cli.train import train, train_scorer

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="prefvec-ray")
def main() -> None:
    """Preference vectors on Ray: train each preference once, choose the balance per deployment or per request."""
    quiet_libraries()


def quiet_libraries() -> None:
    """Before they are imported, here and in every worker."""
    # Our own bars show the progress; those of libraries would only break the lines.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Each run of Ray Train has some processes that take no CPU, and Ray warns of their number.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
    # TRL sets a field of transformers that transformers calls deprecated: nothing that a user could fix.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


for command in (demo, train, train_scorer, evaluate, search, compare, roll_out, serve, export):
    main.add_command(command)
for group in (data, vectors, registry_group, robustness, keys):
    main.add_command(group)
