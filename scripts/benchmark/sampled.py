"""Runs imapfs and notes which layer uses the processor. Arguments: FILE, and those for imapfs.

A thread looks every few milliseconds what each other thread does, and credits the processor time that the
thread has used since then to the innermost frame of a package that is known. FILE gets the seconds as JSON.
"""

import json
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Final

from imapfs.cli.main import main as imapfs

_INTERVAL: Final = 0.003
_OURS: Final = "/imapfs/"
_LIBFUSE: Final = "trio and pyfuse3"
"""pyfuse3 is compiled, and has no frames of its own: what called it is seen."""
_OTHERS: Final = {"/trio/": _LIBFUSE, "_pyfuse3.py": _LIBFUSE, "/ssl.py": "TLS"}


def layer(frame: FrameType | None) -> str:
    """Return the package that runs in a stack."""
    while frame is not None:
        file = frame.f_code.co_filename
        for part, name in _OTHERS.items():
            if part in file:
                return name
        if _OURS in file:
            return "imapfs/" + file.rpartition(_OURS)[2].partition("/")[0].removesuffix(".py")
        frame = frame.f_back
    return "Python"


def sample(stop: threading.Event, spent: dict[str, float]) -> None:
    """Until ``stop``, credit processor time to the layers of the thread with the loop, and of all others."""
    seen: dict[int, float] = {}
    own = threading.get_ident()
    while not stop.wait(_INTERVAL):
        main = threading.main_thread().ident
        for ident, frame in sys._current_frames().items():
            if ident == own:
                continue
            try:
                used = time.clock_gettime(time.pthread_getcpuclockid(ident))
            except OSError:
                continue  # it has just ended
            # The identity of a thread is used again.
            since = used - seen.get(ident, 0.0) if used >= seen.get(ident, 0.0) else used
            seen[ident] = used
            key = f"{'loop' if ident == main else 'threads'}: {layer(frame)}"
            spent[key] = spent.get(key, 0.0) + since


def main() -> None:
    """Run imapfs with the arguments that follow FILE."""
    output, *arguments = sys.argv[1:]
    sys.argv = ["imapfs", *arguments]
    stop = threading.Event()
    spent: dict[str, float] = {}
    thread = threading.Thread(target=sample, args=(stop, spent))
    thread.start()
    try:
        imapfs()
    finally:
        stop.set()
        thread.join()
        Path(output).write_text(json.dumps(spent))


if __name__ == "__main__":
    main()
