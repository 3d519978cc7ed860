"""What an experts module is, and how other libraries store its weights."""
