"""The errors that are reported in one line. They import nothing else of the package but `redact`, so any module may
raise them."""

from prefvec_ray.common.redact import one_line


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
