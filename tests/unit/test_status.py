"""What a status looks like for people."""

from datetime import UTC, datetime, timedelta

from imapfs.cli import status


def test_each_line_says_something() -> None:
    began = datetime.now(UTC) - timedelta(hours=3)
    shown = dict(
        status._rows(
            {
                "source": "imaps://alice@host", "mountpoint": "/m", "pid": 7, "read_only": True,
                "state": "offline", "since": began.isoformat(), "reason": "no route", "retry_in": 12.0,
                "push": {"by": "idle", "idle": ["INBOX"], "poll": 60.0},
                "connections": {"open": 1, "limit": 4},
                "mailboxes": [{"path": "INBOX", "unseen": 3, "messages": 10}],
                "cache": {
                    "bytes": 1536, "limit": 10 << 30, "messages": 1, "bodies": 0,
                    "path": "/c", "deleted": True,
                },
                "files": {"sending": 1, "unsent": 0},
                "waiting": [{"path": "a.eml", "state": "sending", "error": ""}],
                "scratch": [{"path": ".x/b"}], "kept": ["/kept/c"], "spool": "/s",
            }
        )
    )  # fmt: skip
    assert shown == {
        "account": "imaps://alice@host",
        "mounted on": "/m (process 7, read-only)",
        "server": "offline for 3 hours: no route; next attempt in 12 seconds",
        "new mail": "announced by the server in INBOX; elsewhere asked for every 60 seconds",
        "connections": "1 of 4",
        "  INBOX": "3 unread of 10",
        "cache": "1.5 KiB of 10 GiB; 1 message, of which 0 read; in /c (deleted: unmount, and mount again)",
        "not sent": "1 file",
        "  a.eml": "sending: not uploaded yet",
        "  .x/b": "in a scratch directory, and so on this computer only",
        "  /kept/c": "is on the server, which has changed it: compare, then delete this copy",
        "spool": "/s",
    }


def test_a_status_of_another_version_is_shown_as_far_as_it_goes() -> None:
    shown = dict(status._rows({"state": "online", "since": "yesterday"}))
    assert shown["server"] == "online"
    assert shown["not sent"] == "nothing"
