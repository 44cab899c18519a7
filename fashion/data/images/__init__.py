"""A user's own images: listed, read, made into 28 x 28 grey pixels; and folders of predictions on them."""
