"""Recipe: every setting of a run, its shipped values, and how they are loaded and adapted to a teacher."""
