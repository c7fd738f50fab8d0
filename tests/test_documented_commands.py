"""The documentation's commands for Ray's own tools, run word for word on a `machine` that has never seen Ray.

Its project holds a finished micro demo as `runs/demo`, that is: as after `make demo`.
"""

import ast
import re
import sys
from pathlib import Path

from prefvec_ray.registry import Registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RAYS_OWN = re.compile(r"\b(ray start|ray job submit|serve deploy)\b")


def blocks(page: str) -> list[str]:
    """The bash blocks of a page that use Ray's own commands."""
    found = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for block in found if RAYS_OWN.search(block)]


def of_comment(path: Path) -> str:
    """The commands that the comment at the head of a Serve config gives."""
    head = path.read_text().partition("\nproxy_location")[0]
    return "\n".join(line.removeprefix("#   ") for line in head.splitlines() if line.startswith("#   "))


def of_docstring(script: Path) -> str:
    text = ast.get_docstring(ast.parse(script.read_text()))
    assert text is not None
    (command,) = [line for line in text.splitlines() if line.startswith("ray ")]
    return command


def test_every_block_for_rays_commands_is_run_here():
    shown = {page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page.relative_to(ROOT).as_posix())}
    assert shown == {"docs/clusters.md", "docs/serving.md", "docs/training.md"}
    assert [len(blocks(page)) for page in sorted(shown)] == [4, 1, 1]


def test_a_command_that_starts_its_own_cluster_leaves_rays_token_alone(machine):
    """Ray's own commands would ask for it from then on."""
    machine.succeeds("prefvec eval --config jobs/configs/tiny_eval.yaml")
    assert not (machine.home / ".ray" / "auth_token").exists()


def test_a_cluster_by_hand_and_every_job(machine, request):
    start, submit, elsewhere, with_token = blocks("docs/clusters.md")
    submit, stop = submit[: submit.rindex(".venv/bin/ray stop")], submit[submit.rindex(".venv/bin/ray stop") :]
    scripts = {script.name: of_docstring(script) for script in sorted((ROOT / "jobs").glob("[a-z]*.py"))}
    assert len(scripts) == 6
    machine.succeeds(start)
    try:
        printed = machine.succeeds(submit)
        assert "DPO runs: " in printed, "progress reaches the job's log"
        registry = Registry.open(machine.project / "runs" / "tiny" / "registry", create=False)
        assert [version.ref for version in registry.list_vectors()] == ["harmless@1", "helpful@1"]
        machine.succeeds(elsewhere)  # the finished runs are skipped
        assert scripts["train_vectors.py"] in submit
        assert scripts["train_vectors.py"] in blocks("docs/training.md")[0]
        for name, command in scripts.items():
            if name != "train_vectors.py":
                machine.succeeds(command)
        for made in ("search/report.html", "eval/evaluation.json", "demo-micro/report.md", "robustness/robustness.md"):
            assert (machine.project / "runs" / made).is_file(), made

        # From a copy of the folder: what would vanish with it is refused, absolute paths are not.
        copied = "ray job submit --working-dir . -- $PWD/.venv/bin/python "
        done = machine.run(copied + "jobs/train_vectors.py --config jobs/configs/tiny_train.yaml")
        assert done.returncode == 1
        assert "which Ray deletes with the cluster; give an absolute path" in done.stdout + done.stderr
        (machine.project / "absolute").mkdir()
        for path in (machine.project / "jobs" / "configs").glob("tiny_*.yaml"):
            text = re.sub(r"\bruns(?=[/\n])", str(machine.project / "runs"), path.read_text())
            (machine.project / "absolute" / path.name).write_text(text)
        for name in scripts if request.config.getoption("--full") else ["train_vectors.py"]:
            arguments = scripts[name].partition(".py")[2].replace("jobs/configs", "absolute")
            arguments = arguments.replace(" runs/", f" {machine.project}/runs/")
            arguments += f" --output {machine.project}/runs" if "--world" in arguments else ""
            machine.succeeds(f"{copied}jobs/{name}{arguments}")

        typo = (
            (machine.project / "jobs" / "configs" / "tiny_train.yaml")
            .read_text()
            .replace("learning_rate", "learning_rat")
        )
        (machine.project / "absolute" / "typo.yaml").write_text(typo)
        another = f"{sys.base_prefix}/bin/python3"  # without the packages
        for command, says in {
            f"ray job submit -- {another} jobs/train_vectors.py": "submit the job with the interpreter",
            scripts["evaluate_vectors.py"].replace("tiny_eval", "no_such"): "no_such.yaml: no such file",
            scripts["train_vectors.py"].replace(
                "jobs/configs/tiny_train", "absolute/typo"
            ): "did you mean 'learning_rate'?",
        }.items():
            done = machine.run(command)
            assert done.returncode == 1
            assert says in done.stdout + done.stderr
    finally:
        machine.succeeds(stop)
    machine.succeeds(with_token)
    machine.succeeds("rm ~/.ray/auth_token")  # else every later `ray start` here asks for it


def test_serving_from_a_file(machine):
    (page,) = blocks("docs/serving.md")
    start, deploy, ask = page.splitlines()
    machine.succeeds(start)
    try:
        machine.succeeds(deploy)
        machine.prints(ask, '"helpful"')
        lines = of_comment(ROOT / "serve_configs" / "tiny.yaml").splitlines()
        assert lines == [start, deploy.partition("   ")[0], ask.partition("   ")[0]]

        *keys, again, deploy, ask = of_comment(ROOT / "serve_configs" / "with-keys.yaml").splitlines()
        assert again == start
        key, _ = [machine.succeeds(line).strip() for line in keys]
        machine.succeeds(deploy)
        machine.prints(ask.replace("<key>", key), '"helpful"')
    finally:
        machine.succeeds("ray stop")
