"""Plain PyTorch versions of every op: the oracle of the tests (in float64) and the last fallback."""
