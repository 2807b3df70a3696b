"""The door to the mesh: validates, deduplicates, and says why it refused."""
