"""Mesh projects to start from."""
