"""Train preference vectors on a Ray cluster. In the folder in which `ray start` ran:

ray job submit -- .venv/bin/python jobs/train_vectors.py --config jobs/configs/tiny_train.yaml

Relative paths are taken from that folder; see docs/clusters.md for jobs from another one.
"""

from _command import run

if __name__ == "__main__":
    run("train")
