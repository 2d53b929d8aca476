"""Private servers that the tests and the demo run: loopback only, each in a directory of its own."""
