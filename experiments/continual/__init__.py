"""Tasks that come one after the other: which ways to go through them keep what was learned?"""
