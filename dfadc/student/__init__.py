"""Student: construction by name, and weights inherited from a teacher of the same family."""
