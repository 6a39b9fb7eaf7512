"""Pretraining: one run at any scale, and the study of what an optimizer's state buys."""
