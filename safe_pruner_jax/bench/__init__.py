"""What a control step costs: interleaved timing, phases, the machine's own limits, and openpi beside it."""
