"""The layer's gradients, and how its launches are replayed."""
