"""Forward and backward of a step as one CUDA graph, used where that is measured faster.

A step of small kernels lasts as long as the host needs to launch them; a CUDA graph launches all of
them at once. It repeats what was captured: the same kernels on the same memory, so batches are
copied to where it reads, and what the host computes anew for each step is lost. Hence a captured
step must give the losses and gradients of an uncaptured one, or it is not used. Batches of other
shapes need graphs of their own. Penalty, gradient norms and update stay outside.
"""

from fastft.graphs.choose import capture_step as capture_step
