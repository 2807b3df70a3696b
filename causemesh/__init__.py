"""Causemesh: an event-driven AI mesh in which every event names its cause."""
