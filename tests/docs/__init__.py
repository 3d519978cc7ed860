"""The documentation site: its pages are complete, and a browser shows them."""
