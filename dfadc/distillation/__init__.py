"""Adversarial distillation: the generator seeks images of high discrepancy, the student learns to lower it."""
