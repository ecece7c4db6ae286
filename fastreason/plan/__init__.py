"""What a run will need and take, on paper: memory by part, seconds of a step, the split of GPUs, what asynchrony gains."""
