"""Model merging: methods as chains of small steps, and one pure function that applies them."""

from optax_moma.merging._contract import Contract as Contract
from optax_moma.merging._contract import Step as Step
from optax_moma.merging._diagonal import average as average
from optax_moma.merging._diagonal import dare as dare
from optax_moma.merging._diagonal import fisher as fisher
from optax_moma.merging._diagonal import moma as moma
from optax_moma.merging._diagonal import ota as ota
from optax_moma.merging._diagonal import task_arithmetic as task_arithmetic
from optax_moma.merging._diagonal import ties as ties
from optax_moma.merging._diagonal import umtam as umtam
from optax_moma.merging._leaf import TaskVectors as TaskVectors
from optax_moma.merging._merge import merge as merge
from optax_moma.merging._steps import chain as chain
from optax_moma.merging._steps import drop as drop
from optax_moma.merging._steps import elect as elect
from optax_moma.merging._steps import mean as mean
from optax_moma.merging._steps import scale as scale
from optax_moma.merging._steps import total as total
from optax_moma.merging._steps import trim as trim
from optax_moma.merging._steps import weigh as weigh
