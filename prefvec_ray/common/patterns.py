"""Regular expressions that come from a file or a config, matched in time linear in the text (RE2).

Python's own `re` backtracks: `(a+)+$` needs longer than anyone waits for thirty letters.
"""

from functools import lru_cache
from typing import Any

from prefvec_ray.common.errors import InputError

LONGEST = 10_000
"""Characters of one pattern."""


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str, what: str) -> Any:
    """The compiled pattern, with `search`, `match` and `fullmatch` as in `re`.

    Raises:
        InputError: not a pattern, one that RE2 does not know (look-around, back-references), or one that is too large;
            the message begins with `what`.
    """
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    if len(pattern) > LONGEST:
        raise InputError(f"{what}: a pattern of {len(pattern)} characters; give at most {LONGEST}")
    try:
        return re2.compile(pattern, options)
    except (re2.error, ValueError, RecursionError) as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else error
        raise InputError(
            f"{what}: {pattern!r:.100} is no pattern that can be matched in bounded time ({reason:.100}); write it "
            "without look-around and back-references, as RE2 takes it"
        ) from error
