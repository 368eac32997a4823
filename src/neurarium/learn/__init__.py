"""Room ``learn``: how parameters are learned. Learners, local rules, optimizers."""
