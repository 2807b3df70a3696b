"""The billing service; so far its pure domain."""
