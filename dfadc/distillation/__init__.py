"""The two-player game: the generator seeks images on which the players disagree, the student learns to agree."""
