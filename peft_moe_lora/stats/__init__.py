"""Where the router sends tokens: counted, turned into a choice of experts, plotted.

May import tuner and below.
"""
