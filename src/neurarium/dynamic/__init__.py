"""Networks that decide at run time how much to compute.

A dynamic network is a set of plain segments and a question asked between them. The answer is a path; output, cost, training loss and
exported program are functions of the path. One engine runs paths (:mod:`~neurarium.dynamic.staged`), one meter prices them
(:mod:`~neurarium.dynamic.cost`), one calibration turns budgets into thresholds (:mod:`~neurarium.dynamic.budget`).
"""
