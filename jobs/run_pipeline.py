"""The whole mission on the embedded tiny world, as one job on a Ray cluster. In the folder in which `ray start` ran:

ray job submit -- .venv/bin/python jobs/run_pipeline.py --world micro

Relative paths are taken from that folder; see docs/clusters.md for jobs from another one.
"""

from _command import run

if __name__ == "__main__":
    run("demo")
