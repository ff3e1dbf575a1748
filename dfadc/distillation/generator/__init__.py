"""Generator networks and their latents."""
