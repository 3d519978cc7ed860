"""Where the router sends tokens: counting them, selecting experts by the counts, plotting.

May import tuner and below.
"""
