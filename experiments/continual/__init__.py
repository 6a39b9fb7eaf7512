"""Tasks that come one after the other: which ways to go through them keep what was learned?"""

# Also for what it sets before NumPy is loaded.
import experiments.noise as noise  # noqa: F401
