"""Make preference pairs of a base's own answers on a Ray cluster. In the folder in which `ray start` ran:

ray job submit -- .venv/bin/python jobs/make_pairs.py --config jobs/configs/tiny_pairs.yaml

Relative paths are taken from that folder; see docs/clusters.md for jobs from another one.
"""

from _command import run

if __name__ == "__main__":
    run("data", "make")
