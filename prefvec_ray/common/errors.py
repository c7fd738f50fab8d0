"""The errors that are reported in one line. They import nothing else of the package but `redact`, so any module may
raise them."""

import re

from prefvec_ray.common.redact import one_line

_OURS = re.compile(r"^prefvec_ray\.[\w.]+: ")
_MODULE = re.compile(r"^(?:[A-Za-z_]\w*\.)+(?=\w+: )")


class InputError(ValueError):
    """Something given from outside (data, config, file, name, coefficient) cannot be used.

    The message is one line that names what was wrong, what was expected and what to do. The CLI prints it and
    exits with code 2; HTTP turns it into a 400. It is raised before any work starts. Credentials and control
    characters are taken out of the message.
    """

    def __init__(self, message: object = "", *details: object) -> None:
        super().__init__(one_line(str(message)), *details)


class JobError(RuntimeError):
    """Work that was under way failed: a run that diverged, a cluster that lost a node once too often.

    The message is one line that names what failed, why, and what is kept. The CLI prints it and exits with code 1.
    Credentials and control characters are taken out of the message.
    """

    def __init__(self, message: object = "", *details: object) -> None:
        super().__init__(one_line(str(message)), *details)


def message_lines(error: BaseException) -> list[str]:
    """The lines of an error's message that are not empty, stripped."""
    return [line.strip() for line in str(error).splitlines() if line.strip()]


def from_traceback(line: str) -> str:
    """The last line of a traceback as it is reported: of an error of this package the message alone, of any other the
    class without its module, and the message."""
    return (_OURS if _OURS.match(line) else _MODULE).sub("", line)
