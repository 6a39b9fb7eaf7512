"""What curvature measured while training is worth for pruning and merging: the study's parts."""
