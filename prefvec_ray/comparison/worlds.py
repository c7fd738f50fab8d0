"""The tiny worlds of a comparison: trained where they are not there yet, by the stages of the demo."""

from rich.console import Console

from prefvec_ray.comparison.config import CompareConfig, ComparedRun


def trained_worlds(config: CompareConfig, console: Console) -> dict[str, ComparedRun]:
    """One training job for each base seed, under `<output>/worlds`; finished ones are kept."""
    worlds = config.tiny_worlds
    if worlds is None:
        return {}
    from prefvec_ray.common.stages import Stages
    from prefvec_ray.demo import Demo, PipelineConfig

    found = {}
    for seed in worlds.base_seeds:
        name = f"{worlds.preset}-{seed}"
        pipeline = PipelineConfig(world=worlds.preset, seed=seed, dpo_seeds=worlds.dpo_seeds)
        folder = (config.output / "worlds" / name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        Demo(pipeline, folder, console).train_stages(Stages(folder, console).run)
        world = f"tiny-world:{worlds.preset}:{seed}"
        found[name] = ComparedRun(
            folder=folder, prompts=f"{world}:search", report_prompts=f"{world}:report", scorer=world
        )
    return found
