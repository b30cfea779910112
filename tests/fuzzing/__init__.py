"""Files damaged in every way that we could think of, and the judge of what the package makes of them.

`subjects` builds small sound checkpoints, `tensors`, `configs`, `folders` and `sources` damage copies of them, `judge` reads each and says what
came of it, `run` deals the mutations out by a seed.
"""
