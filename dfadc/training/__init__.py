"""Training of a student from start to end: plan, cost, run, callbacks."""
