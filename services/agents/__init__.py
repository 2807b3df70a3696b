"""Durable runs: workflows whose history is a list of steps, and the human reviews they wait for."""
