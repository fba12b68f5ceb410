"""The steps in their order, with the seconds each may take of the whole."""

from . import attention, machine, sanitizer, serving, test_binaries, timing, training

# name, title, whether correctness depends on it, seconds at most, function
STEPS = [
    ("machine", "Machine", True, 60, machine.machine),
    ("kernels", "Kernels against their twins", True, 150, test_binaries.kernels),
    ("engine", "Engine, models and gradients", True, 120, test_binaries.engine),
    ("attention", "Attention's error beside PyTorch's", True, 60, attention.attention),
    ("serving", "Serving", True, 60, serving.serving),
    ("training", "Training", True, 90, training.training),
    ("timing", "Timings", False, 300, timing.timing),
    ("sanitizer", "compute-sanitizer", True, 90, sanitizer.sanitizer),
]
# Rehearsed on two cores in a debug build.
REHEARSAL_FACTOR = 2.5
