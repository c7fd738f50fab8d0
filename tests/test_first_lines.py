"""What each command says, and how it ends, where a cluster has no room for it or cannot be joined.

The table of docs/clusters.md is made here: `pytest tests/test_first_lines.py --full` runs every command in
every case and writes it. Without that option one command a case runs, and must say what the table says.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefvec_ray.common.cluster import NAMESPACE

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"
HEAD = "| case | command | prints | exit code | seconds |\n|---|---|---|---|---|\n"
COMMANDS = ("train", "eval", "search", "serve", "robustness study", "demo")


@dataclass(frozen=True)
class Case:
    name: str
    says: str
    """A pattern of the line to wait for."""
    code: int
    sample: str
    """The command that is run in every suite."""
    interrupt: bool = False
    """The command would wait for ever, or serve: Ctrl-C ends it once the line is there."""
    without: tuple[str, ...] = ()
    """Commands that have no such case."""
    room: Mapping[str, float] | None = None
    """What each process of the command is to ask for."""


CASES = [
    Case(
        "one CPU",
        r"registry .*: h|evaluation\.json and|report\.html$|serving tiny|^[0-9]+ runs in |report: ",
        0,
        "eval",
    ),
    Case("no CPU is free", "waits for", 130, "search", interrupt=True),
    Case("no GPU in the cluster", "can never give it", 2, "serve", without=("demo",), room={"gpus": 1}),
    Case("larger than any node", "can never give it", 2, "train", without=("demo",), room={"cpus": 64}),
    Case("the only node with room does not see the folder", "does not see", 1, "train", without=("robustness study",)),
    Case("RAY_ADDRESS leads nowhere", "nothing answers there", 2, "demo"),
    Case("the cluster's token is not here", "asks for a token", 2, "robustness study"),
]
CELLS = [(case, command) for case in CASES for command in COMMANDS if command not in case.without]


@dataclass
class Outcome:
    line: str
    seconds: float
    code: int
    printed: str


@pytest.fixture(scope="module")
def command_of(demo_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Case], list[str]]:
    """The words of a command on the micro demo's models, with what its processes are to ask for."""
    demo = demo_run["folder"]
    measured = {
        "base": str(demo / "base"),
        "registry": str(demo / "registry"),
        "vectors": {"helpful": "helpful@1", "harmless": "harmless@1"},
        "prompts": "tiny-world:micro:0:search",
        "scorer": "tiny-world:micro:0",
    }
    pairs = {"data": str(demo / "world" / "preferences.jsonl"), "rows": 64}

    def command(name: str, case: Case) -> list[str]:
        folder = demo.parents[1] / "first-lines" / tmp_path_factory.mktemp("cell").name
        folder.mkdir(parents=True)
        room, output = dict(case.room or {}), str(folder / "out")
        if name == "demo":
            return ["demo", "--world", "micro", "--output", output]
        config: dict[str, Any]
        if name == "train":
            workers = {f"{kind}_per_worker": amount for kind, amount in room.items()}
            config = {"name": "job", "output": output, "base": str(demo / "base"), "preferences": {"helpful": pairs}}
            config |= {"resources": workers, "dpo": {"per_device_train_batch_size": 16, "num_train_epochs": 1}}
        elif name == "eval":
            config = {**measured, **room, "output": output, "settings": {"careful": {"harmless": 1.0}}}
        elif name == "search":
            config = {**measured, **room, "output": output, "objectives": ["helpful", "harmless"], "trials": 6}
            config |= {"report_prompts": "tiny-world:micro:0:report", "patience": 2}
        elif name == "serve":
            config = {name: measured[name] for name in ("base", "registry", "vectors")} | {"model": "tiny"}
            config |= {"replicas": room} if room else {}
            config = {"applications": [{"name": "prefvec", "args": config}]}
        else:
            config = {"grids": [{"epsilon": [0.3], "seeds": 1}], "train": 200, "watch": 50, "test": 50, "epochs": 1}
            config |= {"resources": {kind.removesuffix("s"): amount for kind, amount in room.items()}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        words = [*name.split(), "--config", str(folder / "config.yaml")]
        return [*words, "--output", output] if name == "robustness study" else words

    return command


@pytest.fixture(scope="module")
def cluster_for(
    demo_run: dict[str, Any],
    new_cluster: Callable[..., AbstractContextManager[Any]],
    blind_node: Callable[..., AbstractContextManager[None]],
    machine: Any,
) -> Iterator[Callable[[str], Callable[[list[str]], list[str]]]]:
    """The cluster of a case, one at a time: a function from a command's words to those that run it there."""
    here = [sys.executable, "-m", "prefvec_ray.cli"]
    started: dict[str, Any] = {}
    with ExitStack() as cleanup:

        def at(address: str) -> Callable[[list[str]], list[str]]:
            return lambda words: ["env", f"RAY_ADDRESS={address}", *here, *words]

        def enter(context: AbstractContextManager[Any]) -> Any:
            return cleanup.enter_context(context)

        def start(case: str) -> Callable[[list[str]], list[str]]:
            if case in started:
                return started[case]
            cleanup.close()
            started.clear()
            if case == "RAY_ADDRESS leads nowhere":
                found = at("127.0.0.1:1")
            elif case == "the cluster's token is not here":
                token = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=" + "0" * 64
                machine.succeeds(f"env {token} ray start --head --num-cpus=1")
                cleanup.callback(machine.succeeds, f"env {token} ray stop")
                found = lambda words: machine.command(" ".join(["prefvec", *words]))  # noqa: E731
            elif case.startswith("the only node"):
                cluster = enter(new_cluster(num_cpus=0, include_dashboard=False))
                enter(blind_node(cluster, demo_run["folder"].parents[1]))
                found = at(cluster.address)
            else:
                cluster = enter(new_cluster(num_cpus=2 if case == "no CPU is free" else 1, include_dashboard=False))
                found = at(cluster.address)
                if case == "no CPU is free":
                    hold = [sys.executable, "-c", HOLD, cluster.address, NAMESPACE]
                    busy = enter(subprocess.Popen(hold, stdout=subprocess.PIPE, text=True))
                    cleanup.callback(busy.kill)
                    assert busy.stdout.readline() == "held\n"
            started[case] = found
            return found

        yield start


HOLD = """
import sys, time, ray
ray.init(sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
@ray.remote(num_cpus=2)
class Busy:
    def here(self): pass
busy = Busy.remote()
ray.get(busy.here.remote())
print("held", flush=True)
time.sleep(3600)
"""


def outcome(words: list[str], case: Case, interrupt: bool) -> Outcome:
    """Run the command until it ends; with Ctrl-C, where that is to end it, after the line."""
    began, line, seconds, printed = time.monotonic(), "", 0.0, []
    environment = {**os.environ, "COLUMNS": "200"}
    process = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for text in process.stdout:
        printed.append(text)
        if not line and re.search(case.says, text):
            line, seconds = text.strip(), time.monotonic() - began
            if interrupt:
                process.send_signal(signal.SIGINT)
    return Outcome(line, seconds, process.wait(timeout=120), "".join(printed))


def shown(line: str) -> str:
    """The line without what differs from run to run."""
    line = re.sub(r"(/[\w.@+-]+)*/(first-lines/[\w-]+|runs)/", "…/", line).replace("`", "'")
    line = re.sub(r"\(\d+ s; Ctrl-C", "(10 s; Ctrl-C", line)
    line = re.sub(r"node (\S+) \([\d.]+\)", r"node \1", re.sub(r"127\.0\.0\.1:\d{4,}", "127.0.0.1:6379", line))
    return line.replace("|", "\\|")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], str]]:
    """Case and command -> row. With `--full` it is written at the end, with a new row for each cell that ran."""
    before, _, rest = PAGE.read_text().partition(HEAD)
    old, _, after = rest.partition("\n\n")
    rows = {tuple(row.strip("| ").split(" | ")[:2]): row for row in old.splitlines()}
    yield rows  # type: ignore[misc]
    if request.config.getoption("--full"):
        lines = [rows[case.name, command] for case, command in CELLS if (case.name, command) in rows]
        PAGE.write_text(before + HEAD + "\n".join(lines) + "\n\n" + after)


@pytest.mark.parametrize(("case", "command"), CELLS, ids=lambda part: getattr(part, "name", part).replace(" ", "-"))
def test_the_line_comes_and_the_command_ends(case, command, cluster_for, command_of, table, request):
    write = request.config.getoption("--full")
    if not write and command != case.sample:
        pytest.skip("run with --full")
    interrupt = case.interrupt or (command == "serve" and case.code == 0)
    found = outcome(cluster_for(case.name)(command_of(command, case)), case, interrupt)
    assert found.line, found.printed
    assert found.code == case.code, found.printed
    assert "Traceback" not in found.printed
    told = f"| {case.name} | {command} | `{shown(found.line)}` | {found.code} |"
    if write:
        table[case.name, command] = f"{told} {found.seconds:.1f} |"
    else:
        assert table[case.name, command].startswith(told)


def test_the_table_has_every_cell(table, request):
    if not request.config.getoption("--full"):
        assert list(table) == [(case.name, command) for case, command in CELLS]
