"""prefvec-ray: preference vectors (Liang et al., arXiv 2504.20106) trained, searched and served on Ray."""

from importlib.metadata import version

__version__ = version("prefvec-ray")
