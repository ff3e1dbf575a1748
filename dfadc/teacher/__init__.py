"""Teacher: from a file to a frozen network with its image contract."""
