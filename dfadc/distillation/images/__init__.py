"""Images of a student update: fresh, replayed and procedural ones, and their augmentation."""
