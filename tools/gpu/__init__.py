"""Measurements of a machine with one GPU, in parts that run in processes of their own: `make gpu-check`."""
