"""Search the coefficients of published vectors on a Ray cluster:

ray job submit --working-dir . -- python jobs/search_coefficients.py --config jobs/configs/tiny_search.yaml
"""

import sys

from prefvec_ray.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
