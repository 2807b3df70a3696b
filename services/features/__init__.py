"""The feature service; so far its pure engine."""
