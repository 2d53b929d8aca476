"""IMAP as imapfs needs it: connections, typed commands, a pool. Everything above sees only these names."""
