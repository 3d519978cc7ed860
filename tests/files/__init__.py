"""The adapter's files: what is written, who can read it, that the same numbers come back."""
