"""The harness: verifies every op against a float64 oracle, then times it beside what a user would pick.

Run it as ``effkern bench`` or ``python -m effkern.bench``; ``pytest bench/`` runs the same cases.
Nothing here is imported by ``import effkern``.
"""
