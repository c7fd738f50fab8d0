"""Several users on one cluster: each endpoint has its own name, keys and port, and ends alone.

One user is this process; the other runs the command, which joins the cluster of the tests.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from openai import AuthenticationError, OpenAI, Stream
from ray import serve

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.serving import ServingConfig, roll_out, start, stop
from prefvec_ray.serving.access.keys import add_key
from prefvec_ray.serving.http.ingress import Address, ingress_address
from prefvec_ray.serving.instance import inspect_serve, shut_down_serve
from prefvec_ray.serving.placement import choose_route
from tests.conftest import free_port

pytestmark = pytest.mark.slow


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.2)


@dataclass
class User:
    """One user's endpoint-to-be: a config file of its own, a key that only it knows, a port."""

    name: str
    config: ServingConfig
    file: Path
    key: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, **options: Any) -> str:
        return start(self.config, port=self.port, name=self.name, **options)

    def ask(self, key: str | None = None, stream: bool = False) -> str:
        """An answer of this endpoint, with this user's key unless another one is given."""
        with OpenAI(base_url=self.url, api_key=key or self.key, max_retries=0, timeout=60) as client:
            told = client.completions.create(model="tiny", prompt="the fox", max_tokens=8, temperature=0, stream=stream)
            if isinstance(told, Stream):
                return "".join(chunk.choices[0].text for chunk in told)
            return told.choices[0].text

    def serves(self) -> bool:
        """Does its own key open its own port?"""
        try:
            return bool(self.ask())
        except Exception:
            return False


def lines_until(process: "subprocess.Popen[str]", wanted: str) -> list[str]:
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return lines
    raise AssertionError("".join(lines))


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and the rest of what it printed."""
    printed = process.communicate(timeout=120)[0]
    return process.returncode, printed


@pytest.fixture
def commands(ray_cluster: str) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`prefvec serve` of a user, as a process on the tests' cluster. None outlives its test."""
    here = ray.get_runtime_context().gcs_address
    started = []

    def run(user: User, *words: str, address: str = here) -> "subprocess.Popen[str]":
        environment = os.environ | {"RAY_ADDRESS": address, "COLUMNS": "200"}
        serve_it = ["serve", "--config", str(user.file), "--name", user.name, "--port", str(user.port), *words]
        command, pipe = [sys.executable, "-m", "prefvec_ray.cli", *serve_it], subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def users(
    ray_cluster: str, base_folder: Path, registry_root: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], User]:
    def new(name: str, **settings: Any) -> User:
        folder = tmp_path_factory.mktemp(name)
        keys = folder / "keys.yaml"
        key = add_key(keys, name)[1]
        fields: dict[str, Any] = {
            "model": "tiny",
            "base": str(base_folder),
            "registry": registry_root,
            "keys": str(keys),
            "anonymous": {"allowed": False},
            "engine": {"max_new_tokens": 32, "max_batch": 4},
            "replicas": {"cpus": 0.2},
            "limits": {"seconds": 5},
            "audit": {"file": str(folder / "audit.jsonl")},
        }
        fields |= settings
        file = folder / "serve.yaml"
        file.write_text(json.dumps({"applications": [{"name": "prefvec", "args": fields}]}))
        return User(name, ServingConfig.model_validate(fields), file, key, free_port())

    return new


@pytest.fixture(scope="module")
def cluster(ray_cluster: str, running: list[Any]) -> Iterator[Callable[[], Sequence[str]]]:
    """The names of the applications that run. Serve is not running at first."""
    shut_down_serve()  # other files deploy their endpoint again

    def names() -> Sequence[str]:
        found = inspect_serve()
        return sorted(found.apps) if found else []

    yield names
    shut_down_serve()


@pytest.fixture(scope="module")
def alice(cluster: Callable[[], Sequence[str]], users: Callable[[str], User]) -> User:
    """The first user, who starts Serve on her port; another team's application joins it."""
    alice = users("alice")
    alice.start()

    class Other:
        """Local, so that it travels to its replica by value."""

        def __call__(self) -> str:
            return "another team's"

    other = serve.deployment(ray_actor_options={"num_cpus": 0})(Other)
    serve.run(other.bind(), name="others", route_prefix="/others")
    return alice


def others_answer(alice: User) -> bool:
    return httpx.get(f"http://127.0.0.1:{alice.port}/others", timeout=30).text == "another team's"


def test_two_endpoints_under_two_names_with_their_own_keys_and_ports(alice, users, cluster, commands):
    bob = users("bob")
    process = commands(bob)
    lines_until(process, f"serving tiny as 'bob' at {bob.url}")
    assert cluster() == ["alice", "bob", "others"]
    assert alice.ask() == bob.ask() == bob.ask(stream=True), "the same model and vectors"
    for user, stranger in ((alice, bob), (bob, alice)):
        with pytest.raises(AuthenticationError):
            user.ask(stranger.key)

    # The page and the API's description live under the own port, wherever Serve runs the application.
    own = f"http://127.0.0.1:{bob.port}"
    page = httpx.get(f"{own}/", timeout=30)
    assert 'src="playground/app.js"' in page.text
    assert httpx.get(f"{own}/playground/app.js", timeout=30).status_code == 200
    reference = httpx.get(f"{own}/docs", timeout=30).text
    assert "/v1/completions" in reference
    description = re.search(r'href="(openapi\.json)"', reference)
    assert description is not None
    assert "/v1/completions" in httpx.get(f"{own}/{description[1]}", timeout=30).json()["paths"]
    assert httpx.get(f"http://127.0.0.1:{alice.port}/prefvec/bob", timeout=30).headers["location"].endswith("/bob/")
    headers = {"authorization": f"Bearer {bob.key}"}
    assert httpx.post(f"{bob.url}/completions", headers=headers, content=b"{", timeout=30).status_code == 415
    assert httpx.get(f"{own}/v1/nowhere", timeout=30).status_code == 404
    assert httpx.get(own, headers={"x": "y" * 40_000}, timeout=30).status_code == 431

    for user in (alice, bob):
        assert roll_out(user.config, name=user.name).generation == 0, "by name; nothing new"
    with pytest.raises(InputError, match=r"no endpoint 'nobody' runs: those that run are (alice, bob|bob, alice);"):
        roll_out(alice.config, name="nobody")
    with pytest.raises(InputError, match="no endpoint 'others' runs"):
        roll_out(alice.config, name="others")

    # What is in the way is one line, before anything is touched.
    carol = users("carol", limits={"seconds": 4})
    for name, port, wanted in (
        (
            "bob",
            bob.port,
            r"'bob' runs already at 127.0.0.1:\d+ with another config \(.*keys.*limits.*\); give another",
        ),
        ("others", carol.port, "'others' of somebody else runs on this cluster"),
        ("carol", bob.port, f"port {bob.port} on 127.0.0.1 belongs to the endpoint 'bob'"),
        ("carol", alice.port, "the application 'alice' answers there; choose another --port"),
        ("carol/", carol.port, "name 'carol/': expected"),
        ("carol", 0, "port 0: expected"),
    ):
        with pytest.raises(InputError, match=wanted):
            start(carol.config, port=port, name=name)
    with socket.create_server(("127.0.0.1", carol.port)), pytest.raises(InputError, match="taken by another program"):
        carol.start()
    running = inspect_serve()
    assert running is not None
    public = replace(running, host="0.0.0.0")
    with pytest.raises(InputError, match=r"other machines could reach the endpoint there .*--host 0\.0\.0\.0 if that"):
        choose_route(public, carol.config, "carol", Address("127.0.0.1", carol.port), replace=False)
    assert cluster() == ["alice", "bob", "others"]
    assert (alice.serves(), bob.serves(), others_answer(alice)) == (True, True, True)

    process.send_signal(signal.SIGINT)
    code, printed = ended(process)
    assert (code, "Traceback" in printed) == (0, False), printed
    assert cluster() == ["alice", "others"]
    assert (alice.serves(), bob.serves(), others_answer(alice)) == (True, False, True)
    assert ingress_address("bob") is None
    audit = bob.config.audit.file
    routes = {json.loads(line)["route"] for line in audit.read_text().splitlines()}
    assert routes == {"/v1/completions", "/v1/models/{name}"}, "without the prefix"


def test_the_same_config_deploys_again_and_another_one_only_with_replace(alice, users, cluster):
    before = alice.ask()
    alice.start()
    assert alice.ask() == before
    longer = users("alice", limits={"seconds": 6})
    longer.port = alice.port
    with pytest.raises(InputError, match=r"'alice' runs already at .* with another config .*--replace"):
        longer.start()
    assert alice.serves()
    longer.start(replace=True)
    assert (longer.serves(), alice.serves(), others_answer(alice)) == (True, False, True)
    alice.start(replace=True)
    assert (alice.serves(), cluster()) == (True, ["alice", "others"])


def test_a_deployment_that_fails_is_deleted_and_nothing_else(alice, users, cluster):
    bob = users("bob", engine={"device": "cuda"})
    with pytest.raises(JobError, match=r"the endpoint 'bob' did not start: .*(CUDA|cuda|GPU)") as error:
        bob.start()
    assert "\n" not in str(error.value)
    assert (cluster(), ingress_address("bob")) == (["alice", "others"], None)
    assert (alice.serves(), others_answer(alice)) == (True, True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_it_starts_it_leaves_nothing(alice, users, cluster, commands, number, code):
    bob = users("bob", replicas={"cpus": 4})  # all that the node has: waits while others hold some of it
    process = commands(bob)
    wait_for(lambda: "bob" in cluster())
    process.send_signal(number)
    told, printed = ended(process)
    assert (told, "Traceback" in printed) == (code, False), printed
    assert cluster() == ["alice", "others"]
    assert (alice.serves(), others_answer(alice)) == (True, True)


def test_whoever_started_serve_leaves_it_to_the_others(alice, users, cluster, commands):
    """The first user goes; the second, who joined, is served on and ends by SIGTERM as `ray job stop` sends it."""
    bob = users("bob")
    process = commands(bob)
    lines_until(process, "serving tiny as 'bob'")
    instance = inspect_serve()
    assert instance is not None
    stop("alice")
    assert cluster() == ["bob", "others"]
    assert (alice.serves(), bob.serves(), others_answer(alice)) == (False, True, True)
    process.send_signal(signal.SIGTERM)
    code, printed = ended(process)
    assert (code, "Traceback" in printed) == (0, False), printed
    assert cluster() == ["others"]
    left = inspect_serve()
    assert left is not None
    assert left.controller == instance.controller, "Serve goes on: it was not this process that started it"
    serve.delete("others")
    stop("alice")
    assert inspect_serve() is None, "and ends with its starter, once nothing else runs"


def test_an_endpoint_that_somebody_else_took_over_is_left_alone(alice, users, cluster, commands):
    """The first process sees that it serves no more, says so, and does not delete what is another's now."""
    process = commands(alice)
    lines_until(process, "serving tiny as 'alice'")
    alice.start()
    code, printed = ended(process)
    assert code == 1
    assert "'alice' was deployed anew by somebody else" in printed
    assert alice.serves()
    stop("alice")
    assert "alice" not in cluster()


def test_alone_on_a_machine_it_starts_and_ends_without_noise(users, commands):
    """A cluster of its own, Serve on its port: a line when it serves, none when Ctrl-C ends it."""
    carol = users("carol")
    process = commands(carol, address="local")
    lines = lines_until(process, f"serving tiny as 'carol' at {carol.url}")
    assert carol.serves()
    process.send_signal(signal.SIGINT)
    code, printed = ended(process)
    assert (code, printed.strip()) == (0, ""), printed
    expected = ("Ray cluster with", "network_util", "is starting")  # the last: on a busy machine
    own = [line for line in lines if not any(words in line for words in expected)]
    assert len(own) == 1, own
