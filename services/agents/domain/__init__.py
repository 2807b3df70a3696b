"""Runs and the workflows that move them.

Everything here is pure: no I/O and no clock. The next step of a run is a function of its history
and of the signal that arrived, so a history replays to itself on any machine.
"""
