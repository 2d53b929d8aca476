"""IMAP: connections, typed commands, watching, and a pool of sessions."""
