"""Work in a helper process, which is killed when its time is up.

Some libraries can block without limit: a keyring waits for a person to unlock it, an HTTP client for as long
as a server sends another byte now and then. They may also leave connections and threads behind, which must
not exist when a mount forks into the background. A process can be ended at any time, with all that it holds.

Where neither matters, a daemon thread that is left behind is enough: in `account.discovery` and
`cli.check.probe` for name resolution, in `daemon.control` for a system call on a mount. Those run in commands
that exit soon. Inside the daemon, trio's ``abandon_on_cancel`` does the same for the network.

Input and output go through pipes, never through arguments or the environment, which other users may read.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imapfs.errors import CredentialError


class Failed(Exception):
    """There is no answer. The text says why in a few words, without anything secret."""


def call(module: str, request: object, timeout: float) -> Any:
    """Run ``module`` as a process and return what its `serve` makes of ``request``; both are JSON values.

    ``timeout`` is in seconds. Raises Failed, and CredentialError if the work in the process does.
    """
    # The current directory of the caller may no longer be on the path.
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )
    except OSError as error:
        raise Failed(f"the helper process cannot be started: {error.strerror}") from None
    with process:
        try:
            output, _ = process.communicate(json.dumps([timeout, request]).encode(), timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"no answer within {timeout:g} s") from None
        except BaseException:
            process.kill()
            raise
    try:
        answer = json.loads(output)
    except ValueError:
        raise Failed(f"the helper process ended with exit code {process.returncode}") from None
    if "error" in answer:
        raise CredentialError(answer["error"])
    if "failed" in answer:
        raise Failed(answer["failed"])
    return answer["result"]


def serve(work: Callable[[Any], object]) -> None:
    """Be the helper process: answer the one request with what ``work`` returns for it."""
    # Libraries may print to stdout; that must not be mistaken for the answer.
    with os.fdopen(os.dup(1), "w") as answer_to:
        os.dup2(2, 1)
        try:
            timeout, request = json.load(sys.stdin)
            # In case the caller is gone and cannot end this process.
            signal.alarm(math.ceil(timeout) + 1)
            answer = {"result": work(request)}
        except CredentialError as error:
            answer = {"error": str(error)}
        except Exception as error:
            # Only the name of a library's exception: its text may contain what it was given.
            answer = {"failed": type(error).__name__}
        json.dump(answer, answer_to)
