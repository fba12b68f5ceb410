"""The steps of scripts/gpu-check, a file each. The driver needs the standard library alone.

`steps.py` names them in their order. A step is a function of (check, step): it fills the step's tables and
sets its status. What it raises is the step's failure, and never ends the others.
"""
