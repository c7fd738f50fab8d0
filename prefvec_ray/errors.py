"""The errors that are told in one line. They know nothing of the rest of the package: every room may raise them."""


class InputError(ValueError):
    """Something given from outside (data, config, file, name, coefficient) cannot be used.

    The message is one line that names what was wrong, what was expected and what to do. The CLI prints it and
    exits with code 2; HTTP turns it into a 400. It is raised before any work starts.
    """


class JobError(RuntimeError):
    """Work that was under way failed: a run that diverged, a cluster that lost a node once too often.

    The message is one line that names what failed, why, and what is kept. The CLI prints it and exits with code 1.
    """
