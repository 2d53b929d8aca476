"""Programs that become servers, run with packages of their own in .servers."""
