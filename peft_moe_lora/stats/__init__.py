"""Counts where the router sends tokens, selects experts by the counts, and plots the counts.

May import tuner and below.
"""
