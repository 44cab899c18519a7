"""A user's own images: files found and listed, read, and made into 28 x 28 grey pixels."""
