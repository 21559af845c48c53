"""Copy of unrotated cache rows to other slots, all layers at once, keys turned. See README.md."""
