"""Loss terms of the student and the generator."""
