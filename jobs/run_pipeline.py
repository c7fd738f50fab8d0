"""The whole mission on the embedded tiny world, as one job on a Ray cluster:

ray job submit --working-dir . -- python jobs/run_pipeline.py --world micro --output /shared/runs
"""

import sys

from prefvec_ray.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
