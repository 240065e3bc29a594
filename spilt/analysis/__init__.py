"""From losses to what they say: odds, curves, their fits and readings, and the numbers of the paper."""
