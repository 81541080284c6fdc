"""What a run will cost (parameters, memory, FLOPs, communication), from its configuration alone; imports no torch."""
