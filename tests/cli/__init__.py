"""The command line itself: how it starts, what it shows, and what it leaves out."""
