"""Parts of the package that need more than the base install (`[project.optional-dependencies]` in pyproject.toml)."""

from importlib.util import find_spec

from prefvec_ray.common.errors import InputError


class MissingExtraError(InputError, ImportError):
    """A package of an extra is not installed."""


def require(extra: str, *packages: str) -> None:
    """MissingExtraError, with the command that installs `extra`, unless all `packages` are there. Imports none."""
    missing = [package for package in packages if not _is_there(package)]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} is not installed: pip install 'prefvec-ray[{extra}]'")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False
