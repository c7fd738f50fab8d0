"""The body of a run's workers.

The process that controls a run imports this module as well: what training needs is imported inside the functions,
by the workers alone.
"""

import os
import tempfile
from typing import Any

from prefvec_ray.common.paths import check_visible


def take_turns(config: dict[str, Any]) -> int:
    """The tasks of a worker group, one after the other, as the job's driver gives them out.

    `config`: the board, the group's name on it, and its first task, pickled, which needs no board. A group that was
    started again goes on with the task that it was at. Returns how many tasks were ended.
    """
    import gc

    import ray.train
    from ray import cloudpickle

    board, group = config["board"], config["group"]

    def asked(call: Any, without: Any) -> Any:
        """What the board answers; `without` a board, since it was lost or the job is over."""
        try:
            return ray.get(call)
        except ray.exceptions.RayActorError:
            return without

    task = config["first"]
    if ended := asked(board.begin_tasks.remote(group), 0):
        task = asked(board.task.remote(group, ended + 1), None)
    while task is not None:
        worker, given = cloudpickle.loads(task)
        worker({**given, "board": board})
        ended += 1
        gc.collect()  # a trainer and its model hold each other
        if ray.train.get_context().get_world_rank() == 0:
            asked(board.end.remote(group, ended), None)
        task = asked(board.task.remote(group, ended + 1), None)
    return ended


def dpo_worker(config: dict[str, Any]) -> None:
    """One DPO run. `config`: a RunSpec as a dict, and the board that shows its progress."""
    import ray.train

    from prefvec_ray.artifacts.training import RunSpec
    from prefvec_ray.training.dpo import run_dpo

    spec = RunSpec.model_validate(config["spec"])
    check_visible(spec.base, *spec.train, *spec.test.values(), *spec.answers)
    worker_setup()
    if spec.is_finished:  # its process was lost after its result was whole
        return
    board = config["board"]
    board.place.remote(spec.label, ray.train.get_context().get_world_rank(), ray.util.get_node_ip_address())
    with tempfile.TemporaryDirectory() as work_dir:
        run_dpo(spec, lambda values: board.update.remote(spec.label, values), work_dir)


def worker_setup() -> None:
    """Quiet libraries, and as many torch threads as the worker has CPUs: more only wait for each other.

    A run with one worker has no gradients to average. Accelerate would wrap its model in DDP all the same, because Ray
    Train names ranks, and copy all gradients at every step; without those names it does not.
    """
    import datasets
    import torch
    import torch.distributed as dist

    datasets.disable_progress_bars()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    if dist.is_initialized() and dist.get_world_size() == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
