"""The one error that a user can mend. It knows nothing of the rest of the package, so every room may raise it."""


class InputError(ValueError):
    """Something given from outside (data, config, file, name, coefficient) cannot be used.

    The message is one line that names what was wrong, what was expected and what to do. The CLI prints it and
    exits with code 2; HTTP turns it into a 400. It is raised before any work starts.
    """
