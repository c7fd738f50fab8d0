"""A user's scorer in a process of its own, so that one that hangs, crashes or eats the memory ends without its caller.

A thread that hangs cannot be ended; a process can. The child gets prompts and answers through a pipe and sends scores
back. It ends with its parent, also when that is killed: it watches a pipe that only the parent holds open.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers.base import Scorer, ScorerError, ScorerTimeoutError, Scores, load_scorer, scorer_digest

STARTING = 120.0
"""Seconds that a child may take for its imports."""


class IsolatedScorer:
    """The scorer at `module:name`, asked in a child process that is killed after `timeout` seconds without an answer.

    The child lives from the first call on and is asked again at the next; after a time-out or a crash, the next call
    starts a new one. Travels by pickle without its child. Close it, or let it be collected, to end the child.

    Raises:
        InputError: there is no such scorer (it is imported here too, to know its metrics), or no time.
        ScorerTimeoutError, ScorerError: at a call: no answer in time; the child died, or the scorer raised.
    """

    def __init__(self, where: str, *, timeout: float) -> None:
        if not 0 < timeout < float("inf"):
            raise InputError(f"scorer {where}: a timeout of {timeout} s; give a number above 0")
        scorer = load_scorer(where)
        self.where, self.timeout = where, timeout
        self.metrics: Mapping[str, Metric] = dict(scorer.metrics)
        self.digest = scorer_digest(scorer)
        self.card = getattr(scorer, "card", None)
        self._child: tuple[subprocess.Popen[bytes], Connection, int] | None = None

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        process, pipe, _ = self._child = self._child or self._start()
        try:
            pipe.send((list(prompts), list(responses)))
            if not pipe.poll(self.timeout):
                raise ScorerTimeoutError(
                    f"scorer {self.where}: no scores of {len(responses)} answers within {self.timeout:g} s; "
                    "its process was ended"
                )
            scores, error = pipe.recv()
        except (EOFError, OSError):
            self.close()
            raise ScorerError(f"scorer {self.where}: its process died ({_ending(process.returncode)})") from None
        except BaseException:  # an answer that comes after this must not be taken for the next one's
            self.close()
            raise
        if error:
            raise ScorerError(f"scorer {self.where} raised {error}")
        return scores

    def close(self) -> None:
        """End the child, whatever it does."""
        if self._child is not None:
            process, pipe, watched = self._child
            self._child = None
            process.kill()
            process.wait()
            pipe.close()
            os.close(watched)

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection, int]:
        ours, theirs = _pipe()
        watching, watched = os.pipe()
        command = [sys.executable, "-m", __spec__.name, self.where, str(theirs.fileno()), str(watching)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(), watching), env=environment)
        theirs.close()
        os.close(watching)
        child = process, ours, watched
        try:
            ready = ours.poll(STARTING) and ours.recv()
        except EOFError:
            ready = False
        if not ready:
            self._child = child
            self.close()
            raise ScorerError(f"scorer {self.where}: its process did not start ({_ending(process.returncode)})")
        return child

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    def __del__(self) -> None:
        if self.__dict__.get("_child"):
            self.close()


def _pipe() -> tuple[Connection, Connection]:
    from multiprocessing import Pipe

    ours, theirs = Pipe()
    return ours, theirs


def _ending(code: int | None) -> str:
    return f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"


def _serve(where: str, pipe: Connection, watching: int) -> None:
    """The child: score what comes until the parent is gone."""
    threading.Thread(target=_end_with_parent, args=(watching,), daemon=True).start()
    scorer: Scorer = load_scorer(where)
    pipe.send(True)
    while True:
        prompts, responses = pipe.recv()
        try:
            answer = scorer(prompts, responses), ""
        except Exception as error:
            answer = {}, f"{type(error).__name__}: {error}"
        try:
            pipe.send(answer)
        except (TypeError, AttributeError) as error:  # what a scorer returned cannot be pickled
            pipe.send(({}, f"{type(error).__name__}: {error}"))


def _end_with_parent(watching: int) -> None:
    os.read(watching, 1)  # returns when the parent's end is closed, by it or by its death
    os._exit(0)


if __name__ == "__main__":
    import contextlib

    with contextlib.suppress(EOFError, KeyboardInterrupt):
        _serve(sys.argv[1], Connection(int(sys.argv[2])), int(sys.argv[3]))
