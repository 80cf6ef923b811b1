"""Applications for signals sampled over time: a heart read by one lead, a forecast from a hundred numbers."""
