"""What goes wrong on a newcomer's machine, said in one sentence that names the thing and what to do about it."""


class Problem(Exception):  # noqa: N818  (it is told to a person, not handled as a fault of the code)
    """A condition of the machine that stops us. `str()` is the whole message; the process exits with 78 (EX_CONFIG)."""

    exit_code = 78
