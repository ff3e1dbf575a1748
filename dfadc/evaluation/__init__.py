"""The user's labelled images. They evaluate; they never train or select."""
