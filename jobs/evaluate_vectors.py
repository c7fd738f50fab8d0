"""Measure settings of published vectors on a Ray cluster:

ray job submit --working-dir . -- python jobs/evaluate_vectors.py --config jobs/configs/tiny_eval.yaml
"""

import sys

from prefvec_ray.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
