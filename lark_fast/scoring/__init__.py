"""Trajectories in, statistics out: CONTRIBUTING.md has the files in the order of the data."""
