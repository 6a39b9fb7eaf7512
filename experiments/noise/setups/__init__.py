"""Trainings for ``sweep``: models for a file of your own."""
