"""Study how often TRADES overestimates robustness, on a Ray cluster. In the folder in which `ray start` ran:

ray job submit -- .venv/bin/python jobs/robustness_study.py --preset quick --output runs/robustness

Relative paths are taken from that folder; see docs/clusters.md for jobs from another one.
"""

from _command import run

if __name__ == "__main__":
    run("robustness", "study")
