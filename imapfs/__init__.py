"""imapfs: an IMAP account mounted as a directory."""

__version__ = "0.2.0"
