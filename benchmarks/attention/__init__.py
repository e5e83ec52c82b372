"""Speed and memory of one attention, forward and backward, as ratios to exact attention in the same run."""
