"""Train preference vectors on a Ray cluster:

ray job submit --working-dir . -- python jobs/train_vectors.py --config jobs/configs/hh_stories260k.yaml
"""

import sys

from prefvec_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
