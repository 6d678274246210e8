"""`python -m effkern.bench`: the same as `effkern bench`."""

import sys

from effkern.cli import app

app(["bench", *sys.argv[1:]])
