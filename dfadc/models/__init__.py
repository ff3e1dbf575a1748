"""Teachers and students: files in, frozen or trainable networks out. Imports neither distillation nor verification."""
