"""What a server that lacks an extension would not announce, not understand and not say."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Extension:
    """``refused`` matches commands, ``codes`` response codes, ``data`` what to cut out of untagged lines.

    ``words`` are announcements that go with the name, and ``implied`` are extensions that build upon it.
    """

    refused: bytes | None = None
    codes: bytes | None = None
    data: bytes | None = None
    words: tuple[str, ...] = ()
    implied: tuple[str, ...] = ()


_EXTENSIONS = {
    "ACL": _Extension(rb"(GET|SET|DELETE)ACL\b|MYRIGHTS\b|LISTRIGHTS\b", words=("RIGHTS",)),
    "BINARY": _Extension(rb"(UID )?FETCH .*\bBINARY|APPEND .*~\{"),
    "CHILDREN": _Extension(data=rb" ?\\Has(?:No)?Children\b"),
    "COMPRESS": _Extension(rb"COMPRESS\b"),
    "CONDSTORE": _Extension(
        rb"(SELECT|EXAMINE|ENABLE) .*\bCONDSTORE|(STATUS|LIST) .*\bHIGHESTMODSEQ"
        rb"|(UID )?(FETCH|SEARCH) .*\b(CHANGEDSINCE|MODSEQ)|(UID )?STORE .*\bUNCHANGEDSINCE",
        codes=rb"HIGHESTMODSEQ|NOMODSEQ|MODIFIED",
        data=rb" ?\bMODSEQ \(\d+\)| ?\bHIGHESTMODSEQ \d+",
        implied=("QRESYNC",),
    ),
    "ENABLE": _Extension(rb"ENABLE\b", implied=("QRESYNC", "UTF8")),
    "ESEARCH": _Extension(rb"(UID )?SEARCH RETURN\b", implied=("SEARCHRES", "CONTEXT")),
    "CONTEXT": _Extension(rb"(UID )?SEARCH RETURN .*\b(UPDATE|PARTIAL)|CANCELUPDATE\b"),
    "ESORT": _Extension(rb"(UID )?SORT RETURN\b"),
    "ID": _Extension(rb"ID\b"),
    "IDLE": _Extension(rb"IDLE\b"),
    "LIST-EXTENDED": _Extension(
        rb"LIST \(|LIST .*\bRETURN\b", implied=("LIST-STATUS", "SPECIAL-USE", "LIST-MYRIGHTS")
    ),
    "LIST-MYRIGHTS": _Extension(rb"LIST .*\bRETURN .*MYRIGHTS"),
    "LIST-STATUS": _Extension(rb"LIST .*\bRETURN .*STATUS"),
    # These four are a matter of the syntax: see `Hidden`.
    "LITERAL+": _Extension(),
    "LITERAL-": _Extension(),
    "MULTIAPPEND": _Extension(rb"APPEND .*\{\d+\+?\}.*\{\d+\+?\}"),
    "SASL-IR": _Extension(rb"AUTHENTICATE \S+ \S"),
    "METADATA": _Extension(rb"(GET|SET)METADATA\b", words=("METADATA-SERVER",)),
    "MOVE": _Extension(rb"(UID )?MOVE\b"),
    "NAMESPACE": _Extension(rb"NAMESPACE\b"),
    "NOTIFY": _Extension(rb"NOTIFY\b"),
    "OBJECTID": _Extension(
        rb"(UID )?FETCH .*\b(EMAILID|THREADID)|(UID )?SEARCH .*\b(EMAILID|THREADID)|STATUS .*MAILBOXID",
        codes=rb"MAILBOXID",
    ),
    "QRESYNC": _Extension(
        rb"ENABLE .*\bQRESYNC|(SELECT|EXAMINE) .*\bQRESYNC|UID FETCH .*\bVANISHED", codes=rb"CLOSED"
    ),
    "QUOTA": _Extension(rb"(GETQUOTA|GETQUOTAROOT|SETQUOTA)\b"),
    "SEARCHRES": _Extension(rb"(UID )?SEARCH RETURN .*\bSAVE"),
    "SORT": _Extension(rb"(UID )?SORT\b", implied=("ESORT",)),
    "SPECIAL-USE": _Extension(
        rb"LIST .*\bSPECIAL-USE|CREATE .*\bUSE\b",
        data=rb" ?\\(?:All|Archive|Drafts|Flagged|Important|Junk|Sent|Trash)\b(?=[^()]*\) (?:\"|NIL))",
        words=("CREATE-SPECIAL-USE",),
    ),
    "STATUS=SIZE": _Extension(rb"(STATUS|LIST) .*\bSIZE\b"),
    "THREAD": _Extension(rb"(UID )?THREAD\b"),
    "UIDPLUS": _Extension(rb"UID EXPUNGE\b", codes=rb"APPENDUID|COPYUID|UIDNOTSTICKY"),
    "UNSELECT": _Extension(rb"UNSELECT\b"),
    "UTF8": _Extension(rb"ENABLE .*\bUTF8|APPEND .*\bUTF8 \("),
}

_CAPABILITIES = re.compile(rb"(?:\A\* |\[)CAPABILITY ([^\]\r\n]*)", re.I)
_EMPTY_FETCH = re.compile(rb"\* \d+ FETCH \(\)\r\n\Z")
_LITERAL = re.compile(rb"\{(\d+)(\+?)\}\r?\n?\Z")


class Hidden:
    """The extensions ``names``, and those that build upon them, as if the server had none of them.

    A name is that of an RFC's capability up to any ``=``, but for ``STATUS=SIZE``. LITERAL+ (RFC 7888) makes
    every non-synchronising literal an error.

    Raises ValueError for a name of which it is not known what it brings.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in _EXTENSIONS:
                raise ValueError(f"{name} cannot be hidden; what can: {', '.join(sorted(_EXTENSIONS))}")
            self.names.add(name)
            waiting += set(_EXTENSIONS[name].implied) - self.names
        found = [_EXTENSIONS[name] for name in self.names]
        self._refused = _one_of(extension.refused for extension in found)
        codes = _one_of(extension.codes for extension in found)
        self._code = re.compile(rb" \[(?:" + codes.pattern + rb")\b[^\]]*\]", re.I) if codes else None
        self._data = _one_of(extension.data for extension in found)
        self._words = {word for extension in found for word in extension.words} | self.names

    def refuses(self, command: bytes) -> bool:
        """Tell whether the server would not understand ``command``, without tag, literals elided."""
        if "LITERAL+" in self.names and (literal := _LITERAL.search(command)) and literal[2]:
            return True
        return self._refused is not None and self._refused.match(command) is not None

    def visible(self, line: bytes) -> bytes | None:
        """Return what is left of a line of the server (without literals), None if that is nothing."""
        line = _CAPABILITIES.sub(self._announced, line, count=1)
        if self._code and (code := self._code.search(line)):
            if line.startswith(b"* OK [") and code.start() == len(b"* OK"):
                return None
            if line[: code.start()].endswith((b" OK", b" NO")):
                line = line[: code.start()] + line[code.end() :]
        if self._data and line.startswith((b"*", b" ", b")")):
            line = re.sub(rb"\( ", b"(", self._data.sub(b"", line)) if self._data.search(line) else line
            if _EMPTY_FETCH.match(line):
                return None
        return line

    def _announced(self, found: re.Match[bytes]) -> bytes:
        kept = [word for word in found[1].split() if not self._hides(word.decode())]
        return found[0][: found.start(1) - found.start()] + b" ".join(kept)

    def _hides(self, word: str) -> bool:
        return word.upper() in self._words or word.upper().partition("=")[0] in self._words


def _one_of(patterns: Iterable[bytes | None]) -> re.Pattern[bytes] | None:
    found = [pattern for pattern in patterns if pattern]
    return re.compile(b"|".join(b"(?:" + pattern + b")" for pattern in found), re.I) if found else None
