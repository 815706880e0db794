"""A learning rate for the user's own rows, by trying some."""
