"""What a mount must do on every server: the servers, the checks, and the matrix that comes of them."""
