"""Plain torch definitions of every op, one file an op. They say what is right; they are never fast."""
