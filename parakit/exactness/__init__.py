"""What keeps a parallel run the same as a plain loop, and what looks whether it is.

A share of a batch is computed by a process that sees nothing of the rest. What a model or a loss does beyond that, to
its parameters, its buffers, its attributes, or with the rows of others, is found out when they are tried, is given its
rule, and is looked at again while the run goes on.
"""
