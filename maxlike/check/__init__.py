"""`--job check`: a small twin of an experiment is proved against itself on simulated devices.

shrink      the twin: the operative configuration with small numbers in place of large ones, nothing else changed
documents   what it is trained on: made-up documents through the real data layers
subject     the twin's state and batches, and the compiled step of one of its variants
steps       what a compiled step computes from some starts
compare     two records of a run, tensor by tensor in order of depth; the first one that departs
training, state, decoding, transfer, balance   the rows of the table
check       the job: runs the rows and prints the table
"""
