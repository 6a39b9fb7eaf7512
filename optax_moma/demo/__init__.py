"""The demo: four experts fine-tuned from one encoder, merged by their own curvature.

Needs the extra ``demo``; ``optax-moma demo`` runs it.
"""

from optax_moma.demo.pipeline import recorded_gradients as recorded_gradients
from optax_moma.demo.pipeline import run as run
