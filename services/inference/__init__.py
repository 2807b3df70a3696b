"""Model versions, their deployment into Triton, and exactly one outcome for every task."""
