"""Sweeps as graphs of operators: recorded, simplified, compiled."""
