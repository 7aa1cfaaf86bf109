"""Tuning: measure every candidate of the planner on the user's GPU, and record the fastest for plans to follow."""
