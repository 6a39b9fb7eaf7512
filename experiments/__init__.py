"""Studies with real data; each folder is one, run by ``python -m experiments.<folder>.run``."""

import os

# LAPACK's threads wait for each other by spinning: beside other work, or under XLA's own threads,
# small decompositions (moma's, OPCM's) take a hundred times as long. Before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
