"""Study how often TRADES overestimates robustness, on a Ray cluster:

ray job submit --working-dir . -- python jobs/robustness_study.py --preset digits --output /shared/runs/robustness
"""

import sys

from prefvec_ray.cli import main

if __name__ == "__main__":
    main(["robustness", "study", *sys.argv[1:]])
