from prefvec_ray.cli import main

main(prog_name="prefvec")
