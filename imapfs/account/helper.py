"""Work in a short-lived process of its own, which is ended when it takes too long.

For libraries that can wait for ever, as a keyring does for somebody who is to unlock it, or for as long as a
server has something to say, and that keep connections which no fork survives. What goes in and out goes
through pipes, never through arguments or the environment, where others would see it.
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
    """There is no answer; its text says why, in few words without anything secret."""


def call(module: str, asked: object, timeout: float) -> Any:
    """What ``module``, which calls `serve`, makes of ``asked``; both are what JSON can carry.

    ``timeout`` is in seconds. Raises Failed, and CredentialError where the work does.
    """
    # The caller may have been started from a directory that is not on its path any more.
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
        raise Failed(f"no process for it: {error.strerror}") from None
    with process:
        try:
            output, _ = process.communicate(json.dumps([timeout, asked]).encode(), timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"no answer within {timeout:g} s") from None
        except BaseException:
            process.kill()
            raise
    try:
        answer = json.loads(output)
    except ValueError:
        raise Failed(f"its process ended with exit code {process.returncode}") from None
    if "error" in answer:
        raise CredentialError(answer["error"])
    if "failed" in answer:
        raise Failed(answer["failed"])
    return answer["result"]


def serve(work: Callable[[Any], object]) -> None:
    """Be the other process: do ``work`` with what was asked."""
    # Libraries may print what they like, without anybody taking it for the answer.
    with os.fdopen(os.dup(1), "w") as answer_to:
        os.dup2(2, 1)
        try:
            timeout, asked = json.load(sys.stdin)
            # Should nobody be there any more to end this.
            signal.alarm(math.ceil(timeout) + 1)
            answer = {"result": work(asked)}
        except CredentialError as error:
            answer = {"error": str(error)}
        except Exception as error:
            # Of an exception of somebody else's only the name: it may hold what it was given.
            answer = {"failed": type(error).__name__}
        json.dump(answer, answer_to)
