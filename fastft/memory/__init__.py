"""Memory of a training step: what each block keeps or recomputes, inside a budget."""

from fastft.memory.budget import enforced_limit as enforced_limit
from fastft.memory.budget import out_of_memory_explained as out_of_memory_explained
from fastft.memory.fit import fit_batch as fit_batch
from fastft.memory.fit import fitted_before as fitted_before
from fastft.memory.plan import make_plan as make_plan
from fastft.memory.plan import plan_memory as plan_memory
from fastft.memory.rehearsal import as_trained_in_the_end as as_trained_in_the_end
from fastft.memory.rehearsal import try_rehearsal as try_rehearsal
from fastft.memory.saved_plan import Plan as Plan
from fastft.memory.saved_plan import load_plan as load_plan
